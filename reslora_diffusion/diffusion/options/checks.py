"""Everything that can be found wrong before a model is loaded, in one message.

`check(args)` looks at the options, the folders, the installed packages and the model's configurations and shapes, and
returns what the run will be trained on. Torch and diffusers, which take seconds to import, are imported only once there
is nothing wrong, or if only they know: settings of an optimizer, and a model whose files are not on this machine or in
no format that tells shapes.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from reslora_diffusion.export.header import read_headers

from ...rules import ShortcutFields
from ...utils import environment
from ...utils.hub import unreachable
from ...utils.model_files import Files
from ...utils.names import file_name_problem
from ...utils.problems import BadInput, listing, refuse
from ..data.buckets import Size, parse_buckets
from ..data.concepts import Concept, concepts_of
from ..data.hub_dataset import dataset_options
from ..data.scan import extension_problems
from ..models.outline import Outline, read_outline
from ..models.variants import variant_problems
from ..train.checkpoints import broken_in, checkpoints_in, find_checkpoint, stored_facts
from ..train.record import differences
from ..train.schedules import schedule_problems
from . import DreamBoothOptions
from .inventory import inventory
from .launcher import launcher_problems, world_size
from .model_checks import adapter_problems, model_problems
from .training import OPTIMIZER_PACKAGES

if TYPE_CHECKING:
    from ..models.skeleton import Skeleton

OF_RESLORA = "shortcut num_previous merge_method distillation_steps handover".split()


@dataclass(frozen=True)
class Plan:
    """What a run is trained on, and for how long."""

    concepts: list[Concept]
    buckets: list[Size]
    max_train_steps: int
    steps_per_epoch: int
    skeleton: "Skeleton"


@dataclass
class Findings:
    """What was found without torch. The outline is None where the files of the model do not tell."""

    problems: list[str]
    concepts: list[Concept]
    outline: Outline | None = None
    buckets: list[Size] = field(default_factory=list)

    def refuse(self, args: DreamBoothOptions) -> None:
        """Raise `BadInput` if there is any problem, with what is in the folders."""
        if self.problems:
            square = args.resolution >= 1 and not args.aspect_ratio_buckets  # other sizes are told by the model
            sizes = self.buckets or ([(args.resolution, args.resolution)] if square else [])
            raise BadInput(dict.fromkeys(self.problems), inventory(self.concepts, args, sizes))


def quick_check(args: DreamBoothOptions) -> Findings:
    """Fill in the defaults of the model's family, and look for problems without torch.

    Raises:
        BadInput: every problem found, unless torch may know of more.
    """
    missing = missing_models(args)
    outline, misfits = None, []
    try:
        without = args.changed(**dict.fromkeys(missing))  # the rest can still be held against each other
        if without.pretrained_model_name_or_path and (outline := read_outline(without)):
            args.take_defaults(outline.family)
    except BadInput as error:
        misfits = error.problems
    known = bool(missing or args.problems or misfits or outline)
    found = Findings([*missing.values(), *args.problems], [], outline)
    for find in (bad_values, bad_combinations, adapter_problems, missing_packages, bad_output):
        found.problems += find(args)
    found.problems += [*variant_problems(args), *launcher_problems(args), *bad_weights(args)]
    try:
        found.concepts = concepts_of(args)
    except BadInput as error:
        found.problems += error.problems
    found.problems += dict.fromkeys(problem for concept in found.concepts for problem in concept.problems)
    try:
        if outline:
            found.buckets = fit(outline, args.changed(**dict.fromkeys(missing)))
    except BadInput as error:
        misfits = error.problems
    found.problems += misfits
    steps = None if found.problems else length(args, found.concepts)[0]
    found.problems += schedule_problems(args, outline, steps)
    if steps is not None:
        found.problems += past_the_end(args, steps)
    if found.problems and known and (args.optimizer_args or args.network_weights):
        found.problems += slow_problems(args, found.outline)
    if known:
        found.refuse(args)
    return found


def is_on_this_machine(args: DreamBoothOptions) -> bool:
    """Whether the model is a folder or in the hub's cache; else it takes the hub, and time, to learn more."""
    return Files(args.pretrained_model_name_or_path or "", args.revision).path("model_index.json") is not None


def check(args: DreamBoothOptions, found: Findings | None = None) -> Plan:
    """The plan of a run; raises `BadInput` with every problem found, and with what was found in the folders."""
    found = found or quick_check(args)
    name = args.pretrained_model_name_or_path or ""
    if not Path(name).is_dir() and (why := unreachable()) and not is_on_this_machine(args):
        found.problems.append(f"--pretrained_model_name_or_path {name}: it is not on this machine, and {why}")
        found.refuse(args)
    from ..models.skeleton import load_skeleton

    skeleton = None
    try:
        skeleton = load_skeleton(args)
        args.take_defaults(skeleton.family)
        if found.outline is None:
            found.problems += [*bad_output(args), *schedule_problems(args, skeleton, None)]
        found.buckets = found.buckets or fit(skeleton, args)
    except BadInput as error:
        found.problems += error.problems
    found.problems += slow_problems(args, skeleton)
    found.refuse(args)
    assert skeleton is not None  # without one there were problems
    return Plan(found.concepts, found.buckets, *length(args, found.concepts), skeleton)


