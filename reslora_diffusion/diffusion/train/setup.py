"""Options become a run in four steps, which a program calls in this order:

start     the launcher's processes, the checkpoint to go on from, the seed      -> Start
load      the pipeline with its adapters, on the device                         -> Loaded
encode    images and prompts, encoded once, and who draws batches of them       -> Data
build     what is trained and how, validation, optimizer                        -> Run
"""

import time
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration

from ...rules import ShortcutFields
from ...utils.hub import create_repository
from ..data.concepts import Concept
from ..data.examples import Encoded, complete_class_images, encode_examples
from ..data.sampling import Sampler
from ..models import load as models
from ..models.adapters import Adapters, add_adapters
from ..models.warm_start import start_from
from ..objective.drawn_noise import NoiseRecipe
from ..objective.loss import Denoiser, Objective
from ..options import DreamBoothOptions
from ..options.plan import Plan
from ..options.preflight import expectation, kept_for_backward, preflight, tracker_of
from .changes import data_changes, data_of
from .checkpoints import broken_in, find_checkpoint, restoring, stored_facts
from .ema import Ema
from .history import History
from .merging import Evaluation
from .optimizers import make_optimizer
from .record import resolve_seed, trackable, write_record
from .session import Run
from .validation import ValidationImages, prompts_of_run, read_words

# Without fp16 a GradScaler does no more than leave out a step whose gradients are not finite.
UNSCALED: dict[str, Any] = {"init_scale": 1.0, "growth_interval": 2**30}


class Start(NamedTuple):
    """The beginning of a run: step 0, or the step of a checkpoint."""

    options: DreamBoothOptions
    plan: Plan
    accelerator: Accelerator
    checkpoint: Path | None
    step: int


class Loaded(NamedTuple):
    """Models on their device; `process` is how noise is added to latents."""

    dtype: torch.dtype
    pipeline: Any
    process: Any
    adapters: Adapters


class Data(NamedTuple):
    """The examples that batches are drawn from; `facts` describe them for checkpoints."""

    encoded: Encoded
    sampler: Sampler
    facts: dict[str, Any]


def start(options: DreamBoothOptions, plan: Plan) -> Start:
    """Print the preflight; find the checkpoint and the seed; create the repository to push to."""
    output = Path(options.output_dir)
    tracker = tracker_of(options)
    accelerator = Accelerator(
        mixed_precision="no",  # the base is cast as a whole; autocast over it costs time and memory
        log_with=None if tracker == "none" else tracker,
        project_config=ProjectConfiguration(str(output), logging_dir=str(output / options.logging_dir)),
    )
    accelerator.print("\n".join(preflight(plan, options, accelerator.num_processes)))
    checkpoint = find_checkpoint(output, options.resume_from_checkpoint) if options.resume_from_checkpoint else None
    if options.resume_from_checkpoint:
        if broken := broken_in(output):
            accelerator.print(f"passed over, as they are not whole: {', '.join(broken)}")
        accelerator.print(f"continuing from {checkpoint}" if checkpoint else "no checkpoint yet: starting afresh")
    options.seed = resolve_seed(options, checkpoint, accelerator)
    if options.method == "reslora":
        options.shortcut = options.shortcut or str(ShortcutFields.shortcut)  # to be recorded
    options.validation_guidance_scale = plan.base.family.validation_guidance(options)
    if options.push_to_hub and accelerator.is_main_process:
        # Better to learn now than in the end that it cannot be written to.
        options.hub_model_id = create_repository(options.hub_model_id, options.output_dir, options.hub_token)
    return Start(options, plan, accelerator, checkpoint, stored_facts(checkpoint)["step"] if checkpoint else 0)


def load(begun: Start) -> tuple[Loaded, list[Concept], dict[str, Any]]:
    """The pipeline with adapters, and the concepts with class images; these are generated where they are missing."""
    options, plan, accelerator, checkpoint, _ = begun
    dtype, family = models.base_dtype(options), plan.base.family
    concepts = complete_class_images(plan.concepts, options, accelerator)
    facts = data_of(concepts)
    for change in data_changes(stored_facts(checkpoint).get("data"), facts) if checkpoint else ():
        accelerator.print(change)
    pipeline = models.load_pipeline(options, dtype)
    process = family.process(pipeline, options)
    adapters = add_adapters(pipeline, plan.base, options)
    accelerator.print("\n".join(adapters.links()))
    models.prepare_models(pipeline, family, adapters.trained, options, accelerator.device)
    return Loaded(dtype, pipeline, process, adapters), concepts, facts


