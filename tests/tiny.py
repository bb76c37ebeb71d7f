"""A tiny Stable Diffusion pipeline with random weights, in the shape of the embedded one.

    64 x 64 images <-> latents [16, 8, 8]; v-prediction, zero terminal SNR, DDIM with trailing timesteps
    UNet    CrossAttn blocks down, mid and up, 16 and 32 wide: each role has chains of 4 and of 2 equal layers
    CLIP    2 layers, 32 wide, 32 tokens; a byte-pair vocabulary with merges of its own

Real classes, 340,000 parameters, some ten milliseconds a step. Nothing is downloaded.
"""

import atexit
import functools
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

RESOLUTION = 64
MAX_TOKENS = 32
CORPUS = ("a sticker of an octopus on a blue background", "a sticker of a sks animal", "a photo of a dog")


def tiny_tokenizer(folder: Path) -> CLIPTokenizer:
    """CLIP's layout: every byte, every byte at the end of a word, merges, then the two special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False, min_frequency=1
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    tokens = alphabet + [f"{byte}</w>" for byte in alphabet]
    tokens += [token for token in sorted(model["vocab"], key=model["vocab"].get) if token not in set(tokens)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    return CLIPTokenizer.from_pretrained(folder, model_max_length=MAX_TOKENS, pad_token="<|endoftext|>")


def tiny_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        projection_dim=32,
        max_position_embeddings=MAX_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config).eval()


def tiny_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=RESOLUTION // 8,
        in_channels=16,
        out_channels=16,
        block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        layers_per_block=1,
        attention_head_dim=4,
        cross_attention_dim=32,
        norm_num_groups=8,
    ).eval()


def tiny_vae(**config: object) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8,) * 4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=4,
        sample_size=RESOLUTION,
        scaling_factor=0.5,
        **config,
    ).eval()


def tiny_scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
    )


def tiny_pipeline(folder: Path, seed: int = 0) -> StableDiffusionPipeline:
    """Build the pipeline and save it to `folder`; equal seeds give equal weights."""
    folder = Path(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = tiny_tokenizer(folder / "tokenizer")
        pipeline = StableDiffusionPipeline(
            vae=tiny_vae(),
            text_encoder=tiny_text_encoder(tokenizer),
            tokenizer=tokenizer,
            unet=tiny_unet(),
            scheduler=tiny_scheduler(),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    pipeline.save_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def tiny_pipeline_xl(folder: Path, seed: int = 0) -> StableDiffusionXLPipeline:
    """The same in the shape of Stable Diffusion XL: two text encoders, a pooled vector, time ids, an Euler sampler."""
    folder = Path(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizers = [tiny_tokenizer(folder / name) for name in ("tokenizer", "tokenizer_2")]
        second = CLIPTextModelWithProjection(tiny_text_encoder(tokenizers[1]).config).eval()
        unet = UNet2DConditionModel(
            **dict(tiny_unet().config)
            | {
                "cross_attention_dim": 64,
                "addition_embed_type": "text_time",
                "addition_time_embed_dim": 8,
                "projection_class_embeddings_input_dim": 6 * 8 + 32,
                "transformer_layers_per_block": (1, 2),
            }
        ).eval()
        pipeline = StableDiffusionXLPipeline(
            vae=tiny_vae(),
            text_encoder=tiny_text_encoder(tokenizers[0]),
            text_encoder_2=second,
            tokenizer=tokenizers[0],
            tokenizer_2=tokenizers[1],
            unet=unet,
            scheduler=EulerDiscreteScheduler(
                beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1
            ),
            add_watermarker=False,
        )
    pipeline.save_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def tiny_t5() -> tuple[T5EncoderModel, T5Tokenizer]:
    """T5's layout: pieces of words by their probability; padding, end and the unknown first."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<pad>", "</s>", "<unk>"]
    alphabet = sorted({letter for line in CORPUS for letter in line})
    trainer = trainers.UnigramTrainer(
        vocab_size=100, special_tokens=special, unk_token="<unk>", initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    vocab = [tuple(piece) for piece in json.loads(tokenizer.to_str())["model"]["vocab"]]
    tokenizer = T5Tokenizer(vocab=vocab, extra_ids=0, model_max_length=64)
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=40,
        d_kv=10,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
    )
    return T5EncoderModel(config).eval(), tokenizer


