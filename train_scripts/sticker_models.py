"""The networks of the embedded sticker pipeline, with weights yet to be trained.

64 x 64 x 3  <- AutoencoderKL ->  8 x 8 x 32 latents
CLIPTextModel    4 layers, 128 wide, 32 tokens
UNet             cross-attention blocks down, mid and up, 80 and 160 wide; v-prediction, zero terminal SNR
"""

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from sticker_data import RESOLUTION

LATENT_CHANNELS = 32
MAX_TOKENS = 32
VOCABULARY = 1500


def make_tokenizer(folder: Path, corpus: Iterable[str]) -> None:
    """Train a byte-pair vocabulary, and save it as `CLIPTokenizer` reads it."""
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    # CLIP's layout: every byte, every byte at the end of a word, merges, then the two special tokens.
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        initial_alphabet=alphabet,
        end_of_word_suffix="</w>",
        show_progress=False,
        min_frequency=2,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    tokens = alphabet + [f"{byte}</w>" for byte in alphabet]
    tokens += [token for token in sorted(model["vocab"], key=model["vocab"].get) if token not in set(tokens)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(
        json.dumps({token: i for i, token in enumerate(tokens)}, ensure_ascii=False), encoding="utf-8"
    )
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8")
    CLIPTokenizer.from_pretrained(folder, model_max_length=MAX_TOKENS, pad_token="<|endoftext|>").save_pretrained(
        folder
    )


def make_vae() -> AutoencoderKL:
    channels = (24, 48, 64, 96)
    return AutoencoderKL(
        block_out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=RESOLUTION,
    )


class StickerModel(nn.Module):
    """Text encoder and UNet as one trainable module: (noisy latents, timesteps, token ids) -> v."""

    def __init__(self, tokenizer: CLIPTokenizer, latent_channels: int = LATENT_CHANNELS) -> None:
        super().__init__()
        self.text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=128,
                intermediate_size=512,
                num_hidden_layers=4,
                num_attention_heads=4,
                projection_dim=128,
                max_position_embeddings=MAX_TOKENS,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )
        self.unet = UNet2DConditionModel(
            sample_size=RESOLUTION // 8,
            in_channels=latent_channels,
            out_channels=latent_channels,
            block_out_channels=(80, 160),
            down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
            layers_per_block=1,
            attention_head_dim=4,
            cross_attention_dim=128,
            norm_num_groups=16,
        )

    def load_weights(self, pipeline: Path) -> list[str]:
        """Take the weights of a finished pipeline. Layers of other shapes, which are those that read and write latents
        of another autoencoder, start anew: their names are returned."""
        fresh = []
        for name, kind in (("text_encoder", CLIPTextModel), ("unet", UNet2DConditionModel)):
            own = getattr(self, name)
            shapes = {key: value.shape for key, value in own.state_dict().items()}
            weights = kind.from_pretrained(pipeline, subfolder=name).state_dict()
            fits = {key: value for key, value in weights.items() if value.shape == shapes.get(key)}
            own.load_state_dict(fits, strict=False)
            fresh += [f"{name}.{key}" for key in shapes if key not in fits]
        return fresh

    def forward(self, noisy_latents: torch.Tensor, timesteps: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
        return self.unet(noisy_latents, timesteps, self.text_encoder(input_ids)[0]).sample


def make_scheduler() -> DDIMScheduler:
    """Zero terminal SNR with v-prediction: on 8 x 8 latents the usual schedule lets the mean colour of an image leak
    through the noise, and plain backgrounds come out wrong."""
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


def make_pipeline(model: StickerModel, vae: AutoencoderKL, tokenizer: CLIPTokenizer) -> StableDiffusionPipeline:
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=model.text_encoder,
        tokenizer=tokenizer,
        unet=model.unet,
        scheduler=make_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
