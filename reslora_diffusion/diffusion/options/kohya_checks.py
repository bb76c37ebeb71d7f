"""Contradictions among the options that are kohya's: noise, noise levels, buckets, prompts."""

from collections.abc import Iterator, Sequence

from ...utils.problems import BadInput
from ..data.buckets import KOHYA_LIMITS
from ..data.concepts import Concept, options_of
from ..data.prompts import read_prompts
from . import DreamBoothOptions
from .data import READ_AS_TAGS

ROBUST = ("huber", "smooth_l1")


def bad_data(options: DreamBoothOptions) -> Iterator[str]:
    """Options of buckets and of prompts that change nothing, or contradict each other."""
    for name in (*KOHYA_LIMITS, "bucket_no_upscale"):
        if getattr(options, name) and options.aspect_ratio_buckets != "auto":
            yield f"--{name} is used only with --aspect_ratio_buckets auto"
    if (options.max_token_length or 75) > 75 and options.tokenizer_max_length:
        yield "--max_token_length reads a prompt in pieces of the tokenizer's length; got --tokenizer_max_length too"


def tag_problems(options: DreamBoothOptions, concepts: Sequence[Concept]) -> Iterator[str]:
    """Options of tags that change nothing, or contradict each other, of the run and of its concepts."""
    tags = ", ".join(f"--{name}" for name in READ_AS_TAGS)
    every = [options, *(options_of(concept.own, options) for concept in concepts)]
    if not any(getattr(one, name) for one in every for name in READ_AS_TAGS):
        for name in ("keep_tokens", "keep_tokens_separator"):
            if any(getattr(one, name) for one in every):
                yield f"--{name} is used only with one of {tags}"
        if any(one.caption_separator != "," and not one.secondary_separator for one in every):
            yield f"--caption_separator is used only with one of {tags}, --secondary_separator"
    if any(one.token_warmup_min != 1 for one in every) and not any(one.token_warmup_step for one in every):
        yield "--token_warmup_min is used only with --token_warmup_step"
    if not all(one.caption_separator for one in every):
        yield "--caption_separator: got no text, wanted what stands between tags"
    if any(one.token_warmup_step and one.enable_wildcard for one in every):
        yield (
            "--token_warmup_step begins with the first tags of a caption, which --enable_wildcard draws; wanted one "
            "of them"
        )


def bad_noise(options: DreamBoothOptions) -> Iterator[str]:
    """Options of noise and of noise levels that contradict each other, or change nothing."""
    least, most = options.min_timestep or 0, options.max_timestep
    if most is not None and least >= most:
        yield f"--min_timestep and --max_timestep: got {least} and {most}, wanted the first below the second"
    for name in ("noise_offset", "ip_noise_gamma"):
        if getattr(options, f"{name}_random_strength") and not getattr(options, name):
            yield f"--{name}_random_strength is used only with --{name}"
    if options.adaptive_noise_scale and not options.noise_offset:
        yield "--adaptive_noise_scale is used only with --noise_offset"
    if options.huber_scale != 1 and (options.loss_type not in ROBUST or options.huber_schedule == "snr"):
        yield "--huber_scale is used only with --loss_type huber, smooth_l1 and --huber_schedule constant, exponential"
    if "masked_mean" in options.given and not (options.mask_data_dir or options.alpha_mask or options.concepts):
        yield "--masked_mean is used only with --mask_data_dir or --alpha_mask"
    if "multires_noise_discount" in options.given and not options.multires_noise_iterations:
        yield "--multires_noise_discount is used only with --multires_noise_iterations"
    sampling = options.timestep_sampling or "sigma"
    if options.sigmoid_scale is not None and sampling in ("sigma", "uniform"):
        yield f"--sigmoid_scale is used only with --timestep_sampling sigmoid, shift or flux_shift; got {sampling}"
    if options.discrete_flow_shift is not None and sampling not in ("sigma", "shift"):
        yield f"--discrete_flow_shift is used only with --timestep_sampling sigma or shift; got {sampling}"
    if (
        "weighting_scheme" in options.given
        and options.weighting_scheme in ("logit_normal", "mode")
        and sampling != "sigma"
    ):
        yield f"--weighting_scheme {options.weighting_scheme} and --timestep_sampling {sampling} both draw noise levels"


def bad_prompts(options: DreamBoothOptions) -> list[str]:
    """Lines of a file of prompts that do not parse."""
    try:
        if options.sample_prompts:
            read_prompts(options.sample_prompts)
    except BadInput as error:
        return error.problems
    return []