def length(args: DreamBoothOptions, concepts: list[Concept]) -> tuple[int, int]:
    """Steps of a run, and of a pass over the data."""
    examples = max(sum(c.instances for c in concepts), sum(c.num_class_images for c in concepts))
    per_epoch = math.ceil(examples / (args.train_batch_size * args.gradient_accumulation_steps * world_size()))
    return args.max_train_steps or args.num_train_epochs * per_epoch, per_epoch


# What makes a folder of a single file.
CLASSES_BY_OPTION = {
    "pretrained_model_name_or_path": "StableDiffusionPipeline",
    "pretrained_vae_model_name_or_path": "AutoencoderKL",
    "tokenizer_name": "",
}


def missing_models(args: DreamBoothOptions) -> dict[str, str]:
    """Why there is nothing to look at under an option, as far as this machine can tell."""
    problems = {}
    for option in CLASSES_BY_OPTION:
        name = getattr(args, option) or ""
        folder = Path(name)
        if re.match(r"https?://", name):
            problems[option] = f"--{option}: {name} is an address; wanted a folder, or the hub's OWNER/NAME"
        elif folder.is_file():
            kind = CLASSES_BY_OPTION[option]
            problems[option] = f"--{option}: {name} is a single file; wanted a folder or a hub name" + (
                f" ({kind}.from_single_file({folder.name!r}).save_pretrained('folder') makes one)" if kind else ""
            )
        elif name and not folder.is_dir() and (folder.is_absolute() or name.startswith(".") or len(folder.parts) > 2):
            problems[option] = f"--{option}: {name} is missing; wanted a folder or a hub name"
    option, name = "pretrained_model_name_or_path", args.pretrained_model_name_or_path
    if not name:
        problems[option] = f"--{option} is required"
    elif Path(name).is_dir() and not Path(name, "model_index.json").is_file():
        problems[option] = f"--{option}: {name} has no model_index.json; wanted a diffusers pipeline"
    return problems


def fit(outline: Outline, args: DreamBoothOptions) -> list[Size]:
    """Sizes that the model is trained at; raises `BadInput` with what does not fit it."""
    problems, buckets = [*model_problems(outline, args)], [(args.resolution, args.resolution)]
    try:
        if args.aspect_ratio_buckets:
            buckets = parse_buckets(args.aspect_ratio_buckets, args.resolution, outline.grid)
    except BadInput as error:
        problems += error.problems
    refuse(problems)
    return buckets


def slow_problems(args: DreamBoothOptions, outline: Outline | None) -> list[str]:
    """What takes torch to find: settings that an optimizer does not take, a LoRA to start from that does not fit."""
    from ..train.optimizers import optimizer_problems

    problems = optimizer_problems(args)
    if args.network_weights and outline:
        from ..models.warm_start import weights_problems

        problems += weights_problems(args, outline)
    return problems


def past_the_end(args: DreamBoothOptions, steps: int) -> Iterator[str]:
    """A checkpoint that has more steps behind it than the run is to have."""
    wanted = args.resume_from_checkpoint
    checkpoint = find_checkpoint(Path(args.output_dir), wanted) if wanted else None
    if checkpoint and (done := stored_facts(checkpoint)["step"]) > steps:
        yield f"--resume_from_checkpoint: {checkpoint.name} has {done} steps behind it; this run is to end at {steps}"


def bad_values(args: DreamBoothOptions) -> Iterator[str]:
    yield from args.value_problems()
    if args.resolution >= 1 and args.resolution % 8:
        yield f"--resolution: got {args.resolution}, wanted a multiple of 8"
    if args.export_name and (problem := file_name_problem(args.export_name)):
        yield f"--export_name: got {problem}"
    yield from extension_problems("--caption_extension", args.caption_extension)


