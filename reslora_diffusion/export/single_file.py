"""A whole pipeline in one .safetensors file, with the original names of its tensors: what most people have.

    read_single_file(path)   what it is, from its header alone, without torch; or why it is no base
    load_single_file(...)    the pipeline, by diffusers' `from_single_file`

Configurations and tokenizers are not in such a file: they are those of a pipeline in diffusers' format (`config`), by
default the one of the hub that the family began with.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ..utils.model_files import Unknown, shapes_in
from ..utils.problems import BadInput, listing
from .embeddings_header import stored_rows
from .header import open_safetensors
from .model_names import (
    ANYWAY,
    NESTED,
    OTHERS,
    TEXT_ENCODERS,
    Transformer,
    is_autoencoder,
    is_text_encoder,
    transformer_of,
)

SUFFIXES = (".safetensors", ".sft")
PICKLE = (
    "a pickle, which is never opened here; StableDiffusionPipeline.from_single_file(FILE).save_pretrained(FOLDER) "
    "makes a base of one that you trust"
)
OTHER_FILES = {
    ".gguf": "a GGUF file, whose weights are packed for inference",
    **dict.fromkeys((".ckpt", ".pt", ".pth", ".bin"), PICKLE),
}
UNET = f"{NESTED}input_blocks.0.0.weight"
SCALED = ("scaled_fp8", ".scale_weight", ".weight_scale", ".comfy_quant")  # as ComfyUI names them
WANTED = (
    "wanted a whole Stable Diffusion 1.x, 2.x, XL or 3 checkpoint, or the transformer of SD3, FLUX.1, FLUX.2, Chroma, "
    "Qwen-Image, Z-Image or Lumina 2"
)
SECOND = "stabilityai/stable-diffusion-2-1"
MEDIUM_2024, KLEIN_9B = 36864, 4096  # positions of SD3 medium, where 3.5 medium has more; width of the larger klein


@dataclass(frozen=True)
class SingleFile:
    """The description of a checkpoint.

    Attributes:
        pipeline_class: of diffusers.
        config: the hub's pipeline whose configurations are used by default.
        prediction_type: what the file itself says of it; None where it does not.
        zero_terminal_snr: whether the file says that its last timestep has no signal.
        whole: whether text encoders are in it.
        has_vae: whether the autoencoder is in it.
        denoiser_class: of diffusers, of a file that is a transformer alone.
        stored: the precision of most of its numbers, as safetensors names it.
    """

    path: Path
    pipeline_class: str
    config: str
    prediction_type: str | None = None
    zero_terminal_snr: bool = False
    whole: bool = True
    has_vae: bool = True
    denoiser_class: str = ""
    stored: str = "F32"

    @property
    def unsaid(self) -> bool:
        """Return whether a family has models of either prediction, and the file does not say which this is."""
        return self.config == SECOND and self.prediction_type is None


def is_single_file(name: str | None) -> bool:
    return bool(name) and Path(str(name)).is_file()


def read_single_file(path: str | Path) -> SingleFile:
    """Describe a checkpoint by the names and shapes of its tensors.

    Raises:
        BadInput: it is no base, and what it is instead.
    """
    path = Path(path)
    try:
        if path.suffix.lower() not in SUFFIXES:
            what = OTHER_FILES.get(path.suffix.lower(), "a single file of another kind")
            raise ValueError(f"{path} is {what}; wanted one named {' or '.join(SUFFIXES)}")
        with open_safetensors(path, framework="np") as file:
            metadata = dict(file.metadata() or {})
            kinds = Counter(file.get_slice(name).get_dtype() for name in file.keys())  # noqa: SIM118 (no mapping)
        shapes = shapes_in(path)
    except Unknown as error:
        raise BadInput([f"{path} is quantised, or its header cannot be read; {WANTED}"]) from error
    except (OSError, ValueError) as error:
        raise BadInput([str(error)]) from error
    if (reason := no_base(shapes)) is not None:
        raise BadInput([f"{path} {reason}"])
    has_vae = any(name.startswith("first_stage_model.") for name in shapes)
    return replace(known(path, shapes, metadata), has_vae=has_vae, stored=kinds.most_common(1)[0][0])


def no_base(shapes: dict[str, tuple[int, ...]]) -> str | None:
    """Return why a file of these tensors cannot be a base; None if it can."""
    inner = {name.removeprefix(NESTED) for name in shapes}
    if any("lora_" in name or ".lora." in name or name.endswith((".hada_w1_a", ".lokr_w1")) for name in shapes):
        return "is a LoRA, which is trained on a base; it can be a start: --network_weights (with --method lora)"
    if any(name.endswith(SCALED) for name in shapes):
        return f"is quantised with scales of its own (scaled fp8), which diffusers would leave out; {WANTED}"
    if stored_rows(shapes) is not None:
        return f"is an embedding of a token (textual inversion); {WANTED}"
    transformer = transformer_of(inner)
    for name, what in OTHERS.items():
        if name in inner and (transformer is None or name in ANYWAY):
            return f"is {what}; {WANTED}"
    if UNET in shapes:
        channels = shapes[UNET][1]
        if any(name.startswith("conditioner.embedders.0.model.") for name in shapes):
            return f"is the refiner of SDXL; {WANTED}"
        if channels in (8, 9):
            return f"is a model for {'inpainting' if channels == 9 else 'editing'}: its UNet takes {channels} channels"
        return (
            None
            if any(n.startswith(TEXT_ENCODERS) for n in shapes)
            else f"holds a UNet without text encoders; {WANTED}"
        )
    if transformer and transformer.pipeline_class == "FluxPipeline":
        channels = next(shape[1] for name, shape in shapes.items() if name.removeprefix(NESTED) == "img_in.weight")
        return f"is FLUX.1 Fill or a control model: it takes {channels} channels" if channels in (384, 128) else None
    if transformer:
        return None
    if is_autoencoder(shapes):
        return "is an autoencoder; it goes to --pretrained_vae_model_name_or_path, as a folder in diffusers' format"
    if "input_blocks.0.0.weight" in inner:
        return f"holds a UNet without text encoders; {WANTED}"
    if not shapes:
        return f"holds no tensors; {WANTED}"
    if is_text_encoder(shapes):
        return f"is a text encoder; {WANTED}"
    return f"is of no family that is known here (it holds {listing(sorted(shapes), 3)}); {WANTED}"


def known(path: Path, shapes: dict[str, tuple[int, ...]], metadata: dict[str, str]) -> SingleFile:
    """Describe a base that `no_base` accepts."""
    inner = {name.removeprefix(NESTED): shape for name, shape in shapes.items()}
    if kind := transformer_of(inner):
        return transformer_alone(path, kind, inner)
    said = metadata.get("modelspec.prediction_type")
    velocity = "v_pred" in shapes or said == "v"
    own_type = "v_prediction" if velocity else "epsilon" if said == "epsilon" else None
    prediction = {"prediction_type": own_type, "zero_terminal_snr": "ztsnr" in shapes}
    if any(name.startswith("conditioner.embedders.1.") for name in shapes):
        own = prediction if velocity else prediction | {"prediction_type": "epsilon"}
        return SingleFile(path, "StableDiffusionXLPipeline", "stabilityai/stable-diffusion-xl-base-1.0", **own)  # type: ignore[arg-type]
    second = any(name.startswith("cond_stage_model.model.") for name in shapes)
    config = SECOND if second else "stable-diffusion-v1-5/stable-diffusion-v1-5"
    return SingleFile(path, "StableDiffusionPipeline", config, **prediction)  # type: ignore[arg-type]


def transformer_alone(path: Path, kind: Transformer, shapes: Mapping[str, tuple[int, ...]]) -> SingleFile:
    """Describe a file that holds a transformer; of SD3, text encoders and autoencoder may be there too."""
    pipeline_class, config, whole = kind.pipeline_class, kind.config, False
    if pipeline_class == "StableDiffusion3Pipeline":
        if any(name.startswith("joint_blocks.37.") for name in shapes):
            config = "stabilityai/stable-diffusion-3.5-large"
        elif shapes.get("pos_embed", (0, 0))[1] == MEDIUM_2024:
            config = "stabilityai/stable-diffusion-3-medium-diffusers"
        whole = any(name.startswith("text_encoders.clip_l.") for name in shapes)
    elif pipeline_class == "FluxPipeline" and "guidance_in.in_layer.bias" in shapes:
        config = "black-forest-labs/FLUX.1-dev"
    elif pipeline_class == "Flux2KleinPipeline" and "guidance_in.in_layer.weight" in shapes:
        pipeline_class, config = "Flux2Pipeline", "black-forest-labs/FLUX.2-dev"
    elif pipeline_class == "Flux2KleinPipeline" and shapes["txt_in.weight"][0] == KLEIN_9B:
        config = "black-forest-labs/FLUX.2-klein-9B"
    return SingleFile(path, pipeline_class, config, whole=whole, denoiser_class=kind.denoiser_class)


def load_single_file(
    found: SingleFile, config: str, dtype: Any, of_transformer: Mapping[str, Any] | None = None, **given: Any
) -> Any:
    """The pipeline of a file.

    Raises:
        ValueError: the file lacks weights that a model of this configuration has.

    Args:
        config: folder or hub name of a pipeline in diffusers' format; what the file lacks (text encoders and
            autoencoder of a transformer, T5) is loaded from there.
        of_transformer: what a file that is a transformer alone is loaded with besides, such as a quantisation.
        given: components that are to be used in place of the file's, or None for those to leave out.
    """
    import diffusers

    kind: Any = getattr(diffusers, found.pipeline_class)
    try:
        if found.whole:
            local = {"local_files_only": True} if Path(config).is_dir() else {}
            if not found.has_vae and "vae" not in given:
                given["vae"] = diffusers.AutoencoderKL.from_pretrained(config, subfolder="vae", dtype=dtype)
            whole = kind.from_single_file(str(found.path), config=config, dtype=dtype, **local, **given)
            return as_said(found, complete(whole, config))
        denoiser = getattr(diffusers, found.denoiser_class).from_single_file(
            without_prefix(found.path), config=config, subfolder="transformer", dtype=dtype, **(of_transformer or {})
        )
    except (NotImplementedError, KeyError) as error:  # a tensor has no values, or a converter misses a name
        named = f": {error}" if isinstance(error, KeyError) else ""
        raise ValueError(f"it lacks weights that the model of {config} has{named}") from error
    return kind.from_pretrained(config, transformer=denoiser, dtype=dtype, **given)


def complete(pipeline: Any, config: str) -> Any:
    """The pipeline, if every weight has values; raises `ValueError` with those that have none."""
    models = {name: part for name, part in pipeline.components.items() if hasattr(part, "named_parameters")}
    empty = [f"{name}.{path}" for name, model in models.items() for path, p in model.named_parameters() if p.is_meta]
    if empty:
        raise ValueError(f"it lacks {len(empty)} weights that the model of {config} has: {listing(empty, 2)}")
    return pipeline


def without_prefix(path: Path) -> Any:
    """A transformer's file as diffusers reads it: the path, or where names have the prefix of a whole checkpoint, which
    diffusers takes off for some families only, the tensors without it."""
    with open_safetensors(path, framework="np") as file:
        nested = any(name.startswith(NESTED) for name in file.keys())  # noqa: SIM118 (no mapping)
    if not nested:
        return str(path)
    from safetensors.torch import load_file

    return {name.removeprefix(NESTED): tensor for name, tensor in load_file(path).items()}


def as_said(found: SingleFile, pipeline: Any) -> Any:
    """The pipeline with the scheduler that the file asks for, whatever the configuration says."""
    if found.prediction_type is not None:
        said: dict[str, Any] = {"prediction_type": found.prediction_type}
        if found.zero_terminal_snr:
            said |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
        pipeline.scheduler = pipeline.scheduler.from_config(pipeline.scheduler.config, **said)
    return pipeline


def config_of(base: str, config: str | None) -> str:
    """Folder or hub name of a base's configurations; raises `BadInput` for a file that is no base."""
    return (config or read_single_file(base).config) if is_single_file(base) else base


@contextmanager
def as_folder(base: str, config: str | None, beside: Path) -> Iterator[str]:
    """Inside, a base of one file is a folder in diffusers' layout, made in `beside`; any other base is what it is.

    Raises:
        ValueError: the file cannot be loaded with these configurations.
    """
    if not is_single_file(base):
        yield base
        return
    import torch

    found = read_single_file(base)
    source = config_of(base, config)
    without = {"safety_checker": None} if found.pipeline_class == "StableDiffusionPipeline" else {}
    precisions = {"F16": torch.float16, "F32": torch.float32, "F64": torch.float32}
    dtype = precisions.get(found.stored, torch.bfloat16)  # fp8 has fewer digits than bf16
    try:
        pipeline = load_single_file(found, source, dtype, **without)
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"{base} cannot be loaded with the configurations of {source}: {error}") from error
    beside.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=beside, prefix=".base-") as folder:
        pipeline.save_pretrained(folder)
        del pipeline
        yield folder
