"""Options on the model that is trained on, and on how it is computed."""

from dataclasses import dataclass

from ...utils.options import option

# Families of models, by the class of their pipelines in diffusers.
XL, SD3, FLUX = "StableDiffusionXLPipeline", "StableDiffusion3Pipeline", "FluxPipeline"
QWEN, Z_IMAGE, FLUX_2, KLEIN = "QwenImagePipeline", "ZImagePipeline", "Flux2Pipeline", "Flux2KleinPipeline"
SANA, LUMINA_2, CHROMA, AURA_FLOW = "SanaPipeline", "Lumina2Pipeline", "ChromaPipeline", "AuraFlowPipeline"
# Those whose only text encoder is never trained.
FROZEN_TEXT = (QWEN, Z_IMAGE, FLUX_2, KLEIN, SANA, LUMINA_2, CHROMA, AURA_FLOW)
FAMILY_TITLES = {XL: "SDXL", SD3: "SD3", FLUX: "FLUX.1", QWEN: "Qwen-Image", Z_IMAGE: "Z-Image"}
FAMILY_TITLES |= {FLUX_2: "FLUX.2", KLEIN: "FLUX.2 klein", SANA: "SANA", LUMINA_2: "Lumina 2", CHROMA: "Chroma"}
FAMILY_TITLES |= {AURA_FLOW: "AuraFlow"}
PRECISIONS = ("no", "fp16", "bf16")
QUANTISATIONS = ("nf4", "int8", "int8wo", "float8wo", "int4wo")  # see `quantisation`


@dataclass
class ModelOptions:
    """Model."""

    pretrained_model_name_or_path: str | None = option(
        None,
        "Folder or hub name of a pipeline in diffusers' format, or one .safetensors file: Stable Diffusion, or the "
        "transformer of FLUX.1 and newer families, whose other parts --base_config has.",
        binds=True,
    )
    base_config: str | None = option(
        None,
        "Of a base that is one file: folder or hub name of a pipeline whose configurations and tokenizers it has "
        "(default: the one of the hub that its family began with).",
    )
    revision: str | None = option(None, "Revision of the model on the hub.")
    variant: str | None = option(None, "Variant of the weight files, such as fp16.")
    pretrained_vae_model_name_or_path: str | None = option(
        None,
        "Folder or hub name of an autoencoder with the same latents, such as SDXL's for fp16.",
        kohya={"vae": "a folder in diffusers' format"},
    )
    tokenizer_name: str | None = option(None, "Folder or hub name of a tokenizer in place of the pipeline's first one.")
    tokenizer_max_length: int | None = option(
        None,
        "Tokens of a prompt (default: the tokenizer's own number).",
        at_least=1,
    )
    max_token_length: int | None = option(
        None,
        "Stable Diffusion 1.x, 2.x, XL: read prompts of 150 or 225 tokens, in pieces of 75 (default: 75).",
        choices=(75, 150, 225),
        binds=True,
    )
    max_sequence_length: int | None = option(
        None,
        "Tokens of a prompt that T5 or a language model reads (default: SD3 77, Lumina 2 and AuraFlow 256, SANA "
        "300, others 512).",
        at_least=1,
        binds=True,
        kohya={"t5xxl_max_token_length": "", "gemma2_max_token_length": ""},
    )
    skip_t5: bool = option(
        False, "Train SD3 without T5, its largest text encoder; its files may be absent.", binds=True
    )
    skip_clip_layers: int | None = option(
        None,
        "Stable Diffusion 1.x and 2.x: leave out this many of CLIP's last layers: 1 is diffusers' clip_skip=1 and "
        "kohya's --clip_skip 2.",
        at_least=1,
        binds=True,
    )
    mixed_precision: str | None = option(
        None,
        "Precision of the frozen base; adapters are always float32 (default: that of `accelerate launch`).",
        choices=PRECISIONS,
        in_header=True,
    )
    quantization: str | None = option(
        None,
        "Hold the frozen denoiser in fewer bits: nf4 or int8 by bitsandbytes, int8wo, float8wo or int4wo by torchao.",
        choices=QUANTISATIONS,
        binds=True,
        in_header=True,
    )
    gradient_checkpointing: bool = option(
        False, "Recompute activations in the backward pass: less memory, slower steps."
    )
    enable_xformers_memory_efficient_attention: bool = option(
        False, "Compute attention by the package xformers.", kohya={"xformers": ""}
    )
    allow_tf32: bool = option(False, "Faster float32 products on NVIDIA GPUs since Ampere.")
    fused_attention: bool | None = option(
        None, "Compute the adapters of q, k and v of one attention in one product (default: on a GPU)."
    )
    low_memory_layers: bool | None = option(None, "Frozen layers save less for the backward pass (default: on a GPU).")
    compile: bool = option(
        False,
        "Compile the model by torch.compile: the first step is slow, later ones are faster.",
        kohya={"torch_compile": ""},
    )
    cuda_graph: bool = option(
        False, "Launch each step as a whole, as a CUDA graph: for small batches; takes more memory."
    )
    local_rank: int = option(-1, "Number of this process on its machine; launchers set it.", recorded=False)
