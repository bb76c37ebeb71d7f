"""Tiny pipelines, with random weights, of the families whose only text encoder is never trained.

Tokens are bytes, with the special tokens and the chat template of Qwen, or letters, with the special tokens of Gemma.
"""

import functools
import string
from collections.abc import Callable, Sized
from pathlib import Path

import torch
from diffusers import (
    AuraFlowPipeline,
    AuraFlowTransformer2DModel,
    AutoencoderDC,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    ChromaPipeline,
    ChromaTransformer2DModel,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from tokenizers import pre_tokenizers
from transformers import (
    Gemma2Config,
    Gemma2Model,
    GemmaTokenizer,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    UMT5Config,
    UMT5EncoderModel,
)

from tiny import FLUX_BLOCKS, tiny_t5, tiny_vae

WIDTH = 16
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if not enable_thinking %}<think>\n\n</think>\n\n"
    "{% endif %}{% endif %}"
)


def qwen_tokenizer() -> Qwen2Tokenizer:
    vocab = {token: i for i, token in enumerate([*sorted(pre_tokenizers.ByteLevel.alphabet()), *SPECIAL])}
    tokenizer = Qwen2Tokenizer(
        vocab=vocab, merges=[], pad_token=SPECIAL[0], eos_token=SPECIAL[2], extra_special_tokens=[SPECIAL[1]]
    )
    tokenizer.chat_template = CHAT
    return tokenizer


def language_sizes(vocab: Sized, layers: int = 2) -> dict[str, int]:
    """The sizes that configurations of language models share, for a vocabulary."""
    widths = dict.fromkeys(("hidden_size", "intermediate_size"), WIDTH)
    heads = dict.fromkeys(("num_attention_heads", "num_key_value_heads"), 2)
    return {"vocab_size": len(vocab), "num_hidden_layers": layers} | widths | heads


PARTS = ("scheduler", "vae", "text_encoder", "tokenizer", "transformer")


def seeded(kind: type[DiffusionPipeline]) -> Callable[[Callable[[], tuple]], Callable[[Path], DiffusionPipeline]]:
    """Pipelines of the PARTS that the decorated function makes, with weights of one seed, saved in a given folder."""

    def of(build: Callable[[], tuple]) -> Callable[[Path], DiffusionPipeline]:
        @functools.wraps(build)
        def in_folder(folder: Path) -> DiffusionPipeline:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                pipeline = kind(**dict(zip(PARTS, build(), strict=True)))
            for part in pipeline.components.values():
                if isinstance(part, torch.nn.Module):
                    part.eval()
            pipeline.save_pretrained(folder)
            pipeline.set_progress_bar_config(disable=True)
            return pipeline

        return in_folder

    return of


@seeded(QwenImagePipeline)
def tiny_qwen_image() -> tuple:
    """Latents of one frame, normalised by channel; 64 x 64 images are [4, 8, 8]."""
    tokenizer = qwen_tokenizer()
    text = language_sizes(tokenizer) | {
        "rope_scaling": {"mrope_section": [1, 1, 2], "rope_type": "default", "type": "default"},
        "rope_theta": 1000000.0,
    }
    vision = dict.fromkeys(("hidden_size", "intermediate_size", "out_hidden_size"), WIDTH)
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision | {"depth": 1, "num_heads": 2})
    transformer = QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        axes_dims_rope=(8, 4, 4),
    )
    vae = AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[0.5, 0.8, 1.2, 1.0],
    )
    return (
        FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=0.02),
        vae,
        Qwen2_5_VLForConditionalGeneration(config),
        tokenizer,
        transformer,
    )


@seeded(ZImagePipeline)
def tiny_z_image() -> tuple:
    """One stream over image and text, after a refiner of each; the noise levels are shifted for every size alike."""
    tokenizer = qwen_tokenizer()
    config = Qwen3Config(**language_sizes(tokenizer), head_dim=8)
    transformer = ZImageTransformer2DModel(
        in_channels=16,
        dim=32,
        n_layers=2,
        n_refiner_layers=2,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=WIDTH,
        axes_dims=[8, 4, 4],
        axes_lens=[512, 32, 32],
    )
    for token in (transformer.x_pad_token, transformer.cap_pad_token):
        torch.nn.init.normal_(token)
    return (
        FlowMatchEulerDiscreteScheduler(shift=3.0),
        tiny_vae(shift_factor=0.1),
        Qwen3Model(config),
        tokenizer,
        transformer,
    )


def flux_2_models(guided: bool) -> tuple:
    """What klein and dev have in common: latents are patches, normalised by the statistics of a batch norm; two blocks
    with a stream for each of image and text, then two that see both as one, whose projections are one layer."""
    transformer = Flux2Transformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=3 * WIDTH,
        axes_dims_rope=[4, 4, 4, 4],
        guidance_embeds=guided,
    )
    vae = AutoencoderKLFlux2(
        block_out_channels=(8,) * 4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=64,
    )
    torch.nn.init.uniform_(vae.bn.running_mean, -0.5, 0.5)
    torch.nn.init.uniform_(vae.bn.running_var, 0.5, 2.0)
    return FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True), vae, transformer