def bad_combinations(args: DreamBoothOptions) -> Iterator[str]:
    if not args.instance_data_dir and not args.concepts and not args.dataset_name:
        yield "--instance_data_dir is required, or --concepts, or --dataset_name"
    yield from dataset_options(args)
    if args.instance_data_dir and args.concepts:
        yield "--instance_data_dir and --concepts both say what to train on; wanted one of them"
    if args.with_prior_preservation and not args.class_data_dir and not args.concepts:
        yield "--with_prior_preservation needs --class_data_dir"
    if args.train_text_encoder and args.pre_compute_text_embeddings:
        yield "--pre_compute_text_embeddings cannot be used with --train_text_encoder: the embeddings change"
    for name in ("text_encoder_lr", "adam_weight_decay_text_encoder"):
        if getattr(args, name) is not None and name in args.given and not args.train_text_encoder:
            yield f"--{name} is used only with --train_text_encoder"
    if args.keep_tokens and not args.shuffle_caption:
        yield "--keep_tokens is used only with --shuffle_caption"
    if args.method == "lora" and not args.compare:
        for name in OF_RESLORA:
            if getattr(args, name) is not None:
                yield f"--{name} is used only with --method reslora"
    if args.network_weights and args.method == "reslora" and args.shortcut != "none":
        yield "--network_weights starts a plain LoRA, and a shortcut would change it; wanted --method lora"
    if args.distillation_steps and not args.compare:
        if (args.shortcut or ShortcutFields.shortcut) in ("none", "block") or args.handover:
            yield "--distillation_steps refines a merge that is not exact; got --shortcut none or block, or --handover"
        if args.merge_method in ("drop", "paper_weight"):
            yield f"--distillation_steps refines what was fitted on data; got --merge_method {args.merge_method}"
        if args.calibration_batches < 2:
            yield "--distillation_steps holds out one of --calibration_batches; got 1, wanted 2 or more"
    if args.optimizer == "prodigy":  # it raises at its first step
        for name, one in (("text_encoder_lr", args.learning_rate), ("loraplus_lr_ratio", 1.0), ("lr_pattern", {})):
            if (value := getattr(args, name)) not in (None, one):
                yield f"--{name}: prodigy has one learning rate, --learning_rate, for all parameters; got {value}"
    if args.cuda_graph and args.gradient_checkpointing and args.lora_dropout:
        yield "--cuda_graph with --gradient_checkpointing cannot repeat a dropout; got --lora_dropout, wanted 0"
    if args.snr_gamma is not None and args.debiased_estimation_loss:
        yield "--snr_gamma and --debiased_estimation_loss both weight the loss; wanted one of them"
    if args.use_8bit_adam and args.optimizer not in ("adamw", "adamw8bit"):
        yield f"--use_8bit_adam is --optimizer adamw8bit, got --optimizer {args.optimizer}"
    if args.report_to == "wandb" and args.hub_token:
        yield "--hub_token would be exposed to --report_to wandb; log in by `hf auth login` instead"


def missing_packages(args: DreamBoothOptions) -> Iterator[str]:
    needed = []
    if package := "bitsandbytes" if args.use_8bit_adam else OPTIMIZER_PACKAGES.get(args.optimizer):
        needed.append(("--use_8bit_adam" if args.use_8bit_adam else f"--optimizer {args.optimizer}", package))
    if args.enable_xformers_memory_efficient_attention:
        needed.append(("--enable_xformers_memory_efficient_attention", "xformers"))
    if "report_to" in args.given and args.report_to in ("tensorboard", "wandb", "comet_ml"):
        needed.append((f"--report_to {args.report_to}", args.report_to))
    yield from environment.missing_packages(needed)


def bad_weights(args: DreamBoothOptions) -> Iterator[str]:
    """A file to start from that is no LoRA."""
    try:
        if args.network_weights:
            read_headers(args.network_weights)
    except (OSError, ValueError) as error:
        yield f"--network_weights {args.network_weights}: {error}"


def bad_output(args: DreamBoothOptions) -> Iterator[str]:
    kept = Path(args.encoding_cache_dir) if args.encoding_cache_dir else None
    if kept and kept.exists() and not kept.is_dir():
        yield f"--encoding_cache_dir: {kept} is a file, wanted a folder"
    output = Path(args.output_dir)
    if output.exists() and not output.is_dir():
        yield f"--output_dir: {output} is a file, wanted a folder"
        return
    if problem := environment.unwritable(output):
        yield f"--output_dir: {output} cannot be made or written to: {problem}"
        return
    if args.resume_from_checkpoint:
        checkpoint = find_checkpoint(output, args.resume_from_checkpoint)
        if checkpoint:
            yield from differences(args, checkpoint)
        elif args.resume_from_checkpoint != "latest":
            there = listing(path.name for path in checkpoints_in(output)) or "none"
            broken = f"; damaged: {listing(found)}" if (found := broken_in(output)) else ""
            yield (
                f"--resume_from_checkpoint: {args.resume_from_checkpoint} is no complete checkpoint, neither as it "
                f"stands nor in {output}; there: {there}{broken}"
            )
    elif (old := checkpoints_in(output)) and not args.dry_run:
        yield (
            f"--output_dir: {output} holds {listing(path.name for path in old)} of an earlier run; wanted another "
            "folder, or --resume_from_checkpoint latest to continue it"
        )
