"""A comparison's request as data: the settings file, the page and the tests all speak this.

    rows     every prompt of the matrix x every seed x every setting of `rows_by`
    columns  the base, then every adapter at every strength, x every setting of `columns_by`
    cells    rows x columns, each from the same noise as the rest of its row

A prompt with {placeholders} stands for all combinations of their values. Everything wrong with a request is reported
at once, as one ValueError, before an image is generated.
"""

import itertools
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from reslora_diffusion.choices import GUIDANCE

from .axes import Axis, Sampling, Scheduler, Setting, is_setting, setting_of
from .foreign import is_number, is_text, printable, shortened
from .templates import filled, placeholder_names

FORMAT_VERSION = 2  # version 1 is read too
ADAPTER_NAMES = {"label", "file", "sha256"}
MOST_SAID = 20  # problems that one message names
MANY = 1000  # prompts, more than which are not written out to be counted


@dataclass(frozen=True)
class Limits:
    """Bounds of what one request may ask of the machine."""

    images: int = 200
    prompt_characters: int = 600
    steps: int = 100
    strength: float = 1.5
    guidance: float = 20.0
    seed: int = 2**32 - 1
    label_characters: int = 60
    adapters: int = 16


@dataclass(frozen=True)
class Adapter:
    """A LoRA file: what the page calls it, and the digest that says which file it is."""

    label: str
    path: str
    sha256: str


@dataclass(frozen=True)
class Column:
    """One way to generate: an adapter at a strength, or the base when there is none; and a swept setting."""

    adapter: Adapter | None = None
    strength: float = 0.0
    setting: Setting | None = None

    @property
    def label(self) -> str:
        name = f"{self.adapter.label} × {self.strength:g}" if self.adapter else "base"
        return f"{name} · {self.setting.label}" if self.setting else name

    @property
    def held(self) -> str:
        """Return what the layers hold if they hold what was asked for."""
        return f"{self.adapter.label} × {self.strength:g}" if self.adapter else "no adapter"


@dataclass(frozen=True)
class Row:
    """One image's worth of input, the same for every column."""

    prompt: str
    seed: int
    setting: Setting | None = None

    @property
    def note(self) -> str:
        """The words that stand beside the prompt."""
        return f"seed {self.seed} · {self.setting.label}" if self.setting else f"seed {self.seed}"

    @property
    def label(self) -> str:
        return f"{self.prompt} · {self.note}"


@dataclass(frozen=True)
class CompareRequest:
    """Two people who ask the same get the same images."""

    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    adapters: tuple[Adapter, ...] = ()
    strengths: tuple[float, ...] = (1.0,)
    placeholders: dict[str, tuple[str, ...]] = field(default_factory=dict)
    include_base: bool = True
    negative_prompt: str = ""
    num_inference_steps: int = 25
    guidance_scale: float = GUIDANCE
    scheduler: Scheduler = Scheduler.AS_SAVED
    rows_by: tuple[Setting, ...] = ()
    columns_by: tuple[Setting, ...] = ()
    strengths_first: bool = False  # columns of one strength stand side by side, instead of those of one adapter

    @property
    def rows(self) -> list[Row]:
        prompts = dict.fromkeys(p for template in self.prompts for p in filled(template, self.placeholders))
        return [Row(*parts) for parts in itertools.product(prompts, self.seeds, self.rows_by or (None,))]

    @property
    def columns(self) -> list[Column]:
        base: list[tuple[Adapter | None, float]] = [(None, 0.0)] if self.include_base else []
        if self.strengths_first:
            pairs = [(adapter, s) for s in self.strengths for adapter in self.adapters]
        else:
            pairs = [(adapter, s) for adapter in self.adapters for s in self.strengths]
        return [Column(*pair, setting) for pair in (*base, *pairs) for setting in self.columns_by or (None,)]

    def sampling(self, row: Row, column: Column) -> Sampling:
        """Return how the image in a row and column is denoised."""
        swept = {setting.axis: setting.value for setting in (row.setting, column.setting) if setting}
        return Sampling(
            swept.get(Axis.STEPS, self.num_inference_steps),
            swept.get(Axis.GUIDANCE, self.guidance_scale),
            swept.get(Axis.SCHEDULER, self.scheduler),
        )

    def to_dict(self) -> dict:
        """Return what a settings file holds. Adapters go by content: a path of this machine helps no other."""
        adapters = [{"label": a.label, "file": Path(a.path).name, "sha256": a.sha256} for a in self.adapters]
        return {"format_version": FORMAT_VERSION, **asdict(self), "adapters": adapters}

    @classmethod
    def from_dict(cls, data: object, paths: Mapping[str, str]) -> "CompareRequest":
        """Inverse of `to_dict`, for data that may come from anywhere; `paths` are the files at hand by sha256."""
        data = upgraded(data)
        problems = settings_problems(data)
        if problems:
            raise ValueError(joined("This is not a settings file of this app", problems))
        absent = [a["file"] for a in data.get("adapters", ()) if a["sha256"] not in paths]
        if absent:
            raise ValueError(joined("Add these adapter files first, then open the settings again", absent))
        values = {f.name: data[f.name] for f in fields(cls) if f.name in data}
        values |= {name: tuple(values[name]) for name in ("prompts", "seeds", "strengths") if name in values}
        values["adapters"] = tuple(
            Adapter(a["label"], paths[a["sha256"]], a["sha256"]) for a in values.get("adapters", ())
        )
        values["placeholders"] = {name: tuple(words) for name, words in values.get("placeholders", {}).items()}
        values["scheduler"] = Scheduler(values.get("scheduler", Scheduler.AS_SAVED))
        for name in ("rows_by", "columns_by"):
            values[name] = tuple(setting_of(said["axis"], said["value"]) for said in values.get(name, ()))
        return cls(**values)