@seeded(Flux2KleinPipeline)
def tiny_flux_2_klein() -> tuple:
    """Guided by the empty prompt; reads Qwen3 after its layers 9, 18 and 27."""
    tokenizer = qwen_tokenizer()
    config = Qwen3Config(**language_sizes(tokenizer, layers=28), head_dim=8)
    text_encoder = Qwen3ForCausalLM(config)
    scheduler, vae, transformer = flux_2_models(guided=False)
    return scheduler, vae, text_encoder, tokenizer, transformer


@seeded(Flux2Pipeline)
def tiny_flux_2() -> tuple:
    """Guidance embedded; reads Mistral after its layers 10, 20 and 30."""
    tokenizer = qwen_tokenizer()
    tokenizer.padding_side = "left"
    tokenizer.chat_template = CHAT.replace("message.content", "message.content[0].text")
    text = language_sizes(tokenizer, layers=31) | {"model_type": "mistral", "head_dim": 8}
    vision = {"model_type": "pixtral", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    config = Mistral3Config(
        text_config=text, vision_config=vision | {"num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    )
    text_encoder = Mistral3ForConditionalGeneration(config)
    scheduler, vae, transformer = flux_2_models(guided=True)
    return scheduler, vae, text_encoder, tokenizer, transformer


def gemma() -> tuple[Gemma2Model, GemmaTokenizer]:
    """A token is a letter; the special tokens are Gemma's, and a prompt begins with one."""
    letters = sorted(set(string.printable) | {"▁"})
    vocab = {token: i for i, token in enumerate(["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *letters])}
    tokenizer = GemmaTokenizer(vocab=vocab, merges=[], add_bos_token=True)
    return Gemma2Model(Gemma2Config(**language_sizes(vocab), head_dim=8)), tokenizer


@seeded(SanaPipeline)
def tiny_sana() -> tuple:
    """Linear attention over latents of a deep-compression autoencoder, and cross-attention to the text."""
    text_encoder, tokenizer = gemma()
    transformer = SanaTransformer2DModel(
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=8,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=WIDTH,
        sample_size=32,
    )
    torch.nn.init.normal_(transformer.proj_out.weight, std=0.5)
    vae = AutoencoderDC(
        in_channels=3,
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types=("ResBlock",) * 4,
        decoder_block_types=("ResBlock",) * 4,
        encoder_block_out_channels=(8,) * 4,
        decoder_block_out_channels=(8,) * 4,
        encoder_qkv_multiscales=((),) * 4,
        decoder_qkv_multiscales=((),) * 4,
        encoder_layers_per_block=(1,) * 4,
        decoder_layers_per_block=(1,) * 4,
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
        scaling_factor=0.41407,
    )
    return FlowMatchEulerDiscreteScheduler(shift=3.0), vae, text_encoder, tokenizer, transformer


@seeded(Lumina2Pipeline)
def tiny_lumina_2() -> tuple:
    """One stream over image and text, after a refiner of each; grouped queries."""
    text_encoder, tokenizer = gemma()
    transformer = Lumina2Transformer2DModel(
        sample_size=8,
        in_channels=16,
        hidden_size=32,
        num_layers=2,
        num_refiner_layers=2,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=16,
        axes_dim_rope=(8, 4, 4),
        axes_lens=(300, 32, 32),
        cap_feat_dim=WIDTH,
    )
    return FlowMatchEulerDiscreteScheduler(shift=3.0), tiny_vae(shift_factor=0.1), text_encoder, tokenizer, transformer


@seeded(ChromaPipeline)
def tiny_chroma() -> tuple:
    """Two blocks with a stream for each of image and text, then two that see both as one; T5."""
    text_encoder, tokenizer = tiny_t5()
    transformer = ChromaTransformer2DModel(
        **FLUX_BLOCKS, approximator_num_channels=16, approximator_hidden_dim=24, approximator_layers=2
    )
    torch.nn.init.normal_(transformer.distilled_guidance_layer.out_proj.weight)
    return (
        FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        tiny_vae(shift_factor=0.1),
        text_encoder,
        tokenizer,
        transformer,
    )


@seeded(AuraFlowPipeline)
def tiny_aura_flow() -> tuple:
    """Two joint blocks, then two that see image and text as one; places of 8 x 8 patches of 16 pixels; T5."""
    encoder, tokenizer = tiny_t5()
    config = UMT5Config(**encoder.config.to_dict() | {"model_type": "umt5"})
    transformer = AuraFlowTransformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_mmdit_layers=2,
        num_single_dit_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=40,
        caption_projection_dim=32,
        pos_embed_max_size=64,
    )
    for name, weight in transformer.named_parameters():
        if "norm1" in name and weight.ndim == 2:  # modulations, by which a block says more than next to nothing
            torch.nn.init.normal_(weight)
    return FlowMatchEulerDiscreteScheduler(shift=1.73), tiny_vae(), UMT5EncoderModel(config), tokenizer, transformer
