"""The components of a pipeline: configurations, names and shapes of all layers, read without loading a model.

    read_architecture   from JSON files and the headers of safetensors files, without torch; None if they do not suffice
    MetaPipeline        the same from components on the meta device, which takes seconds of imports

`model_checks` holds options against either.
"""

import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, NamedTuple

from ...utils.model_files import Files, Unknown
from ...utils.problems import BadInput
from ...utils.wording import all_of
from ..data.buckets import Grid
from ..options import DreamBoothOptions
from ..options.adapter import KOHYA
from .families import FAMILIES, Family, not_trained_here
from .families.clip import TEXT_ENCODER_LAYERS

UNBOUNDED = 2**31 - 1  # tokens of a prompt, where no text encoder can be trained
BLOCKS = "transformer_blocks"  # what --lora_blocks counts
FLAT_CLIP = (5, 6)  # version of transformers since which `CLIPTextModel` has no `text_model` inside
TEXT_ENCODERS = ("CLIPTextModel", "CLIPTextModelWithProjection")
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "out_proj")  # that every text encoder here has
EMBEDDINGS = ("token_embedding", "position_embedding", "class_embedding")
LINEAR, CONVOLUTION, EMBEDDING, NORM, BLOCK = "Linear", "Conv2d", "Embedding", "a norm", "a block"
KINDS = {1: NORM, 2: LINEAR, 4: CONVOLUTION}  # by the dimensions of a weight


class Layer(NamedTuple):
    """A module that has weights, or holds one that has."""

    kind: str
    shape: tuple[int, ...] = ()  # [out, in], of a convolution [out, in, kh, kw]

    @property
    def is_spatial(self) -> bool:
        """True for a convolution over more than one pixel."""
        return self.kind == CONVOLUTION and self.shape[2:] != (1, 1)

    @property
    def sides(self) -> tuple[int, int]:
        """Outputs and inputs of the matrix that an adapter adds to."""
        return self.shape[0], math.prod(self.shape[1:])


def make_layer(name: str, shape: tuple[int, ...] | None) -> Layer:
    """Describe a layer by its module's name and the shape of its weight."""
    if shape is None:
        return Layer(BLOCK)
    embeds = len(shape) == 2 and name.rpartition(".")[2] in EMBEDDINGS
    return Layer(EMBEDDING if embeds else KINDS.get(len(shape), "a layer"), shape)


def layers_of(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Layer]:
    """Every module that a model's tensors, by name, are in; in order of names, as files have no other."""
    modules = {tensor.rsplit(".", depth)[0] for tensor in shapes for depth in range(1, tensor.count(".") + 1)}
    return {name: make_layer(name, shapes.get(f"{name}.weight")) for name in sorted(modules)}


def matches(pattern: str, name: str) -> bool:
    """Return whether a pattern of ranks or alphas matches a layer, as PEFT matches it."""
    return re.match(rf"(.*\.)?({pattern})$", name) is not None


def ends_of(name: str) -> list[str]:
    """`a.b.c`, `b.c` and `c` of a layer `a.b.c`: the targets that mean it."""
    parts = name.split(".")
    return [".".join(parts[start:]) for start in range(len(parts))]


def is_target(name: str, targets: Collection[str]) -> bool:
    """Return whether a layer is a target, as PEFT matches lists of target modules."""
    return any(end in targets for end in ends_of(name))


def blocks_of(options: DreamBoothOptions) -> list[int]:
    """`--lora_blocks`."""
    return options.lora_blocks or []


def rank_of(options: DreamBoothOptions, name: str, layer: Layer) -> int:
    """The rank of an adapted layer."""
    default = (options.conv_rank if layer.is_spatial else None) or options.rank
    return next((rank for pattern, rank in dict(options.rank_pattern).items() if matches(pattern, name)), default)