def prompt_problems(request: CompareRequest, limits: Limits) -> list[str]:
    problems = [] if request.prompts else ["there is no prompt"]
    for prompt in (*request.prompts, request.negative_prompt):
        if len(prompt) > limits.prompt_characters:
            problems.append(f"a prompt has {len(prompt):,} characters; at most {limits.prompt_characters} are read")
    for name, values in request.placeholders.items():
        if not values:
            problems.append(f"the placeholder {{{name}}} has no values")
        if any(len(value) > limits.prompt_characters for value in values):
            problems.append(f"a value of {{{name}}} is longer than {limits.prompt_characters} characters")
    words = (request.negative_prompt, *(v for values in request.placeholders.values() for v in values))
    if not all(map(is_text, (*request.prompts, *words))):
        problems.append("a prompt or a value holds half of a surrogate pair, which is no character")
    for prompt in request.prompts:
        try:
            missing = [name for name in placeholder_names(prompt) if name not in request.placeholders]
        except ValueError as problem:
            problems.append(str(problem))
            continue
        if missing:
            problems.append(f"nothing fills {', '.join(f'{{{name}}}' for name in missing)} in {shortened(prompt)!r}")
    return problems


def image_count(request: CompareRequest) -> int:
    """Cells of a request whose prompts are sound. Prompts that come twice count once, unless there are more than
    MANY: ten thousand cost nothing to count."""
    templates = set(request.prompts)
    prompts = sum(math.prod(len(request.placeholders[name]) for name in placeholder_names(p)) for p in templates)
    if prompts <= MANY:
        prompts = len({prompt for template in templates for prompt in filled(template, request.placeholders)})
    columns = len(request.adapters) * len(request.strengths) + request.include_base
    return prompts * len(request.seeds) * columns * max(1, len(request.rows_by)) * max(1, len(request.columns_by))


def step_count(request: CompareRequest) -> int:
    """Denoising steps of all cells of a request whose prompts are sound."""

    def mean(settings: tuple[Setting, ...]) -> float | None:
        steps = [setting.value for setting in settings if setting.axis is Axis.STEPS]
        return sum(steps) / len(steps) if steps else None

    steps = mean(request.rows_by) or mean(request.columns_by) or request.num_inference_steps
    return round(image_count(request) * steps)


def sampling_problems(request: CompareRequest, limits: Limits) -> list[str]:
    """Problems with steps and guidance, those of the swept settings included."""
    found = []
    swept = (*request.rows_by, *request.columns_by)
    steps = [request.num_inference_steps, *(s.value for s in swept if s.axis is Axis.STEPS)]
    if bad := [value for value in steps if not 1 <= value <= limits.steps]:
        found.append(f"steps lie between 1 and {limits.steps}; got {shortened(str(bad[0]))}")
    guidance = [request.guidance_scale, *(s.value for s in swept if s.axis is Axis.GUIDANCE)]
    if bad := [value for value in guidance if not 0 <= value <= limits.guidance]:
        found.append(f"guidance lies between 0 and {limits.guidance:g}; got {shortened(str(bad[0]))}")
    axes = [{setting.axis for setting in settings} for settings in (request.rows_by, request.columns_by)]
    if max(map(len, axes)) > 1:
        found.append("rows and columns are swept along one setting each")
    if both := axes[0] & axes[1]:
        found.append(f"{', '.join(both)} is swept along rows and columns; wanted one of them")
    if len(set(swept)) < len(swept):
        found.append("a value of a swept setting comes twice")
    return found