def tiny_pipeline_3(folder: Path, seed: int = 0, with_t5: bool = True) -> StableDiffusion3Pipeline:
    """The same in the shape of Stable Diffusion 3.5: flow matching; a transformer of joint attention, the first blocks
    with a second attention, whose last block drops the text; two CLIPs and T5, which may be left out."""
    folder = Path(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizers = [tiny_tokenizer(folder / name) for name in ("tokenizer", "tokenizer_2")]
        encoders = [CLIPTextModelWithProjection(tiny_text_encoder(t).config).eval() for t in tokenizers]
        text_encoder_3, tokenizer_3 = tiny_t5()
        encoders[1] = CLIPTextModelWithProjection(
            CLIPTextConfig(**encoders[1].config.to_dict() | {"hidden_size": 8, "num_hidden_layers": 3})
        ).eval()
        transformer = SD3Transformer2DModel(
            sample_size=RESOLUTION // 8,
            patch_size=1,
            in_channels=16,
            num_layers=4,
            attention_head_dim=8,
            num_attention_heads=4,
            joint_attention_dim=40,
            caption_projection_dim=32,
            pooled_projection_dim=64,
            out_channels=16,
            pos_embed_max_size=16,
            dual_attention_layers=(0, 1),
            qk_norm="rms_norm",
        ).eval()
        pipeline = StableDiffusion3Pipeline(
            vae=tiny_vae(shift_factor=0.1),
            text_encoder=encoders[0],
            text_encoder_2=encoders[1],
            text_encoder_3=text_encoder_3 if with_t5 else None,
            tokenizer=tokenizers[0],
            tokenizer_2=tokenizers[1],
            tokenizer_3=tokenizer_3 if with_t5 else None,
            transformer=transformer,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        )
    pipeline.save_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def tiny_pipeline_3_without_t5(folder: Path) -> StableDiffusion3Pipeline:
    return tiny_pipeline_3(folder, with_t5=False)


FLUX_BLOCKS = {  # of FLUX.1 and of Chroma: two blocks with a stream for each of image and text, then two of one
    "in_channels": 4 * 16,
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 8,
    "num_attention_heads": 4,
    "joint_attention_dim": 40,
    "axes_dims_rope": (2, 2, 4),
}


def tiny_pipeline_flux(folder: Path, seed: int = 0, guided: bool = True) -> FluxPipeline:
    """The same in the shape of FLUX.1: flow matching, shifted by the size of the image; two blocks with a stream for
    each of image and text, then two that see both as one; CLIP and T5; guidance embedded if `guided`, as in -dev."""
    folder = Path(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = tiny_tokenizer(folder / "tokenizer")
        text_encoder_2, tokenizer_2 = tiny_t5()
        transformer = FluxTransformer2DModel(**FLUX_BLOCKS, pooled_projection_dim=32, guidance_embeds=guided).eval()
        scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
        pipeline = FluxPipeline(
            vae=tiny_vae(shift_factor=0.1),
            text_encoder=tiny_text_encoder(tokenizer),
            tokenizer=tokenizer,
            text_encoder_2=text_encoder_2,
            tokenizer_2=tokenizer_2,
            transformer=transformer,
            scheduler=scheduler if guided else FlowMatchEulerDiscreteScheduler(shift=1.0),
        )
    pipeline.save_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def tiny_pipeline_schnell(folder: Path) -> FluxPipeline:
    return tiny_pipeline_flux(folder, guided=False)


@functools.cache
def saved(build: Callable[[Path], object]) -> Path:
    """Where `build` has saved its pipeline of seed 0: made once in a process, and removed at its end."""
    folder = Path(tempfile.mkdtemp(prefix=build.__name__))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    build(folder)
    return folder


def tiny_pipeline_folder() -> Path:
    return saved(tiny_pipeline)
