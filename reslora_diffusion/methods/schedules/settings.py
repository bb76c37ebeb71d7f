"""`--schedule` on every command line: names of schedules, their settings, and what they do not go with.

    coto     coto:initial_p=0.1,ratio=0.75
    restart  restart:stages=3,momentum=0.5,warmup=10      restart:ranks=8/4/2
    fold     fold:at=0.85
    prune    prune:ratio=0.5      prune:ratio=0.25,parts=channels,spare=1
    ranks    ranks:ratio=0.5

Known without torch, so that bad input is answered at once.
"""

import dataclasses
import math
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, get_type_hints

from ...rules import MERGE_EXACTLY, Shortcut
from ...utils.options import convert, option, value_problems
from ...utils.problems import BadInput, listing, nearest

if TYPE_CHECKING:
    from ..pruning.structures import Structure

FOLDED_DORA = "`block` is all that DoRA has to fold, and that merges exactly at the end; wanted no fold"
FROZEN_LINK = (
    "a finished link is frozen, and what `{}` makes of it depends on activations, so no plain LoRA equals it; wanted "
    "shortcut none or block"
)
SCORED = (
    "scores are of what B A does to one layer's weight, and `{}` depends on activations; wanted shortcut none or block"
)
PRUNED_DORA = "scores are of what B A does to a weight, and DoRA does more to it than B A; wanted no --use_dora"
SHARDED = "it has not been tried with factors that are sharded; wanted DDP or one process"
DEEPSPEED = "DeepSpeed takes the optimizer step itself, from copies of parameters and gradients; use DDP or one process"


@dataclass
class Settings:
    """The settings of one schedule; `str` of it is what `parse_schedule` reads."""

    name: ClassVar[str]
    summary: ClassVar[str]
    conflicts: ClassVar[Mapping[str, str]]

    def __post_init__(self) -> None:
        self.check()

    def check(self) -> None:
        """Raise `BadInput` with everything that is wrong with the values."""
        if problems := list(self.problems()):
            raise BadInput(f"{self.name}: {problem}" for problem in problems)

    def problems(self) -> Iterator[str]:
        for problem in value_problems(self):
            yield problem.removeprefix("--")

    def misfits(self, total_steps: int | None, rank: int) -> Iterator[str]:
        """Problems with a run of so many steps, if that is known, with adapters of this rank."""
        return iter(())

    def __str__(self) -> str:
        given = [
            f"{item.name}={'/'.join(map(str, value)) if isinstance(value, list) else value}"
            for item in dataclasses.fields(self)
            if (value := getattr(self, item.name)) not in (None, []) and value is not False
        ]
        return f"{self.name}:{','.join(given)}" if given else self.name


@dataclass
class CotoSettings(Settings):
    """Settings of `coto.Coto`."""

    initial_p: float = option(0.1, "Share of the blocks whose adapters are open in the first step.", above=0, below=1)
    ratio: float = option(0.75, "Share of the steps in which any are dropped.", above=0, below=1)

    name = "coto"
    summary = "drops the adapters of whole blocks, fewer and fewer (CoTo, CopRA)"
    conflicts = {
        "cuda_graph": "a recorded step updates every adapter, also those that were dropped: their moments would fade "
        "and their weights decay; wanted no --cuda_graph",
        "fsdp": SHARDED,
        "deepspeed": DEEPSPEED,
    }


@dataclass
class RestartSettings(Settings):
    """Settings of `restart.Restart`."""

    stages: int | None = option(None, "Links of the chain (default: as many as ranks, or 3).", at_least=2)
    momentum: float = option(0.0, "Share of a finished link that the next one keeps.", at_least=0, below=1)
    warmup: int = option(10, "Steps in which the learning rate rises again after each restart.", at_least=0)
    ranks: list[int] = option([], "Rank of each link, as 8/4/2 (default: that of the adapter).")
    merge: bool = option(False, "Add finished links to the base's weights, which must be float32.")

    name = "restart"
    summary = "freezes the adapter and starts another beside it (PeriodicLoRA, Chain of LoRA)"
    conflicts = {str(each): FROZEN_LINK.format(each) for each in Shortcut if each not in MERGE_EXACTLY} | {
        "convolutions": "convolutions and embeddings are adapted by PEFT's own layers, which hold one link; wanted "
        "linear layers alone",
        "max_norm": "--scale_weight_norms sees the link that is trained, and not those that are frozen; wanted none",
        "fsdp": "FSDP has sharded the factors that a restart would replace; use DDP or one process",
        "deepspeed": DEEPSPEED,
    }

    @property
    def links(self) -> int:
        return self.stages or len(self.ranks) or 3

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        if any(rank < 1 for rank in self.ranks):
            yield f"ranks: got {'/'.join(map(str, self.ranks))}, wanted numbers of 1 or more"
        if self.ranks and self.stages not in (None, len(self.ranks)):
            yield f"ranks: got {len(self.ranks)} of them for {self.stages} stages, wanted one for each"
        if len(self.ranks) == 1:
            yield "ranks: got one, wanted one for each of two stages or more"
        if self.momentum and len(set(self.ranks)) > 1:
            yield "momentum keeps a part of the finished link, whose rank it has; wanted momentum=0 where ranks differ"

    def merge_problems(self, dtype: str, features: Container[str]) -> Iterator[str]:
        """Return why finished links cannot be added to a base of this precision."""
        if not self.merge:
            return
        if dtype not in ("float32", "no"):
            yield f"{self.name}: merge adds links to a base in {dtype}, which would round them away; wanted float32"
        for name, what in (
            ("dora", "DoRA's norms are of the weights"),
            ("sharded_base", "each process has a part"),
            ("quantised", "these are quantised and would be rounded again"),
        ):
            if name in features:
                yield f"{self.name}: merge changes the base's weights, and {what}; wanted merge=false"

    def length_problems(self, total_steps: int) -> Iterator[str]:
        """Links of one step may learn nothing: a warm-up of the learning rate begins at 0, in every link anew."""
        if self.links >= total_steps:
            yield f"got {self.links} stages in {total_steps} steps, wanted more steps than stages"

    def misfits(self, total_steps: int | None, rank: int) -> Iterator[str]:
        if total_steps is not None:
            yield from (f"{self.name}: {problem}" for problem in self.length_problems(total_steps))
        if self.ranks and self.ranks[0] != rank:
            yield f"{self.name}: ranks begin with {self.ranks[0]}, and the adapter has rank {rank}; wanted the same"