def problems(request: CompareRequest, limits: Limits) -> list[str]:
    """Everything that is wrong with a request, in words."""
    found = prompt_problems(request, limits)
    if not request.seeds:
        found.append("there is no seed")
    if bad := [seed for seed in request.seeds if not 0 <= seed <= limits.seed]:
        found.append(f"seeds are whole numbers from 0 to {limits.seed}; got {shortened(str(bad[0]))}")
    if not request.adapters and not request.include_base:
        found.append("there is nothing to compare: choose an adapter, or the base")
    if len(request.adapters) > limits.adapters:
        found.append(f"{len(request.adapters)} adapters; at most {limits.adapters} fit into one comparison")
    labels = [adapter.label for adapter in request.adapters]
    if len(set(labels)) < len(labels):
        found.append(f"two adapters have one label: {', '.join(sorted(labels))}")
    if long := [label for label in labels if not 0 < len(label) <= limits.label_characters or not is_text(label)]:
        found.append(f"labels have 1 to {limits.label_characters} characters; got {shortened(long[0])!r}")
    if request.adapters and not request.strengths:
        found.append("there is no strength")
    if bad := [s for s in request.strengths if not 0 <= s <= limits.strength]:
        found.append(f"strengths lie between 0 and {limits.strength:g}; got {shortened(str(bad[0]))}")
    found += sampling_problems(request, limits)
    if not found and (count := image_count(request)) > limits.images:
        found.append(f"this asks for {count:,} images; at most {limits.images} are generated at once")
    return found


def checked(request: CompareRequest, limits: Limits) -> CompareRequest:
    """The request itself, if nothing is wrong with it."""
    if found := problems(request, limits):
        raise ValueError(joined("Nothing was generated", found))
    return request


def upgraded(data: object) -> object:
    """Settings of version 1 under the names of today's; anything else as it is."""
    if not isinstance(data, dict) or data.get("format_version") != 1:
        return data
    data = {"images" if name == "pictures" else name: value for name, value in data.items()}
    if isinstance(images := data.get("images"), list):
        renamed = {"painted_with": "generated_with"}
        data["images"] = [
            {renamed.get(name, name): value for name, value in said.items()} if isinstance(said, dict) else said
            for said in images
        ]
    return data | {"format_version": FORMAT_VERSION}


def settings_problems(data: object) -> list[str]:
    """Name what keeps data from being a `CompareRequest`: unknown names and wrong types.

    base, view and images are the page's: saved.py.
    """
    if not isinstance(data, dict):
        return ["it holds no object of names and values"]
    if data.get("format_version") != FORMAT_VERSION:
        return [f"format_version is {data.get('format_version')!r}; this app reads 1 to {FORMAT_VERSION}"]

    def lists(kind: type | tuple[type, ...]):
        return lambda v: isinstance(v, list | tuple) and all(isinstance(x, kind) and x is not True for x in v)

    def settings(value: object) -> bool:
        return lists(dict)(value) and all(x.keys() == {"axis", "value"} and is_setting(**x) for x in value)

    text = lists(str)
    wanted = {
        "prompts": (text, "a list of texts"),
        "seeds": (lists(int), "a list of whole numbers"),
        "strengths": (lambda v: isinstance(v, list | tuple) and all(map(is_number, v)), "a list of numbers"),
        "adapters": (
            lambda v: lists(dict)(v) and all(x.keys() == ADAPTER_NAMES and text([*x.values()]) for x in v),
            "a list of {label, file, sha256}",
        ),
        "placeholders": (
            lambda v: isinstance(v, dict) and all(text(words) for words in v.values()),
            "lists of texts by name",
        ),
        "include_base": (lambda v: isinstance(v, bool), "true or false"),
        "negative_prompt": (lambda v: isinstance(v, str), "a text"),
        "num_inference_steps": (lambda v: type(v) is int, "a whole number"),
        "guidance_scale": (is_number, "a number"),
        "scheduler": (lambda v: v in list(Scheduler), f"one of {', '.join(Scheduler)}"),
        "rows_by": (settings, "a list of {axis, value}"),
        "columns_by": (settings, "a list of {axis, value}"),
        "strengths_first": (lambda v: isinstance(v, bool), "true or false"),
        "base": (lambda v: isinstance(v, str), "a text"),
        "view": (lambda v: isinstance(v, dict), "an object"),
        "images": (lists(dict), "a list of objects"),
    }
    found = [f"{name} is not known" for name in data.keys() - wanted.keys() - {"format_version"}]
    found += [f"{name} is missing" for name in ("prompts", "seeds") if name not in data]
    found += [
        f"{name} is not {words}" for name, (fits, words) in wanted.items() if name in data and not fits(data[name])
    ]
    return found


def digests_in(data: object) -> set[str]:
    """sha256 of the adapters that settings name, as far as they are sound."""
    adapters = data.get("adapters") if isinstance(data, dict) else None
    rows = [row for row in adapters if isinstance(row, dict)] if isinstance(adapters, list) else []
    return {row["sha256"] for row in rows if isinstance(row.get("sha256"), str)}


def joined(head: str, found: list[str]) -> str:
    """One message for all problems; of very many, the first and how many more."""
    more = [f"{len(found) - MOST_SAID:,} more of the kind"] if len(found) > MOST_SAID else []
    return printable("\n".join([f"{head}:", *(f"  - {problem}" for problem in [*found[:MOST_SAID], *more])]))