def family_of(index: Mapping[str, Any], name: str) -> Family:
    """The family that a pipeline's `model_index.json` names; raises `BadInput`."""
    kind = index.get("_class_name")
    if kind not in FAMILIES:
        wanted = ", ".join(f"{family.title} ({kind})" for kind, family in FAMILIES.items())
        missing = ", ".join(not_trained_here())
        raise BadInput(
            [
                f"--pretrained_model_name_or_path: {name} is a {kind}; wanted {wanted}. Of diffusers' text-to-image "
                f"pipelines that load LoRAs, these are not trained here: {missing}"
            ]
        )
    return FAMILIES[kind]


def left_out(options: DreamBoothOptions, family: Family, part: str, hidden_layers: int) -> int:
    """Return the number of a text encoder's last layers that `--skip_clip_layers` leaves out; raises `BadInput`."""
    count = 0 if "skip_clip_layers" in family.not_here else max(0, options.skip_clip_layers or 0)
    if count >= hidden_layers:
        raise BadInput([f"--skip_clip_layers: got {count}, wanted less than the {hidden_layers} layers of the {part}"])
    return count


def number_of(tensor: str) -> int:
    """The number of the layer that a text encoder's tensor is in; -1 outside of the layers."""
    layer = re.search(r"encoder\.layers\.(\d+)\.", tensor)
    return int(layer[1]) if layer else -1


@dataclass(frozen=True)
class Architecture:
    """Configurations, and layers by component: those of the denoiser and of every text encoder that can be trained."""

    family: Family
    denoiser_config: Mapping[str, Any]
    layers: Mapping[str, Mapping[str, Layer]]
    vae: Mapping[str, Any]
    other_vae: Mapping[str, Any] | None
    prediction_type: str
    max_length: int

    @property
    def vae_scale_factor(self) -> int:
        """Pixels to a latent."""
        return self.family.vae_scale_factor(self.vae)

    @property
    def grid(self) -> Grid:
        return self.family.grid(self.denoiser_config, self.vae_scale_factor)

    def targets(self, options: DreamBoothOptions) -> dict[str, list[str]]:
        """Target modules of each component that is trained."""
        part = self.family.denoiser
        found = {part: self.named(options.target_modules or self.family.default_targets(self.denoiser_config))}
        if options.conv_rank:
            found[part] += self.inside(self.family.convolutions)
        if options.lora_blocks:
            inside = tuple(f"{BLOCKS}.{block}." for block in blocks_of(options))
            found[part] = [
                name for name in self.layers[part] if name.startswith(inside) and is_target(name, found[part])
            ]
        if options.train_text_encoder:
            names = [
                name
                for target in options.text_encoder_target_modules
                for name in TEXT_ENCODER_LAYERS.get(target, [target])
            ]
            found |= dict.fromkeys(self.family.text_encoders, names)
        return found

    def adapted(self, options: DreamBoothOptions) -> Iterator[tuple[str, str, Layer]]:
        """(component, name, layer) of everything that an adapter is put on."""
        for component, targets in self.targets(options).items():
            wanted = frozenset(targets)
            for name, layer in self.layers[component].items():
                if is_target(name, wanted):
                    yield component, name, layer

    def adapter_size(self, options: DreamBoothOptions) -> int:
        """The number of trained parameters."""
        return sum(rank_of(options, name, layer) * sum(layer.sides) for _, name, layer in self.adapted(options))

    def new_token_size(self, options: DreamBoothOptions) -> int:
        """The number of values of new tokens, without those of T5, whose layers are not known here."""
        widths = [
            layer.shape[1]
            for part in self.family.text_encoders
            for name, layer in self.layers[part].items()
            if name.rpartition(".")[2] == EMBEDDINGS[0]
        ]
        return len(all_of(options.new_tokens)) * sum(widths)

    def named(self, targets: Iterable[str]) -> list[str]:
        """Target modules of the denoiser, with the layers that kohya's scripts train in place of `kohya`."""
        return [
            name for target in targets for name in (self.inside(self.family.of_kohya) if target == KOHYA else [target])
        ]

    def inside(self, stacks: Iterable[str]) -> list[str]:
        """The denoiser's linear layers and convolutions in stacks of these names, such as "attentions"."""
        own = self.layers[self.family.denoiser].items()
        return [
            name
            for name, layer in own
            if layer.kind in (LINEAR, CONVOLUTION) and any(f".{stack}." in f".{name}" for stack in stacks)
        ]

    def patterns(self, component: str, options: DreamBoothOptions) -> dict[str, dict[str, Any]]:
        """`rank_pattern` and `alpha_pattern` with those of the convolutions that `--conv_rank` is for."""
        ranks, alphas = dict(options.rank_pattern), dict(options.alpha_pattern)
        if options.conv_rank and component == self.family.denoiser:
            spatial = [f"^{re.escape(name)}" for _, name, layer in self.adapted(options) if layer.is_spatial]
            ranks |= dict.fromkeys(spatial, options.conv_rank)  # behind the user's own: the first that matches counts
            alphas |= dict.fromkeys(spatial, float(options.conv_alpha or options.conv_rank))
        return {"rank_pattern": ranks, "alpha_pattern": alphas}