@dataclass
class FoldSettings(Settings):
    """Settings of `fold.Fold`."""

    at: float = option(0.85, "Share of the steps after which the shortcut is folded.", above=0, below=1)

    name = "fold"
    summary = "folds the shortcut into plain LoRA, and trains on"
    conflicts = {
        "none": "there is no shortcut to fold; wanted input, middle or block",
        "dora": FOLDED_DORA,
        "deepspeed": DEEPSPEED,
    }


@dataclass
class GradualSettings(Settings):
    """Schedules that remove more and more: a share 1 - (1 - u)^3 of what is removed in the end, u from 0 to 1."""

    ratio: float = option(0.5, "Share that is cut out.", above=0, below=1)
    decay: float = option(0.9, "Of the moving average of scores.", at_least=0, below=1)
    every: int = option(10, "Steps between two choices of what goes.", at_least=1)
    warmup: float = option(0.1, "Share of the steps before anything goes.", at_least=0, below=1)
    cooldown: float = option(0.1, "Share of the steps that are left when the ratio is reached.", at_least=0, below=1)

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        if self.warmup + self.cooldown >= 1:
            yield f"warmup and cooldown: got {self.warmup} and {self.cooldown}, wanted less than 1 together"

    def cut(self, count: int) -> int:
        """Return how many of `count` are cut in the end: the whole number nearest to the ratio, or the smaller."""
        return math.ceil(self.ratio * count - 0.5 - 1e-9)

    def progress(self, steps: int, total_steps: int) -> float:
        """u after so many steps."""
        first, last = self.warmup * total_steps, (1 - self.cooldown) * total_steps
        return min(1.0, max(0.0, (steps - first) / max(last - first, 1e-9)))

    def share(self, steps: int, total_steps: int) -> float:
        """The share that is removed after so many steps, of what is removed in the end."""
        return 1 - (1 - self.progress(steps, total_steps)) ** 3

    def is_due(self, steps: int, total_steps: int) -> bool:
        """Return whether a choice is due after so many steps: every `every` steps, and when u has just reached 1."""
        u, before = (self.progress(count, total_steps) for count in (steps, steps - 1))
        return before < 1 and (u >= 1 or steps % self.every == 0)


@dataclass
class PruneSettings(GradualSettings):
    """Settings of `prune.Prune`; the ratio is that of heads and channels."""

    parts: str = option("all", "What is cut out: heads, channels or all.", choices=("heads", "channels", "all"))
    spare: int | None = option(
        None, "First and last blocks left whole (default: 0 if the configuration has one width, else 1).", at_least=0
    )

    name = "prune"
    summary = "masks heads and channels by LoRA's gradients, and leaves a smaller model (LoRAPrune)"
    conflicts = {str(each): SCORED.format(each) for each in Shortcut if each not in MERGE_EXACTLY} | {
        "dora": PRUNED_DORA,
        "cuda_graph": "scores are made of gradients between two recordings, which has not been tried; wanted no "
        "--cuda_graph",
        "text_encoder": "one model is pruned, and a LoRA of the text encoder would stay behind; wanted no "
        "--train_text_encoder",
        "sharded_base": "scores are of whole weights of the base, of which each process has a part; wanted DDP or one "
        "process",
        "quantised": "quantised weights cannot be cut into; wanted a base in floating point",
        "best": "an early step is the best by its loss, as little is masked in it; wanted the last step: "
        "--keep_best false",
        "fsdp": SHARDED,
        "deepspeed": DEEPSPEED,
    }

    def structure_problems(
        self, structures: Sequence["Structure"], chosen: Sequence["Structure"], adapted: Container[str]
    ) -> Iterator[str]:
        """Problems with pruning these structures of a model, of which some are `chosen`.

        Args:
            adapted: names of the layers that an adapter is on.
        """
        kinds = ("heads", "channels") if self.parts == "all" else (self.parts,)
        for kind in kinds:
            there = [one for one in structures if one.kind == kind]
            own = [one for one in chosen if one.kind == kind]
            if not there:
                yield f"no {kind} were found; known are Llama's and its like, T5's, and those of UNets, SD3 and FLUX"
            elif not own:
                yield f"spare={self.spare} leaves no {kind} to prune; wanted less"
            elif bare := [one.name for one in own if not any(layer in adapted for layer in one.layers)]:
                yield (
                    f"{kind} of {listing(bare)} have no adapter, so nothing scores them; wanted their layers among "
                    f"--target_modules, or parts={'channels' if kind == 'heads' else 'heads'}"
                )
            elif empty := [one for one in own if self.cut(one.count) >= one.count]:
                yield f"ratio={self.ratio} would leave {empty[0].name} without {kind}: it has {empty[0].count}"
            elif not any(self.cut(one.count) for one in own):
                most = max(one.count for one in own)
                yield (
                    f"ratio={self.ratio} would take no {kind}, of which a layer has {most} at most; wanted more, or "
                    f"parts={'channels' if kind == 'heads' else 'heads'}"
                )


