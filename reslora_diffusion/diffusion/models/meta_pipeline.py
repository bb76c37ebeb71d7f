"""A pipeline without its weights: components on the meta device, made from their configurations.

It is the `Architecture` of a model whose weight files are not on this machine (of the hub, only configurations are
fetched). A run is planned with it: adapters fit it, tokenizers count its tokens, a forward through it estimates a step.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import DDPMScheduler, DiffusionPipeline, ModelMixin
from torch import nn
from transformers import AutoTokenizer, CLIPTextConfig, CLIPTokenizer, PreTrainedTokenizerBase, T5Tokenizer

from reslora_diffusion.core.config import ResLoraConfig

from ...utils.hub import unreachable
from ...utils.problems import BadInput
from ..options import DreamBoothOptions
from ..options.model_checks import adapter_settings
from .architecture import TEXT_ENCODERS, UNBOUNDED, Architecture, Layer, family_of, layers_of, left_out
from .families.clip import leave_out_layers
from .families.long_prompts import pieces_of

TOKENIZERS = {
    f"{name}{fast}": kind
    for name, kind in (("CLIPTokenizer", CLIPTokenizer), ("T5Tokenizer", T5Tokenizer))
    for fast in ("", "Fast")
}
TEXT_ENCODER_CLASSES = {name: getattr(transformers, name) for name in TEXT_ENCODERS}


@dataclass(frozen=True)
class MetaPipeline(Architecture):
    """An architecture with its modules, and the tokenizers."""

    denoiser: ModelMixin
    text_encoders: dict[str, nn.Module]
    windows: list[tuple[PreTrainedTokenizerBase, int]]  # and how many tokens of a prompt its encoder is given

    def adapters(self, options: DreamBoothOptions) -> dict[str, tuple[nn.Module, ResLoraConfig]]:
        """Component and adapter configuration, for each component that is trained; raises `ValueError`."""
        models = {self.family.denoiser: self.denoiser, **self.text_encoders}
        settings = adapter_settings(options)
        return {
            component: (
                models[component],
                ResLoraConfig(target_modules=targets, **settings | self.patterns(component, options)),
            )
            for component, targets in self.targets(options).items()
        }


def layers_in(model: nn.Module) -> dict[str, Layer]:
    return layers_of({name: tuple(tensor.shape) for name, tensor in model.state_dict().items()})


def given_base(options: DreamBoothOptions) -> str:
    """`--pretrained_model_name_or_path`, without which no run gets here."""
    assert options.pretrained_model_name_or_path is not None, "the checks refuse a run without a base"
    return options.pretrained_model_name_or_path


def load_meta_pipeline(options: DreamBoothOptions) -> MetaPipeline:
    """Read the configurations of `--pretrained_model_name_or_path`.

    Raises:
        BadInput: they cannot be read, or are not of a family that is trained here.
    """
    name = options.config_source
    where: dict[str, Any] = {"revision": options.revision}
    why = None if Path(name).is_dir() else unreachable()
    try:
        index = DiffusionPipeline.load_config(name, **where)
        family = family_of(index, name)
        kind, part = getattr(diffusers, family.denoiser_class), family.denoiser
        with torch.device("meta"):
            denoiser = kind.from_config(kind.load_config(name, subfolder=part, **where))
            configs = {
                part: CLIPTextConfig.from_pretrained(name, subfolder=part, **where) for part in family.text_encoders
            }
            encoders = {part: TEXT_ENCODER_CLASSES[index[part][1]](config) for part, config in configs.items()}
        for part, encoder in encoders.items():
            if count := left_out(options, family, part, configs[part].num_hidden_layers):
                leave_out_layers(encoder, count)
        tokenizers = [
            TOKENIZERS[index[part][1]].from_pretrained(name, subfolder=part, **where) for part in family.tokenizers
        ]
        if options.tokenizer_name:
            tokenizers[0] = AutoTokenizer.from_pretrained(options.tokenizer_name, **where)
        read = [options.tokenizer_max_length or tokenizer.model_max_length for tokenizer in tokenizers]
        lengths = [pieces_of(options) * (length - 2) + 2 for length in read]
        windows = [*zip(tokenizers, lengths, strict=True)]
        of_t5 = filter(None, (family.fixed_encoder, family.fixed_tokenizer))
        if "skip_t5" in family.not_here and (absent := [part for part in of_t5 if not index[part][1]]):
            raise KeyError(" and ".join(absent))
        t5 = family.fixed_tokenizer
        if t5 and index[t5][1] and not options.skip_t5:
            kind = TOKENIZERS.get(index[t5][1], AutoTokenizer)
            fixed = kind.from_pretrained(name, subfolder=t5, **where)
            windows.append((fixed, family.t5_length(options)))
        coder = getattr(diffusers, family.vae_class)
        vae = coder.load_config(name, subfolder="vae", **where)
        other = options.pretrained_vae_model_name_or_path
        other_vae = coder.load_config(other) if other else None
        scheduler = DDPMScheduler.load_config(name, subfolder="scheduler", **where)
        if not isinstance(scheduler, dict):
            raise KeyError("an object in scheduler_config.json")
        family.vae_channels(vae), family.vae_scale_factor(vae)  # raise KeyError for what is missing
    except BadInput:
        raise
    except Exception as error:  # libraries raise whatever a file that holds something else makes them
        reason = f"lacks {error}" if isinstance(error, KeyError) else first_sentence(error)
        if why and isinstance(error, OSError):
            reason = f"it is not on this machine, and {why}"
        raise BadInput([f"--pretrained_model_name_or_path: {name} cannot be loaded: {reason}"]) from error
    return MetaPipeline(
        family,
        denoiser.config,
        {component: layers_in(model) for component, model in {family.denoiser: denoiser, **encoders}.items()},
        vae,
        other_vae,
        denoiser=denoiser,
        text_encoders=encoders,
        windows=windows,
        prediction_type=options.prediction_type or scheduler.get("prediction_type", "epsilon"),
        max_length=min((config.max_position_embeddings for config in configs.values()), default=UNBOUNDED),
    )


def first_sentence(error: Exception) -> str:
    return (
        re.split(r"(?<=[.!])\s", str(error).strip().splitlines()[0])[0] if str(error).strip() else type(error).__name__
    )
