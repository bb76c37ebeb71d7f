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
from typing import TYPE_CHECKING, Any, NamedTuple

from ...data.buckets import Grid
from ...options import DreamBoothOptions

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, ModelMixin
    from torch import Tensor, nn
    from transformers import PreTrainedTokenizerBase

    from ...objective.noise import Process

OF_CLIP_ALONE = {"max_token_length": "lengthens the prompts of models that read CLIP alone; see --max_sequence_length"}
OF_ONE_CLIP = {"skip_clip_layers": "leaves out layers of the one CLIP of Stable Diffusion 1.x and 2.x"}
OF_FLOWS = dict.fromkeys(
    "weighting_scheme logit_mean logit_std mode_scale precondition_outputs timestep_sampling sigmoid_scale "
    "discrete_flow_shift".split(),
    "belongs to flow matching",
)
SHORTEST = 75  # tokens of a prompt that CLIP reads at once, besides start and end
OF_DIFFUSION = dict.fromkeys(
    "prediction_type rescale_betas_zero_snr snr_gamma debiased_estimation_loss".split(),
    "belongs to diffusion; this family is trained by flow matching, see --weighting_scheme",
)


def leave_out_layers(text_encoder: nn.Module, count: int) -> None:
    """`skip_clip_layers`: the final norm reads what came before the last layers, as in diffusers' pipelines."""
    encoder: Any = getattr(text_encoder, "text_model", text_encoder).encoder
    encoder.layers = encoder.layers[:-count]


def scheduler_changes(options: DreamBoothOptions) -> dict[str, str | bool]:
    """What the options say of the schedule of noise; the rest is the base's own."""
    given = {name: getattr(options, name) for name in ("prediction_type", "rescale_betas_zero_snr")}
    given = {name: value for name, value in given.items() if value is not None}
    return given | ({"timestep_spacing": "trailing"} if given.get("rescale_betas_zero_snr") else {})


def pieces_of(options: DreamBoothOptions) -> int:
    """How many times 75 tokens of a prompt are read."""
    return (options.max_token_length or SHORTEST) // SHORTEST


