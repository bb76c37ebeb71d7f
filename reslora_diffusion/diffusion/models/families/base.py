"""The questions that training asks a family of models.

prompts [P] -> tokens    ids [P, E, L] for E text encoders that can be trained, and for some families what an encoder
                         that is never trained makes of the prompts [P, L2, D]
tokens      -> texts     hidden states [P, L, D], and for some families a pooled vector [P, D2]
texts       -> what the denoiser is given, and what the pipeline is given

What a family is called and consists of is known without torch, which only the work itself imports.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ...data.buckets import Grid
from ...options import DreamBoothOptions
from .long_prompts import in_pieces, pieces_of
from .texts import Texts, Tokens
from .weighted_prompts import ids_and_weights, tokenize_weighted

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, ModelMixin
    from torch import Tensor, nn
    from transformers import PreTrainedTokenizerBase

    from ...objective.noise import Process

    Windows = Sequence[tuple[PreTrainedTokenizerBase, int]]  # with the tokens of a prompt that an encoder is given

MOST_TOKENS = 512  # of a prompt, that most pipelines take


class Family(ABC):
    """Stateless: the models are arguments."""

    title: str
    tag: str  # on the hub
    pipeline_class: str  # of diffusers
    denoiser: str
    denoiser_class: str
    text_encoders: tuple[str, ...]
    tokenizers: tuple[str, ...]
    target_modules: tuple[str, ...]
    of_kohya: tuple[str, ...] = ()  # stacks whose layers kohya's scripts train; none if they do not train the family
    convolutions: tuple[str, ...] = ()  # stacks that `--conv_rank` adds to them
    not_here: Mapping[str, str]  # options that do not apply, and why
    fixed_encoder: str | None = None
    fixed_tokenizer: str | None = None
    embedding_keys: Mapping[str, str] = {}  # names of the encoders' new tokens in a file, by component
    max_sequence_length = 77  # tokens of a prompt that T5 is given, as in diffusers' script for the family
    guidance_scale = 7.5  # of images
    guidance_name = "guidance_scale"  # of classifier-free guidance, in the pipeline's arguments
    as_asked: Mapping[str, Any] = {}  # arguments of the pipeline by which images have the size that is asked for
    vae_class = "AutoencoderKL"
    has_true_cfg = False  # whether a pipeline of models that were distilled with guidance can be guided as well
    architecture: str | None = None  # what a file says that it is for, where names and shapes do not tell
    is_guided = False  # whether it has models that are given the guidance in training

    def default_targets(self, config: Mapping[str, Any]) -> tuple[str, ...]:
        """Target modules of a denoiser of this configuration."""
        return self.target_modules

    def denoiser_of(self, pipeline: DiffusionPipeline) -> ModelMixin:
        return getattr(pipeline, self.denoiser)

    def tokenizers_of(self, pipeline: DiffusionPipeline) -> list[PreTrainedTokenizerBase]:
        return [getattr(pipeline, name) for name in self.tokenizers]

    def text_encoders_of(self, pipeline: DiffusionPipeline) -> list[nn.Module]:
        return [getattr(pipeline, name) for name in self.text_encoders]

    def token_encoders(self, options: DreamBoothOptions) -> dict[str, str]:
        """Text encoders whose new tokens are trained, and their tokenizers, by their names in the pipeline."""
        found = dict(zip(self.text_encoders, self.tokenizers, strict=True))
        return found | ({str(self.fixed_encoder): str(self.fixed_tokenizer)} if options.enable_t5_ti else {})

    def encoders_for(self, pipeline: DiffusionPipeline, tokens: Tokens) -> list[nn.Module]:
        """The text encoders that `encode` these tokens."""
        has_ids = tokens.fixed is not None and not tokens.fixed.is_floating_point()
        return self.text_encoders_of(pipeline) + ([getattr(pipeline, str(self.fixed_encoder))] if has_ids else [])

    @abstractmethod
    def grid(self, config: Mapping[str, Any], vae_scale_factor: int) -> Grid:
        """The latent grid that a denoiser's configuration asks for."""

    def latent_channels(self, config: Mapping[str, Any]) -> int:
        """Channels of the latents that a denoiser of this configuration works on."""
        return config["in_channels"]

    def vae_scale_factor(self, vae: Mapping[str, Any]) -> int:
        """Pixels to a latent, by the autoencoder's configuration."""
        return 2 ** (len(vae["block_out_channels"]) - 1)

    def vae_channels(self, vae: Mapping[str, Any]) -> int:
        """Channels of the autoencoder's latents."""
        return vae["latent_channels"]

    def moments(self, vae: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance [B, C, h, w] of the latents of pixels [B, 3, H, W]."""
        found = vae.encode(pixels).latent_dist
        return found.mean, found.logvar

    def normalisation(self, vae: Any) -> tuple[Tensor | float, Tensor | float]:
        """Factor and shift: the denoiser works on factor * (latents - shift). Numbers, or one for each channel
        [C, 1, 1]."""
        return vae.config.scaling_factor, vae.config.shift_factor or 0.0

    def text_width(self, config: Mapping[str, Any]) -> int:
        """Width of the states that an encoder which is never trained gives a denoiser of this configuration."""
        return config["joint_attention_dim"]

    def pieces(self, text_encoder: Any, ids: Tensor) -> int:
        """The number of pieces of ids [..., L]: more than one where they are more than the encoder reads."""
        return max(1, ids.shape[-1] // text_encoder.config.max_position_embeddings)

    def t5_length(self, options: DreamBoothOptions) -> int:
        """Tokens of a prompt that T5 is given."""
        return options.max_sequence_length or self.max_sequence_length

    def most_tokens(self, config: Mapping[str, Any]) -> int:
        """Tokens of a prompt that a denoiser of this configuration and its pipeline take at most."""
        return MOST_TOKENS

    def tokens_cut_off(self, windows: Windows, prompt: str, options: DreamBoothOptions) -> int:
        """Return the number of tokens at the end of a prompt that no text encoder is given."""
        return max(0, *(self.tokens_of(tokenizer, prompt, options) - length for tokenizer, length in windows))

    def tokens_of(self, tokenizer: PreTrainedTokenizerBase, prompt: str, options: DreamBoothOptions) -> int:
        if options.weighted_captions:
            return len(ids_and_weights(tokenizer, prompt)[0]) + 2
        return len(tokenizer(prompt, truncation=False, verbose=False).input_ids)

    def validation_guidance(self, options: DreamBoothOptions) -> float:
        """Guidance of validation and class images."""
        given = options.validation_guidance_scale
        return self.guidance_scale if given is None else given

    def guided_by(self, scale: float, batch_size: int) -> dict[str, Any]:
        """Arguments of the pipeline that guide images of `batch_size` prompts away from the empty prompt."""
        needs_negative = self.guidance_name != Family.guidance_name
        return {self.guidance_name: scale, **self.as_asked} | (
            {"negative_prompt": [""] * batch_size} if needs_negative else {}
        )

    def training_guidance(self, config: Mapping[str, Any], options: DreamBoothOptions) -> float | None:
        """The guidance that a denoiser of this configuration takes as an input in training; None if it takes none."""
        if not (self.is_guided and config.get("guidance_embeds")):
            return None
        given = options.training_guidance_scale
        return self.guidance_scale if given is None else given

    def guidance_input(self, scale: float | None, times: Tensor) -> dict[str, Tensor]:
        """Keyword argument of the denoiser for the guidance that it takes as an input, beside those of `condition`."""
        import torch

        return {} if scale is None else {"guidance": torch.full_like(times, scale)}

    @abstractmethod
    def process(self, pipeline: DiffusionPipeline, options: DreamBoothOptions) -> Process:
        """The forward process of the base, as the options change it; the pipeline then samples by the same."""

    def tokenize(
        self, tokenizers: Sequence[PreTrainedTokenizerBase], prompts: list[str], length: int | None, pieces: int = 1
    ) -> Tensor:
        """Token ids [P, E, L], padded and cut to `length` (the tokenizers' own if None). Of prompts in `pieces`, each
        piece has `length` tokens, with a start and an end of its own."""
        import torch

        ids = []
        for tokenizer in tokenizers:
            own = length or tokenizer.model_max_length
            whole = tokenizer(
                prompts,
                padding="max_length",
                truncation=True,
                max_length=pieces * (own - 2) + 2,
                return_tensors="pt",
            ).input_ids
            ids.append(in_pieces(whole, pieces, tokenizer) if pieces > 1 else whole)
        return torch.stack(ids, dim=1)

    def fixed(self, pipeline: DiffusionPipeline, prompts: list[str], options: DreamBoothOptions) -> Tensor | None:
        """Encode prompts by the text encoder that is never trained [P, L2, D]; None without one."""
        return None

    def read(
        self,
        pipeline: DiffusionPipeline,
        prompts: list[str],
        options: DreamBoothOptions,
        negative: Sequence[bool] | None = None,
    ) -> Tokens:
        """Tokenize prompts for `encode`, on the pipeline's device.

        Args:
            negative: whether a prompt is one that images are guided away from, which some families encode in another
                way; by default that of no words is.
        """
        import torch

        prompts = [options.worded(prompt) for prompt in prompts]
        tokenizers, device = self.tokenizers_of(pipeline), self.denoiser_of(pipeline).device
        length, pieces, weights = options.tokenizer_max_length, pieces_of(options), None
        if options.weighted_captions:
            ids, weights = tokenize_weighted(tokenizers, prompts, length, pieces)
            weights = weights.to(device)
        else:
            ids = self.tokenize(tokenizers, prompts, length, pieces)
        with torch.no_grad():
            return Tokens(ids.to(device), self.fixed(pipeline, prompts, options), weights=weights)

    @abstractmethod
    def encode(self, text_encoders: Sequence[nn.Module], tokens: Tokens) -> Texts:
        """Encode tokens by the text encoders that can be trained, and by the last one if `tokens.fixed` are ids."""

    @abstractmethod
    def condition(self, texts: Texts, time_ids: Tensor) -> dict[str, Any]:
        """Keyword arguments of the denoiser. `time_ids` [B, 6]: original size, upper left corner of the crop, trained
        size, each (height, width)."""

    def denoise(self, model: nn.Module, latents: Tensor, times: Tensor, conditions: dict[str, Any]) -> Tensor:
        """The model's prediction [B, C, h, w] of latents [B, C, h, w] at times [B]."""
        return model(latents, timestep=times, **conditions, return_dict=False)[0]

    @abstractmethod
    def pipeline_inputs(
        self, pipeline: DiffusionPipeline, texts: Texts, negative: Texts, empty: bool = True
    ) -> dict[str, Tensor | None]:
        """Keyword arguments of the pipeline in place of prompts; `empty` says whether `negative` is of no words."""
