"""Everything that can be found wrong before a model is loaded, in one message.

`check` looks at the options, the folders, the installed packages and the model's configurations and shapes, and
returns what the run will be trained on. Torch and diffusers, which take seconds to import, are imported only once there
is nothing wrong, or if only they know: settings of an optimizer, and a model whose files are not on this machine or in
no format that tells shapes.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from reslora_diffusion.export.header import read_headers
from reslora_diffusion.export.single_file import is_single_file

from ...rules import MERGE_EXACTLY, ShortcutFields
from ...utils import environment
from ...utils.hub import unreachable
from ...utils.names import file_name_problem
from ...utils.options import wrong_values
from ...utils.problems import BadInput, listing, refuse
from ..data.buckets import KOHYA_LIMITS, Size, make_buckets
from ..data.concepts import Concept, concepts_of, options_of
from ..data.hub_dataset import dataset_options
from ..data.scan import extension_problems
from ..models.architecture import Architecture, read_architecture
from ..models.variants import variant_problems
from ..train.checkpoints import broken_in, checkpoints_in, find_checkpoint, stored_facts
from ..train.record import differences
from ..train.schedules import conflict_problems, schedule_problems
from . import DreamBoothOptions
from .base_checks import is_on_this_machine, missing_models, take_single_file
from .inventory import inventory
from .kohya_checks import bad_data, bad_noise, bad_prompts, tag_problems
from .launcher import launcher_problems, world_size
from .model_checks import adapter_problems, model_problems
from .plan import Plan
from .quantisation import device_problems, quantisation_problems
from .token_checks import option_problems, prompt_problems, take_new_tokens
from .training import ONE_RATE, PACKAGED

STEPS_PER_IMAGE, FEWEST_STEPS, MOST_STEPS = 100, 500, 2000  # where no number of steps is given
OF_RESLORA = "shortcut num_previous merge_method distillation_steps handover".split()


@dataclass
class Findings:
    """The findings that need no torch. The architecture is None where the files of the model do not tell."""

    problems: list[str]
    concepts: list[Concept]
    architecture: Architecture | None = None
    buckets: list[Size] = field(default_factory=list)

    def fit(self, architecture: Architecture, options: DreamBoothOptions) -> None:
        """Find the sizes that the model is trained at; raises `BadInput` with what does not fit it."""
        problems, sizes, sized = [*model_problems(architecture, options)], list[Size](), []
        concepts: list[Concept | None] = [*self.concepts]
        for concept in concepts or [None]:  # without any, the options can still be held against the model
            own, grid = options_of(concept.own, options) if concept else options, architecture.grid
            if own.resolution != options.resolution and not grid.fits(own.resolution):
                problems.append(f"resolution of a concept: got {own.resolution}, wanted {grid} for this model")
            try:
                buckets = make_buckets(
                    own.aspect_ratio_buckets,
                    own.resolution,
                    grid,
                    **{name: getattr(own, name) for name in KOHYA_LIMITS},
                    bucket_no_upscale=own.bucket_no_upscale,
                )
                scans = filter(None, (concept.instance, concept.validation, concept.classes)) if concept else ()
                sizes += buckets.all(image.size for scan in scans for image in scan.images)
                sized += [replace(concept, buckets=buckets)] if concept else []
            except BadInput as error:
                problems += error.problems
        refuse(problems)
        self.concepts, self.buckets = sized, [*dict.fromkeys(sizes)] or [(options.resolution, options.resolution)]

    def refuse(self, options: DreamBoothOptions) -> None:
        """Raise `BadInput` if there is any problem, with what is in the folders."""
        if self.problems:
            square = options.resolution >= 1 and not options.aspect_ratio_buckets  # the model decides on other sizes
            sizes = self.buckets or ([(options.resolution, options.resolution)] if square else [])
            raise BadInput(dict.fromkeys(self.problems), [*options.notes, *inventory(self.concepts, options, sizes)])


def quick_check(options: DreamBoothOptions) -> Findings:
    """Fill in the defaults of the model's family, and look for problems without torch.

    Raises:
        BadInput: every problem found, unless torch may know of more.
    """
    missing = missing_models(options)
    take_single_file(options, missing)
    architecture, misfits = None, []
    try:
        without = options.changed(**dict.fromkeys(missing))  # the rest can still be held against each other
        if without.pretrained_model_name_or_path and (architecture := read_architecture(without)):
            options.take_defaults(architecture.family)
    except BadInput as error:
        misfits = error.problems
    known = bool(missing or options.problems or misfits or architecture)
    found = Findings([*missing.values(), *options.problems], [], architecture)
    for find in (bad_values, bad_combinations, option_problems, bad_noise, bad_data, bad_prompts):
        found.problems += find(options)
    for find in (adapter_problems, missing_packages, quantisation_problems, bad_output):
        found.problems += find(options)
    found.problems += [*variant_problems(options), *launcher_problems(options), *bad_weights(options)]
    try:
        found.concepts = concepts_of(options)
    except BadInput as error:
        found.problems += error.problems
    found.problems += dict.fromkeys(problem for concept in found.concepts for problem in concept.problems)
    found.problems += prompt_problems(options, found.concepts)
    found.problems += tag_problems(options, found.concepts)
    try:
        if architecture:
            found.fit(architecture, options.changed(**dict.fromkeys(missing)))
    except BadInput as error:
        misfits = error.problems
    found.problems += misfits
    steps = None if found.problems else length(options, found.concepts)[0]
    asked = steps or (None if "max_train_steps" in wrong_values(options) else options.max_train_steps)
    found.problems += [*schedule_problems(options, architecture, asked), *conflict_problems(options)]
    if steps is not None:
        found.problems += past_the_end(options, steps)
    if found.problems and known and (options.optimizer_args or options.network_weights):
        found.problems += slow_problems(options, found.architecture)
    if known:
        found.refuse(options)
    return found


def check(options: DreamBoothOptions, found: Findings | None = None) -> Plan:
    """The plan of a run; raises `BadInput` with every problem found, and with what was found in the folders."""
    found = found or quick_check(options)
    name, single = options.config_source, is_single_file(options.pretrained_model_name_or_path)
    if not Path(name).is_dir() and (why := unreachable()) and not is_on_this_machine(options):
        flag = "--base_config" if single else "--pretrained_model_name_or_path"
        found.problems.append(f"{flag} {name}: it is not on this machine, and {why}")
        found.refuse(options)
    from ..models.meta_pipeline import load_meta_pipeline

    base = None
    try:
        base = load_meta_pipeline(options)
        options.take_defaults(base.family)
        found.problems += [problem for problem in options.problems if problem not in found.problems]
        if found.architecture is None:
            found.problems += [*bad_output(options), *schedule_problems(options, base, None)]
        found.problems += take_new_tokens(options, base)
        if not found.buckets:
            found.fit(base, options)
    except BadInput as error:
        found.problems += error.problems
    found.problems += slow_problems(options, base)
    if base is not None and options.schedule and not found.problems:
        from ..train.pruning import pruning_problems

        found.problems += pruning_problems(options, base)
    found.refuse(options)
    assert base is not None  # without one there were problems
    plan = Plan(found.concepts, found.buckets, *length(options, found.concepts), base)
    if "num_train_epochs" not in options.given:
        options.max_train_steps = plan.max_train_steps  # to be recorded, so that the run can be repeated
    return plan


def length(options: DreamBoothOptions, concepts: list[Concept]) -> tuple[int, int]:
    """Steps of a run, and of a pass over the data."""
    examples = max(sum(c.instances for c in concepts), sum(c.num_class_images for c in concepts))
    per_epoch = math.ceil(examples / (options.train_batch_size * options.gradient_accumulation_steps * world_size()))
    if options.max_train_steps is None and "num_train_epochs" not in options.given:
        return chosen_steps(concepts), per_epoch
    return options.max_train_steps or options.num_train_epochs * per_epoch, per_epoch


def chosen_steps(concepts: list[Concept]) -> int:
    """Steps where none were asked for: diffusers' examples train five images of a subject for 500 steps, whatever the
    batch."""
    images = sum(len(concept.trained) for concept in concepts)
    return min(MOST_STEPS, max(FEWEST_STEPS, STEPS_PER_IMAGE * images))


def slow_problems(options: DreamBoothOptions, architecture: Architecture | None) -> list[str]:
    """Problems that only torch can find: settings that an optimizer does not take, a first LoRA that does not fit."""
    from ..train.optimizers import optimizer_problems

    problems = optimizer_problems(options)
    if options.quantization:
        from accelerate import PartialState

        problems += device_problems(options, PartialState().device.type)
    if options.network_weights and architecture:
        from ..models.warm_start import weights_problems

        problems += weights_problems(options, architecture)
    return problems


def past_the_end(options: DreamBoothOptions, steps: int) -> Iterator[str]:
    """A checkpoint that has more steps behind it than the run is to have."""
    wanted = options.resume_from_checkpoint
    checkpoint = find_checkpoint(Path(options.output_dir), wanted) if wanted else None
    if checkpoint and (done := stored_facts(checkpoint)["step"]) > steps:
        yield f"--resume_from_checkpoint: {checkpoint.name} has {done} steps behind it; this run is to end at {steps}"


def bad_values(options: DreamBoothOptions) -> Iterator[str]:
    yield from options.value_problems()
    if options.resolution >= 1 and options.resolution % 8:
        yield f"--resolution: got {options.resolution}, wanted a multiple of 8"
    if options.export_name and (problem := file_name_problem(options.export_name)):
        yield f"--export_name: got {problem}"
    yield from extension_problems("--caption_extension", options.caption_extension)


def stopping_problems(options: DreamBoothOptions) -> Iterator[str]:
    """Conflicts with text encoders that are stopped part-way."""
    if not options.train_text_encoder:
        yield "--train_text_encoder_frac is used only with --train_text_encoder"
    if options.cuda_graph:
        yield "--train_text_encoder_frac: a recorded step has the prompts it was recorded with; got --cuda_graph"
    if options.schedule and not options.schedule.startswith("fold"):
        yield f"--train_text_encoder_frac: --schedule {options.schedule} changes adapters that are to stay as they are"


def bad_combinations(options: DreamBoothOptions) -> Iterator[str]:
    if not options.instance_data_dir and not options.concepts and not options.dataset_name:
        yield "--instance_data_dir is required, or --concepts, or --dataset_name"
    yield from dataset_options(options)
    if options.instance_data_dir and options.concepts:
        yield "--instance_data_dir and --concepts both say what to train on; wanted one of them"
    if options.with_prior_preservation and not options.class_data_dir and not options.concepts:
        yield "--with_prior_preservation needs --class_data_dir"
    if options.train_text_encoder and options.pre_compute_text_embeddings:
        yield "--pre_compute_text_embeddings cannot be used with --train_text_encoder: the embeddings change"
    for name in ("text_encoder_lr", "adam_weight_decay_text_encoder"):
        if getattr(options, name) is not None and name in options.given and not options.trains_text:
            yield f"--{name} is used only with --train_text_encoder or --train_text_encoder_ti"
    if options.train_text_encoder_frac != 1:
        yield from stopping_problems(options)
    if options.conv_alpha is not None and options.conv_rank is None:
        yield "--conv_alpha is used only with --conv_rank"
    if options.method == "lora" and not options.compare:
        for name in OF_RESLORA:
            if getattr(options, name) is not None:
                yield f"--{name} is used only with --method reslora"
    if options.network_weights and options.method == "reslora" and options.shortcut != "none":
        yield "--network_weights starts a plain LoRA, and a shortcut would change it; wanted --method lora"
    if options.validation_data_dir and options.validation_split:
        yield "--validation_split and --validation_data_dir both say what to validate on; wanted one of them"
    if options.validation_data_dir and (options.concepts or options.dataset_name):
        yield "--validation_data_dir is for the one subject of --instance_data_dir; wanted --validation_split"
    if options.keep_best and not (options.validation_split or options.validation_data_dir):
        yield "--keep_best needs images that are not trained on: --validation_split 0.2, or --validation_data_dir"
    if options.keep_best and options.distillation_steps:
        yield "--distillation_steps refines the last step, --keep_best may export an earlier one; wanted one of them"
    if options.distillation_steps and not options.compare:
        if (options.shortcut or ShortcutFields.shortcut) in MERGE_EXACTLY or options.handover:
            yield "--distillation_steps refines a merge that is not exact; got --shortcut none or block, or --handover"
        if options.merge_method in ("drop", "paper_weight"):
            yield f"--distillation_steps refines what was fitted on data; got --merge_method {options.merge_method}"
        if options.calibration_batches < 2:
            yield "--distillation_steps holds out one of --calibration_batches; got 1, wanted 2 or more"
    if options.optimizer in ONE_RATE:  # they raise at their first step
        for name, one in (("text_encoder_lr", options.learning_rate), ("loraplus_lr_ratio", 1.0), ("lr_pattern", {})):
            if (value := getattr(options, name)) not in (None, one):
                yield (
                    f"--{name}: {options.optimizer} has one learning rate, --learning_rate, for all parameters; "
                    f"got {value}"
                )
    if options.use_ema and "schedulefree" in options.optimizer.lower():
        yield f"--use_ema averages weights, and so does --optimizer {options.optimizer}; wanted one of them"
    if options.cuda_graph and options.gradient_checkpointing and options.lora_dropout:
        yield "--cuda_graph with --gradient_checkpointing cannot repeat a dropout; got --lora_dropout, wanted 0"
    if options.snr_gamma is not None and options.debiased_estimation_loss:
        yield "--snr_gamma and --debiased_estimation_loss both weight the loss; wanted one of them"
    if options.use_8bit_adam and options.optimizer not in ("adamw", "adamw8bit"):
        yield f"--use_8bit_adam is --optimizer adamw8bit, got --optimizer {options.optimizer}"
    if options.report_to == "wandb" and options.hub_token:
        yield "--hub_token would be exposed to --report_to wandb; log in by `hf auth login` instead"


def missing_packages(options: DreamBoothOptions) -> Iterator[str]:
    needed = []
    name = "adamw8bit" if options.use_8bit_adam else options.optimizer
    if found := PACKAGED.get(name):
        flag = "--use_8bit_adam" if options.use_8bit_adam else f"--optimizer {name}"
        needed.append((flag, found.module.partition(".")[0], found.package))
    if options.enable_xformers_memory_efficient_attention:
        needed.append(("--enable_xformers_memory_efficient_attention", "xformers", "xformers"))
    if "report_to" in options.given and options.report_to in ("tensorboard", "wandb", "comet_ml"):
        needed.append((f"--report_to {options.report_to}", options.report_to, options.report_to))
    yield from environment.missing_packages(needed)


def bad_weights(options: DreamBoothOptions) -> Iterator[str]:
    """A file to start from that is no LoRA."""
    try:
        if options.network_weights:
            read_headers(options.network_weights)
    except (OSError, ValueError) as error:
        yield f"--network_weights {options.network_weights}: {error}"


def bad_output(options: DreamBoothOptions) -> Iterator[str]:
    kept = Path(options.encoding_cache_dir) if options.encoding_cache_dir else None
    if kept and kept.exists() and not kept.is_dir():
        yield f"--encoding_cache_dir: {kept} is a file, wanted a folder"
    output = Path(options.output_dir)
    if output.exists() and not output.is_dir():
        yield f"--output_dir: {output} is a file, wanted a folder"
        return
    if problem := environment.unwritable(output):
        yield f"--output_dir: {output} cannot be made or written to: {problem}"
        return
    if options.resume_from_checkpoint:
        checkpoint = find_checkpoint(output, options.resume_from_checkpoint)
        if checkpoint:
            yield from differences(options, checkpoint)
        elif options.resume_from_checkpoint != "latest":
            there = listing(path.name for path in checkpoints_in(output)) or "none"
            broken = f"; damaged: {listing(found)}" if (found := broken_in(output)) else ""
            yield (
                f"--resume_from_checkpoint: {options.resume_from_checkpoint} is no complete checkpoint, neither as it "
                f"stands nor in {output}; there: {there}{broken}"
            )
    elif (old := checkpoints_in(output)) and not options.dry_run:
        yield (
            f"--output_dir: {output} holds {listing(path.name for path in old)} of an earlier run; wanted another "
            "folder, or --resume_from_checkpoint latest to continue it"
        )