def read_architecture(options: DreamBoothOptions) -> Architecture | None:
    """None where the files on this machine do not tell, or not in the layout that the families have.

    Raises:
        BadInput: the pipeline is not of a family that is trained here.
    """
    files = Files(options.config_source, options.revision)
    try:
        index = files.json("model_index.json")
        family = family_of(index, files.name)
        configs = {part: files.json(f"{part}/config.json") for part in (family.denoiser, *family.text_encoders)}
        layers = {family.denoiser: layers_of(files.shapes(family.denoiser, options.variant))}
        for part in family.text_encoders:
            shapes = as_installed(files.shapes(part, options.variant), index[part][1])
            hidden = configs[part]["num_hidden_layers"]
            last = hidden - left_out(options, family, part, hidden)
            layers[part] = layers_of({name: shape for name, shape in shapes.items() if number_of(name) < last})
        other = options.pretrained_vae_model_name_or_path
        architecture = Architecture(
            family,
            configs[family.denoiser],
            layers,
            vae=files.json("vae/config.json"),
            other_vae=Files(other, None).json("config.json") if other else None,
            prediction_type=options.prediction_type
            or files.json("scheduler/scheduler_config.json").get("prediction_type", "epsilon"),
            max_length=min(
                (configs[part]["max_position_embeddings"] for part in family.text_encoders), default=UNBOUNDED
            ),
        )
        return architecture if is_understood(architecture) else None
    except BadInput:
        raise
    except (Unknown, OSError, ValueError, LookupError, TypeError, AttributeError):  # the libraries may know better
        return None


def is_understood(found: Architecture) -> bool:
    """Return whether everything is there that is asked of it, under the names that it is asked by."""
    wanted = {found.family.denoiser: found.family.target_modules}
    wanted |= dict.fromkeys(found.family.text_encoders, PROJECTIONS)
    named = all(
        any(layer.kind == LINEAR and is_target(name, [target]) for name, layer in found.layers[component].items())
        for component, targets in wanted.items()
        for target in targets
    )
    return named and bool(found.grid and found.denoiser_config["in_channels"] and found.family.vae_channels(found.vae))


def as_installed(shapes: Mapping[str, tuple[int, ...]], kind: str) -> dict[str, tuple[int, ...]]:
    """Shapes under the names that the modules have once loaded: since transformers 5.6 the layers of `CLIPTextModel`
    are right under it; files have them one level deeper, and load all the same."""
    if kind not in TEXT_ENCODERS:
        raise Unknown(kind)
    if kind != "CLIPTextModel":
        return dict(shapes)
    installed = tuple(int(part) for part in version("transformers").split(".")[:2])
    level = "" if installed >= FLAT_CLIP else "text_model."
    return {level + name.removeprefix("text_model."): shape for name, shape in shapes.items()}
