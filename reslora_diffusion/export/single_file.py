"""A whole pipeline in one .safetensors file, with the original names of its tensors: what most people have.

    read_single_file(path)   what it is, from its header alone, without torch; or why it is no base
    load_single_file(...)    the pipeline, by diffusers' `from_single_file`

Configurations and tokenizers are not in such a file: they are those of a pipeline in diffusers' format (`config`), by
default the one of the hub that the family began with.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ..utils.model_files import Unknown, shapes_in
from ..utils.problems import BadInput, listing
from .header import open_safetensors

SUFFIXES = (".safetensors", ".sft")
NESTED = "model.diffusion_model."  # before the names of a denoiser, where text encoders and autoencoder are there too
UNET = f"{NESTED}input_blocks.0.0.weight"
SD_3, FLUX = "joint_blocks.0.context_block.adaLN_modulation.1.bias", "double_blocks.0.img_attn.norm.key_norm.scale"
# Names that only other models have, and what they are.
OTHERS = {
    "double_layers.0.attn.w2q.weight": "an AuraFlow model",
    "distilled_guidance_layer.in_proj.bias": "a Chroma model",
    "single_stream_modulation.lin.weight": "a FLUX.2 model",
    "cap_embedder.0.weight": "a Lumina or Z-Image model",
    "blocks.0.cross_attn.q_linear.weight": "a SANA or PixArt model",
    "head.modulation": "a Wan model",
    "txt_in.individual_token_refiner.blocks.0.adaLN_modulation.1.bias": "a HunyuanVideo model",
    "transformer_blocks.0.attn.add_q_proj.weight": "a transformer in diffusers' layout",
    "down_blocks.0.resnets.0.conv1.weight": "a UNet in diffusers' layout",
    "control_model.time_embed.0.weight": "a ControlNet",
}
SCALED = ("scaled_fp8", ".scale_weight", ".weight_scale", ".comfy_quant")  # as ComfyUI names them
WANTED = "wanted a whole Stable Diffusion 1.x, 2.x, XL, 3 or FLUX.1 checkpoint"


@dataclass(frozen=True)
class SingleFile:
    """What a checkpoint is.

    Attributes:
        pipeline_class: of diffusers.
        config: the hub's pipeline whose configurations are used by default.
        prediction_type: what the file itself says of it; None where it does not.
        zero_terminal_snr: whether the file says that its last timestep has no signal.
        whole: whether text encoders and autoencoder are in it.
        stored: the precision of most of its numbers, as safetensors names it.
    """

    path: Path
    pipeline_class: str
    config: str
    prediction_type: str | None = None
    zero_terminal_snr: bool = False
    whole: bool = True
    stored: str = "F32"


def is_single_file(name: str | None) -> bool:
    return bool(name) and Path(str(name)).is_file()


def read_single_file(path: str | Path) -> SingleFile:
    """What a checkpoint is, from the names and shapes of its tensors.

    Raises:
        BadInput: it is no base, and what it is instead.
    """
    path = Path(path)
    try:
        if path.suffix.lower() not in SUFFIXES:
            raise ValueError(f"{path} is a single file of another kind; wanted one named {' or '.join(SUFFIXES)}")
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
    return replace(known(path, shapes, metadata), stored=kinds.most_common(1)[0][0])


def no_base(shapes: dict[str, tuple[int, ...]]) -> str | None:
    """Why a file of these tensors is no base; None if it is one."""
    inner = {name.removeprefix(NESTED) for name in shapes}
    if any("lora_" in name or ".lora." in name or name.endswith((".hada_w1_a", ".lokr_w1")) for name in shapes):
        return "is a LoRA, which is trained on a base; it can be a start: --network_weights (with --method lora)"
    if any(name.endswith(SCALED) for name in shapes):
        return f"is quantised with scales of its own (scaled fp8), which diffusers would leave out; {WANTED}"
    for name, what in OTHERS.items():
        if name in inner:
            return f"is {what}; {WANTED}"
    if UNET in shapes:
        channels = shapes[UNET][1]
        if any(name.startswith("conditioner.embedders.0.model.") for name in shapes):
            return f"is the refiner of SDXL; {WANTED}"
        if channels in (8, 9):
            return f"is a model for {'inpainting' if channels == 9 else 'editing'}: its UNet takes {channels} channels"
        encoders = ("cond_stage_model.", "conditioner.embedders.")
        return None if any(n.startswith(encoders) for n in shapes) else f"holds a UNet without text encoders; {WANTED}"
    if SD_3 in inner:
        return None
    if FLUX in inner:
        channels = next(shape[1] for name, shape in shapes.items() if name.removeprefix(NESTED) == "img_in.weight")
        return f"is FLUX.1 Fill or a control model: it takes {channels} channels" if channels in (384, 128) else None
    if any("quant_conv" in name or name.startswith(("first_stage_model.", "encoder.down")) for name in shapes):
        return "is an autoencoder; it goes to --pretrained_vae_model_name_or_path, as a folder in diffusers' format"
    if any("text_model.encoder" in name or name.startswith("encoder.block") for name in shapes):
        return f"is a text encoder; {WANTED}"
    return f"is of no family that is known here (it holds {listing(sorted(shapes), 3)}); {WANTED}"


def known(path: Path, shapes: dict[str, tuple[int, ...]], metadata: dict[str, str]) -> SingleFile:
    """What a base is that `no_base` has nothing against."""
    inner = {name.removeprefix(NESTED) for name in shapes}
    if SD_3 in inner:
        large = any(name.startswith("joint_blocks.37.") for name in inner)
        config = "stabilityai/stable-diffusion-3.5-large" if large else "stabilityai/stable-diffusion-3.5-medium"
        if not large and shapes.get(f"{NESTED}pos_embed", shapes.get("pos_embed", (0, 0)))[1] == 36864:
            config = "stabilityai/stable-diffusion-3-medium-diffusers"
        whole = any(name.startswith("text_encoders.clip_l.") for name in shapes)
        return SingleFile(path, "StableDiffusion3Pipeline", config, whole=whole)
    if FLUX in inner:
        guided = "guidance_in.in_layer.bias" in inner
        config = f"black-forest-labs/FLUX.1-{'dev' if guided else 'schnell'}"
        return SingleFile(path, "FluxPipeline", config, whole=False)
    said = metadata.get("modelspec.prediction_type")
    velocity = "v_pred" in shapes or said == "v"
    own_type = "v_prediction" if velocity else "epsilon" if said == "epsilon" else None
    prediction = {"prediction_type": own_type, "zero_terminal_snr": "ztsnr" in shapes}
    if any(name.startswith("conditioner.embedders.1.") for name in shapes):
        own = prediction if velocity else prediction | {"prediction_type": "epsilon"}
        return SingleFile(path, "StableDiffusionXLPipeline", "stabilityai/stable-diffusion-xl-base-1.0", **own)  # type: ignore[arg-type]
    second = any(name.startswith("cond_stage_model.model.") for name in shapes)
    config = "stabilityai/stable-diffusion-2-1" if second else "stable-diffusion-v1-5/stable-diffusion-v1-5"
    return SingleFile(path, "StableDiffusionPipeline", config, **prediction)  # type: ignore[arg-type]


def load_single_file(found: SingleFile, config: str, dtype: Any, **given: Any) -> Any:
    """The pipeline of a file.

    Args:
        config: folder or hub name of a pipeline in diffusers' format; what the file lacks (text encoders and
            autoencoder of FLUX.1, T5) is loaded from there.
        given: components that are to be used in place of the file's, or None for those to leave out.
    """
    import diffusers

    kind: Any = getattr(diffusers, found.pipeline_class)
    if found.whole:
        local = {"local_files_only": True} if Path(config).is_dir() else {}
        return as_said(found, kind.from_single_file(str(found.path), config=config, dtype=dtype, **local, **given))
    part: Any = {"FluxPipeline": "FluxTransformer2DModel"}.get(found.pipeline_class, "SD3Transformer2DModel")
    denoiser = getattr(diffusers, part).from_single_file(
        str(found.path), config=config, subfolder="transformer", dtype=dtype
    )
    return kind.from_pretrained(config, transformer=denoiser, dtype=dtype, **given)


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
    with TemporaryDirectory(dir=beside, prefix=".base-") as folder:
        pipeline.save_pretrained(folder)
        del pipeline
        yield folder