def encode(begun: Start, loaded: Loaded, concepts: list[Concept], facts: dict[str, Any]) -> Data:
    """Encode every image and prompt once."""
    options, plan, accelerator = begun.options, begun.plan, begun.accelerator
    encoded = encode_examples(loaded.pipeline, plan, concepts, options, accelerator.is_local_main_process)
    assert options.seed is not None, "`resolve_seed` has set it"
    factor, shift = plan.base.family.normalisation(loaded.pipeline.vae)
    sampler = Sampler(
        encoded.instances,
        encoded.classes,
        seed=options.seed,
        scaling_factor=factor,
        shift_factor=shift,
        process=loaded.process,
        empty=encoded.empty,
        caption_dropout=options.caption_dropout_rate,
        dropped_pass=options.caption_dropout_every_n_epochs,
        draws_per_step=options.train_batch_size * options.gradient_accumulation_steps * accelerator.num_processes,
        recipe=NoiseRecipe(**{item.name: getattr(options, item.name) for item in fields(NoiseRecipe)}),
    )
    return Data(encoded, sampler, facts)


def denoiser_of(begun: Start, loaded: Loaded) -> Denoiser:
    """The model whose loss is minimised."""
    options, family, pipeline = begun.options, begun.plan.base.family, loaded.pipeline
    objective = Objective(**{item.name: getattr(options, item.name) for item in fields(Objective)})
    model = family.denoiser_of(pipeline)
    names = family.token_encoders(options) if options.trains_text else ()
    trained = tuple(getattr(pipeline, name) for name in names)
    guidance = family.training_guidance(model.config, options)
    return Denoiser(family, model, trained, loaded.process, loaded.dtype, objective, guidance_scale=guidance)


def validation_images_of(begun: Start, loaded: Loaded) -> ValidationImages:
    """Make the object that generates validation images."""
    options, family, pipeline = begun.options, begun.plan.base.family, loaded.pipeline
    prompts = prompts_of_run(options)
    assert options.seed is not None, "`resolve_seed` has set it"
    assert options.validation_guidance_scale is not None, "`start` has set it to the family's"
    return ValidationImages(
        pipeline,
        family,
        prompts,
        resolution=options.resolution,
        grid=begun.plan.base.grid,
        seed=options.seed,
        num_inference_steps=options.num_inference_steps,
        guidance_scale=options.validation_guidance_scale,
        text_is_frozen=not options.trains_text,
        folder=Path(options.output_dir),
        tokens=read_words(family, pipeline, prompts, options),
    )


def build(begun: Start, loaded: Loaded, data: Data) -> Run:
    """The run at its first step, or as its checkpoint has it."""
    options, plan, accelerator, checkpoint, step = begun
    adapters, main = loaded.adapters, accelerator.is_main_process
    denoiser, validation_images = denoiser_of(begun, loaded), validation_images_of(begun, loaded)
    models.release(loaded.pipeline, adapters.trained, validation_images.wanted)
    output = Path(options.output_dir)
    if main:
        output.mkdir(parents=True, exist_ok=True)
        write_record(options, {"steps": plan.max_train_steps, "processes": accelerator.num_processes})
        validation_images.forget_after(step)
    accelerator.init_trackers("dreambooth-reslora", config=trackable(options))
    sampler, processes = data.sampler, (accelerator.process_index, accelerator.num_processes)
    evaluation = Evaluation.of(sampler, options, data.encoded.held_out, *processes)
    with adapters.evaluation():
        first, *others = evaluation.validation
        losses = [denoiser.losses(first)]  # the first forward also chooses kernels, and is not timed
        started = time.monotonic()
        losses += [denoiser.losses(batch) for batch in others]
        loss_base = torch.cat(losses).mean().item()  # every lora_B is still zero
        models.refuse_base(options, loaded.dtype, loss_base)
        seconds = time.monotonic() - started
    if options.network_weights and not checkpoint:
        accelerator.print(f"{options.network_weights} fills {start_from(options.network_weights, adapters)} layers")
    kept = kept_for_backward(denoiser, sampler.batches(0, options.train_batch_size))
    forwards = sum(len(batch.latents) for batch in others)
    accelerator.print(expectation(plan, options, seconds, forwards, kept))
    fp16, gpu = loaded.dtype is torch.float16, accelerator.device.type != "cpu"
    run = Run(
        options,
        plan,
        accelerator,
        adapters,
        denoiser,
        sampler,
        evaluation,
        validation_images,
        optimizer=make_optimizer(adapters.by_component(), options, accelerator.num_processes, adapters.pairs()),
        scaler=torch.amp.GradScaler(accelerator.device.type, **({} if fp16 else UNSCALED)),
        history=History(output if main else None, step, every=10 if gpu else 1, overflows=fp16),
        ema=Ema(adapters.tensors(), options.ema_decay) if options.use_ema else None,
        loss_base=loss_base,
        data=data.facts,
    )
    if checkpoint:
        with restoring(checkpoint):
            run.restore(checkpoint)
    return run
