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
docs/training.md says more.
"""

import os
import sys
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from reslora_diffusion.diffusion.options import DreamBoothOptions, parse
from reslora_diffusion.utils.problems import Interrupted, is_first_process, nothing_to_lose, run_program

# Remarks of the libraries on packages that are not needed here; errors are still shown.
for library in ("TRANSFORMERS", "DIFFUSERS"):
    os.environ.setdefault(f"{library}_VERBOSITY", "error")

if TYPE_CHECKING:  # what needs torch is imported where it is used: `--help` should answer at once
    from torch import Tensor

    from reslora_diffusion.diffusion.data.sampling import Batch
    from reslora_diffusion.diffusion.objective.loss import Denoiser
    from reslora_diffusion.diffusion.options.checks import Plan
    from reslora_diffusion.diffusion.train.session import Run


def parse_args(argv: list[str] | None = None) -> DreamBoothOptions:
    """Options from the command line and `--config`. `main` checks them."""
    return parse(argv)


def backward(run: "Run", denoiser: "Denoiser", total: "Tensor", batch: "Batch") -> None:
    """Add loss and gradients of a batch to those of its step."""
    loss = denoiser.loss(batch, run.args.train_batch_size) / run.args.gradient_accumulation_steps
    run.scaler.scale(loss).backward()
    total += loss.detach()


def update(run: "Run") -> "Tensor":
    """Train on the gradients of a step; returns their norm."""
    import torch

    run.scaler.unscale_(run.optimizer)
    grad_norm = torch.nn.utils.clip_grad_norm_(run.parameters, run.args.max_grad_norm)
    run.scaler.step(run.optimizer)  # leaves everything as it is if a gradient is not finite
    run.scaler.update()
    run.optimizer.zero_grad(set_to_none=True)
    if run.args.scale_weight_norms:
        run.adapters.limit_norms(run.args.scale_weight_norms)
    return grad_norm


def train(run: "Run", step: int) -> int:
    """From `step` to the end, or to where the run was told to stop; returns the last step."""
    import torch
    from tqdm import tqdm

    from reslora_diffusion.diffusion.models.compilation import compiled
    from reslora_diffusion.diffusion.train.capture import whole_step
    from reslora_diffusion.diffusion.train.distributed import average_gradients
    from reslora_diffusion.interruption import Interruption

    args, steps, accelerator = run.args, run.plan.max_train_steps, run.accelerator
    device, say = accelerator.device, accelerator.print
    denoiser = compiled(run.denoiser, args, device, len(run.plan.buckets), say)
    total = torch.zeros((), device=device)
    parts = partial(backward, run, denoiser, total), partial(update, run)
    whole = whole_step(*parts, run.optimizer, args, device, say)  # the two as they are, or as CUDA graphs
    run.adapters.train()
    bar = tqdm(total=steps, initial=step, desc="training", unit="step", disable=not accelerator.is_local_main_process)
    with Interruption(accelerator) as interruption, bar:
        while step < steps:
            total.zero_()
            run.schedule.before_step(step)
            for micro in range(args.gradient_accumulation_steps):
                for batch in run.batches(step, micro):
                    whole.backward(batch)
            loss = average_gradients(run.parameters, total.clone(), accelerator.num_processes)
            run.schedule.after_backward(step)
            with run.changing():
                grad_norm = whole.update()
                step += 1
                run.log(step, loss, grad_norm)
                run.lr_scheduler.step()
                if run.ema:
                    run.ema.update(run.tensors, step)
                if run.after_step(step):
                    whole.forget()

            if step % args.checkpointing_steps == 0:
                run.save(step, args.checkpoints_total_limit)
            if run.is_validation_step(step):
                run.validate(step)
            bar.update()
            bar.set_postfix(run.shown(), refresh=False)
            if interruption.requested():
                run.save(step, args.checkpoints_total_limit)
                break
    whole.forget()
    return step


def prepare(args: DreamBoothOptions, plan: "Plan") -> tuple["Run", int]:
    """From options to a `Run` and the number of steps that it has behind it."""
    from reslora_diffusion.diffusion.train.setup import build, encode, load, start

    begun = start(args, plan)
    loaded, concepts, facts = load(begun)
    data = encode(begun, loaded, concepts, facts)
    return build(begun, loaded, data), begun.step


def main(args: DreamBoothOptions) -> Path:
    """Train, export, and return the output folder.

    Raises:
        BadInput: every problem with the options, the folders or the model.
        Interrupted: it was told to stop, and has saved.
        Stopped: training went wrong; says what is kept.
    """
    if args.compare:
        from reslora_diffusion.diffusion.train.race import race

        return race(args, main)
    from reslora_diffusion.diffusion.options.checks import check
    from reslora_diffusion.utils.output_folder import alone_in

    with nothing_to_lose():
        plan = check(args)
        from reslora_diffusion.diffusion.options.preflight import preflight

    if not args.dry_run:
        with alone_in(Path(args.output_dir)):
            return teach(args, plan)
    if is_first_process():
        print("\n".join(preflight(plan, args)))
    return Path(args.output_dir)


def teach(args: DreamBoothOptions, plan: "Plan") -> Path:
    """One run, from its models to its exported files."""
    from reslora_diffusion.diffusion.train.rescue import enough_memory, rescued

    with nothing_to_lose(), enough_memory(args):
        run, first_step = prepare(args, plan)
        if first_step == 0:
            run.validate(0)
    started = time.monotonic()
    try:
        with rescued(run, "training"):
            step = train(run, first_step)
    finally:
        run.close()
    if step < plan.max_train_steps:
        raise Interrupted(f"after step {step} of {plan.max_train_steps}; continue by --resume_from_checkpoint latest")
    with rescued(run, "merging"):
        merged, exported = run.finish(step)
    if exported:
        print(merged)
        print(f"{args.method} adapter: steps {first_step + 1} to {step} in {time.monotonic() - started:.0f} s")
        print("\n".join(f"{kind}: {path}" for kind, path in exported.files.items()))
        if args.push_to_hub:
            from reslora_diffusion.utils.hub import upload

            logs = (f"{args.logging_dir}/*",)
            print(f"pushed to {upload(args.hub_model_id, args.output_dir, args.hub_token, logs)}")
    return run.output


if __name__ == "__main__":
    sys.exit(run_program(lambda: main(parse_args())))
