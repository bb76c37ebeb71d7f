#!/usr/bin/env python
"""Teach a Stable Diffusion pipeline a subject by DreamBooth (arXiv 2208.12242) with LoRA or ResLoRA adapters.

    accelerate launch train_scripts/train_dreambooth_reslora.py \\
        --pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 \\
        --instance_data_dir my_dog --instance_prompt "a photo of sks dog" \\
        --with_prior_preservation --class_data_dir dogs --class_prompt "a photo of a dog" \\
        --train_text_encoder --rank 8 --shortcut block --max_train_steps 500 --mixed_precision bf16 \\
        --validation_prompt "a photo of sks dog in a bucket" --output_dir sks-dog

    # The same on two CPU cores, in a minute, on the embedded pipeline:
    python train_scripts/train_dreambooth_reslora.py \\
        --pretrained_model_name_or_path assets/sticker-sd --resolution 64 \\
        --instance_data_dir assets/subjects/octopus --instance_prompt "a sticker of sks animal" \\
        --train_text_encoder --rank 8 --learning_rate 1e-3 --max_train_steps 100 --output_dir sks-animal

What comes out, in --output_dir:

    pytorch_lora_weights.safetensors   pipe.load_lora_weights(output_dir), in plain diffusers
    kohya/<name>.safetensors           the same for ComfyUI and A1111
    merge_report.json                  what merging the shortcuts into a plain LoRA cost
    export_report.json                 what was proved about the two files
    run.json                           command, options, versions
    metrics.jsonl, loss.png            loss of every step, validation loss
    samples/, samples.png              validation pictures, as painted by what would be exported at that step
    checkpoint-N/                      training state, and the LoRA of that step

Equal seeds give equal pictures, noise and timesteps, whatever the method; a resumed run continues bit for bit.
"""

import sys
import time
from argparse import Namespace
from pathlib import Path

from reslora_diffusion.diffusion.checks import Plan, check
from reslora_diffusion.diffusion.options import parse
from reslora_diffusion.diffusion.preflight import preflight
from reslora_diffusion.diffusion.problems import EXIT_CODE, BadInput


def parse_args(argv: list[str] | None = None) -> Namespace:
    """Options from the command line and `--config`. `main` checks them."""
    return parse(argv)


def main(args: Namespace) -> Path:
    """Train, export, and return the output folder.

    Raises:
        BadInput: every problem with the options, the folders or the model.
    """
    plan = check(args)
    if args.dry_run:
        print("\n".join(preflight(plan, args)))
        return Path(args.output_dir)
    run, first_step = prepare(args, plan)
    print_once = run.accelerator.print
    started = time.monotonic()
    step = train(run, first_step)
    if step < plan.max_train_steps:
        print_once(f"stopped after step {step} of {plan.max_train_steps}; continue by --resume_from_checkpoint latest")
    elif run.accelerator.is_main_process:
        merged, exported = run.finish(step)
        seconds = time.monotonic() - started
        print(merged)
        print(f"{args.method} adapter of rank {exported.rank}: steps {first_step + 1} to {step} in {seconds:.0f} s")
        print("\n".join(f"{kind}: {path}" for kind, path in exported.files.items()))
        if args.push_to_hub:
            print(f"pushed to {run.push_to_hub()}")
    run.accelerator.end_training()
    return run.output


def prepare(args: Namespace, plan: Plan):
    """From options to a `Run` that is ready for its next step."""
    import torch
    from accelerate import Accelerator
    from accelerate.utils import ProjectConfiguration

    from reslora_diffusion.diffusion import models
    from reslora_diffusion.diffusion.adapters import add_adapters
    from reslora_diffusion.diffusion.checkpoints import find_checkpoint
    from reslora_diffusion.diffusion.examples import complete_class_pictures, encode_examples
    from reslora_diffusion.diffusion.history import History
    from reslora_diffusion.diffusion.loss import Denoiser
    from reslora_diffusion.diffusion.merging import Evaluation
    from reslora_diffusion.diffusion.record import options, stored_seed, write_record
    from reslora_diffusion.diffusion.run import Run, shown
    from reslora_diffusion.diffusion.sampling import Sampler
    from reslora_diffusion.diffusion.validation import Painter, fixed_noise_loss

    output = Path(args.output_dir)
    accelerator = Accelerator(
        mixed_precision="no",  # the base is cast as a whole; autocast over it costs time and memory
        log_with=None if args.report_to == "none" else args.report_to,
        project_config=ProjectConfiguration(str(output), logging_dir=str(output / args.logging_dir)),
    )
    accelerator.print("\n".join(preflight(plan, args, accelerator.num_processes)))
    checkpoint = find_checkpoint(output, args.resume_from_checkpoint) if args.resume_from_checkpoint else None
    if args.resume_from_checkpoint:
        accelerator.print(f"continuing from {checkpoint}" if checkpoint else "no checkpoint yet: starting afresh")
    args.seed = stored_seed(args.seed, checkpoint, accelerator)

    dtype = models.base_dtype(args)
    pipeline = models.load_pipeline(args, dtype)
    adapters = add_adapters(pipeline, args)
    classes = complete_class_pictures(plan, args, accelerator)
    models.prepare_models(pipeline, args, accelerator.device)
    examples = encode_examples(pipeline, plan.instance, classes, args, accelerator.is_local_main_process)
    scheduler = models.training_scheduler(pipeline)
    sampler = Sampler(
        *examples,
        seed=args.seed,
        scaling_factor=pipeline.vae.config.scaling_factor,
        num_train_timesteps=scheduler.config.num_train_timesteps,
        noise_offset=args.noise_offset,
    )
    denoiser = Denoiser(
        pipeline.unet, pipeline.text_encoder if args.train_text_encoder else None, scheduler, dtype, args.snr_gamma
    )
    painter = Painter(
        pipeline,
        args.validation_prompt or [],
        num_images=args.num_validation_images,
        resolution=args.resolution,
        seed=args.seed,
        num_inference_steps=args.num_inference_steps,
        guidance_scale=args.guidance_scale,
        text_is_frozen=not args.train_text_encoder,
        folder=output,
    )
    models.release(pipeline, args)

    evaluation = Evaluation.of(sampler, args)
    with adapters.evaluation():
        loss_base = fixed_noise_loss(denoiser, evaluation.validation)  # lora_B is still zero
    optimizer = models.make_optimizer(adapters, args, accelerator.num_processes)
    run = Run(
        args,
        plan,
        accelerator,
        adapters,
        denoiser,
        sampler,
        evaluation,
        painter,
        optimizer,
        lr_scheduler=models.make_lr_scheduler(optimizer, args, plan.max_train_steps),
        scaler=torch.amp.GradScaler(accelerator.device.type, enabled=dtype is torch.float16),
        loss_base=loss_base,
    )
    first_step = run.restore(checkpoint) if checkpoint else 0
    run.history = History(output if accelerator.is_main_process else None, first_step, every=...)
    return run, first_step