def in_pieces(ids: Tensor, pieces: int, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """Ids [P, n (L - 2) + 2] as n pieces [P, n L], each with the start and an end, as kohya's scripts cut them: a piece
    that is full ends in the end of text; one with nothing but padding begins with it."""
    import torch

    start, end, pad = ids[:, :1], tokenizer.eos_token_id, tokenizer.pad_token_id
    cut = []
    for part in ids[:, 1:-1].chunk(pieces, dim=1):
        first, last = part[:, :1].clone(), ids[:, -1:].clone()
        if pad != end:
            last[(part[:, -1:] != end) & (part[:, -1:] != pad)] = end
            first[first == pad] = end
        cut.append(torch.cat([start, first, part[:, 1:], last], dim=1))
    return torch.cat(cut, dim=1)


def joined(states: Tensor, pieces: int) -> Tensor:
    """Hidden states [P n, L, D] of n pieces as those of one prompt [P, n (L - 2) + 2, D]: one start and one end."""
    import torch

    if pieces == 1:
        return states
    parts = states.unflatten(0, (-1, pieces))
    inner = parts[:, :, 1:-1].flatten(1, 2)
    return torch.cat([parts[:, 0, :1], inner, parts[:, -1, -1:]], dim=1)


class Tokens(NamedTuple):
    """Prompts that the text encoders have yet to encode."""

    ids: Tensor
    fixed: Tensor | None = None


class Texts(NamedTuple):
    """Encoded prompts."""

    hidden: Tensor
    pooled: Tensor | None = None


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
    not_here: Mapping[str, str]  # options that do not apply, and why
    fixed_encoder: str | None = None
    fixed_tokenizer: str | None = None
    max_sequence_length = 77  # tokens of a prompt that T5 is given, as in diffusers' script for the family
    guidance_scale = 7.5  # of images
    is_guided = False  # whether it has models that are given the guidance in training

    def denoiser_of(self, pipeline: DiffusionPipeline) -> ModelMixin:
        return getattr(pipeline, self.denoiser)

    def tokenizers_of(self, pipeline: DiffusionPipeline) -> list[PreTrainedTokenizerBase]:
        return [getattr(pipeline, name) for name in self.tokenizers]

    def text_encoders_of(self, pipeline: DiffusionPipeline) -> list[nn.Module]:
        return [getattr(pipeline, name) for name in self.text_encoders]

    @abstractmethod
    def grid(self, config: Mapping[str, Any], vae_scale_factor: int) -> Grid:
        """The latent grid that a denoiser's configuration asks for."""

    def latent_channels(self, config: Mapping[str, Any]) -> int:
        """Channels of the latents that a denoiser of this configuration works on."""
        return config["in_channels"]

    def pieces(self, text_encoder: Any, ids: Tensor) -> int:
        """The number of pieces of ids [..., L]: more than one where they are more than the encoder reads."""
        return max(1, ids.shape[-1] // text_encoder.config.max_position_embeddings)

    def t5_length(self, options: DreamBoothOptions) -> int:
        """Tokens of a prompt that T5 is given."""
        return options.max_sequence_length or self.max_sequence_length

    def validation_guidance(self, options: DreamBoothOptions) -> float:
        """Guidance of validation and class images."""
        given = options.validation_guidance_scale
        return self.guidance_scale if given is None else given

    def training_guidance(self, config: Mapping[str, Any], options: DreamBoothOptions) -> float | None:
        """The guidance that a denoiser of this configuration takes as an input in training; None if it takes none."""
        return None

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
        """What a text encoder that is never trained makes of prompts [P, L2, D]."""
        return None

    def read(self, pipeline: DiffusionPipeline, prompts: list[str], options: DreamBoothOptions) -> Tokens:
        """What `encode` is given, on the pipeline's device."""
        import torch

        ids = self.tokenize(self.tokenizers_of(pipeline), prompts, options.tokenizer_max_length, pieces_of(options))
        with torch.no_grad():
            return Tokens(ids.to(self.denoiser_of(pipeline).device), self.fixed(pipeline, prompts, options))

    @abstractmethod
    def encode(self, text_encoders: Sequence[nn.Module], tokens: Tokens) -> Texts:
        """Encode tokens by the text encoders that can be trained."""

    @abstractmethod
    def condition(self, texts: Texts, time_ids: Tensor) -> dict[str, Any]:
        """Keyword arguments of the denoiser. `time_ids` [B, 6]: original size, upper left corner of the crop, trained
        size, each (height, width)."""

    def denoise(
        self,
        model: nn.Module,
        latents: Tensor,
        times: Tensor,
        conditions: dict[str, Any],
        guidance_scale: float | None = None,
    ) -> Tensor:
        """The model's prediction [B, C, h, w] of latents [B, C, h, w] at times [B]."""
        return model(latents, timestep=times, **conditions, return_dict=False)[0]

    @abstractmethod
    def pipeline_inputs(
        self, pipeline: DiffusionPipeline, texts: Texts, negative: Texts, empty: bool = True
    ) -> dict[str, Tensor | None]:
        """Keyword arguments of the pipeline in place of prompts; `empty` says whether `negative` is of no words."""


class UNetFamily(Family):
    """What Stable Diffusion 1.x, 2.x and XL have in common."""

    denoiser = "unet"
    target_modules = ("to_k", "to_q", "to_v", "to_out.0")
    not_here = (
        OF_FLOWS
        | dict.fromkeys(("max_sequence_length", "skip_t5"), "belongs to T5, which this family lacks")
        | {"lora_blocks": "counts the blocks of a transformer; name layers of a UNet by --target_modules"}
    )

    def grid(self, config: Mapping[str, Any], vae_scale_factor: int) -> Grid:
        return Grid(vae_scale_factor, vae_scale_factor * 2 ** (len(config["block_out_channels"]) - 1))

    def process(self, pipeline: DiffusionPipeline, options: DreamBoothOptions) -> Process:
        """Prediction type and zero-terminal SNR are the base's own if not given."""
        from diffusers import DDPMScheduler

        from ...objective.noise import Diffusion

        if changes := scheduler_changes(options):
            pipeline.scheduler = pipeline.scheduler.from_config(pipeline.scheduler.config, **changes)
        return Diffusion(
            DDPMScheduler.from_config(pipeline.scheduler.config), options.min_timestep, options.max_timestep
        )


class FlowFamily(Family):
    """What Stable Diffusion 3 and FLUX.1 have in common: a transformer that is trained by flow matching, and T5, which
    is not trained: what it makes of a prompt is computed once."""

    denoiser = "transformer"
    flow: Mapping[str, Any] = {}  # what differs from `FlowMatching` where options do not say it

    def process(self, pipeline: DiffusionPipeline, options: DreamBoothOptions) -> Process:
        """Noise levels are shifted as the base's scheduler shifts them for every size alike, or as options say."""
        from diffusers import FlowMatchEulerDiscreteScheduler

        from ...objective.noise import FlowMatching

        names = (*OF_FLOWS, "min_timestep", "max_timestep")
        given = {name: value for name in names if (value := getattr(options, name)) is not None}
        replaced = options.discrete_flow_shift is not None
        shift = {"shift": options.discrete_flow_shift, "use_dynamic_shifting": False} if replaced else {}
        scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipeline.scheduler.config, **shift)
        return FlowMatching(scheduler, **{**self.flow, **given})

    def fixed(self, pipeline: DiffusionPipeline, prompts: list[str], options: DreamBoothOptions) -> Tensor:
        import torch

        encoder, tokenizer = (getattr(pipeline, str(name)) for name in (self.fixed_encoder, self.fixed_tokenizer))
        ids = self.tokenize([tokenizer], prompts, self.t5_length(options))[:, 0]
        return torch.cat([encoder(part.to(encoder.device), return_dict=False)[0] for part in ids.split(1)])