@dataclass
class RanksSettings(GradualSettings):
    """Settings of `ranks.Ranks`; the ratio is that of the ranks of each layer, or of the layers."""

    whole: bool = option(False, "Take whole adapters rather than ranks of each.")

    name = "ranks"
    summary = "takes away the ranks, or the adapters, that matter least: a smaller LoRA"
    conflicts = {
        "middle": "a rank of a chain's layers is one and the same with `middle`, and would go in all of them; wanted "
        "shortcut none, input or block",
        "dora": PRUNED_DORA,
        "cuda_graph": "scores are made of gradients between two recordings, which has not been tried; wanted no "
        "--cuda_graph",
        "convolutions": "adapters on convolutions and embeddings would keep their ranks, and the file its size; wanted "
        "linear layers alone",
        "ema": "an average remembers the ranks that have gone; wanted no --use_ema",
        "best": "an early step is the best by its loss, and has more ranks; wanted the last step: --keep_best false",
        "fsdp": SHARDED,
        "deepspeed": DEEPSPEED,
    }

    def misfits(self, total_steps: int | None, rank: int) -> Iterator[str]:
        yield from (f"{self.name}: {problem}" for problem in self.size_problems([rank], None))

    def size_problems(self, ranks: Iterable[int], layers: int | None) -> Iterator[str]:
        """Yield a problem for each number of which the ratio would cut none or all; `layers` is None if unknown."""
        counted = {"adapters": [layers] if layers else []} if self.whole else {"ranks": sorted(set(ranks))}
        for what, counts in counted.items():
            for count in counts:
                if not 0 < (gone := self.cut(count)) < count:
                    yield f"ratio={self.ratio} would take {gone} of {count} {what}; wanted some to go, and some to stay"


KINDS: tuple[type[Settings], ...] = (CotoSettings, RestartSettings, FoldSettings, PruneSettings, RanksSettings)
SCHEDULES = {kind.name: kind for kind in KINDS}


def parse_schedule(text: str) -> Settings:
    """Settings that `NAME` or `NAME:SETTING=VALUE,SETTING=VALUE` asks for.

    >>> str(parse_schedule("restart:stages=4"))
    'restart:stages=4,momentum=0.0,warmup=10'

    Raises:
        BadInput: naming everything that is unknown, does not parse or is out of bounds.
    """
    name, _, rest = text.strip().partition(":")
    if name not in SCHEDULES:
        raise BadInput([f"got {name!r}, wanted {', '.join(SCHEDULES)}{nearest(name, SCHEDULES)}"])
    kind, problems, given = SCHEDULES[name], [], {}
    hints = {item.name: get_type_hints(kind)[item.name] for item in dataclasses.fields(kind)}
    for word in filter(None, map(str.strip, rest.split(","))):
        setting, _, value = word.partition("=")
        if setting not in hints:
            known = f"it has {', '.join(hints)}"
            problems.append(f"{name}: got the setting {setting!r}; {known}{nearest(setting, hints)}")
        elif setting in given:
            problems.append(f"{name}: {setting} is given twice")
        else:
            try:
                given[setting] = convert(hints[setting], value.split("/") if hints[setting] == list[int] else [value])
            except ValueError as error:
                problems.append(f"{name}: {setting}: got {value!r}, wanted {error}")
    try:
        found = kind(**given)
    except BadInput as error:
        problems += error.problems
    if problems:
        raise BadInput(problems)
    return found


def conflicts_of(settings: Settings, features: Iterable[str]) -> list[str]:
    """Return why a schedule does not go with some of the shortcuts, options and methods of a run."""
    return [f"{settings.name}: {settings.conflicts[name]}" for name in features if name in settings.conflicts]
