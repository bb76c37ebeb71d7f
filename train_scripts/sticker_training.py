"""The one training loop of the sticker recipe: a constant rate that decays at the end, EMA, checkpoints.

Every batch is a function of (seed, index), so a resumed run goes on exactly where it was. Until the rate decays, in the
last fifth of the steps, a run may also be resumed with another number of steps.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers.training_utils import EMAModel
from torch import nn
from tqdm import tqdm
from transformers import get_wsd_schedule

from reslora_diffusion.diffusion.train.training_state import load_training_state, save_training_state

DECAY = 0.2  # of the steps


def train(
    args: argparse.Namespace,
    name: str,
    model: nn.Module,
    step: Callable[[int, torch.Generator], torch.Tensor],
    *,
    steps: int,
    optimizer: torch.optim.Optimizer,
    look: Callable[[Path], None] | None = None,
) -> float:
    """`step(index, generator)` returns the loss; `look(file)` saves images by the EMA weights, at every checkpoint.

    Ends with the EMA weights in `model`.

    Returns:
        The seconds of a step, on average over the second half of the steps.
    """
    state = args.work_dir / f"{name}-state"
    warm_up, decay = min(300, steps // 10), round(DECAY * steps)
    schedule = get_wsd_schedule(optimizer, warm_up, decay, num_training_steps=steps, decay_type="linear")
    ema = EMAModel(model.parameters(), decay=0.999, use_ema_warmup=True, power=0.75)
    done = 0
    if state.exists():
        tensors, facts = load_training_state(state, model=model, optimizer=optimizer)
        model.load_state_dict({k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")})
        ema.shadow_params = [tensors[f"ema.{i}"].to(args.device) for i in range(len(ema.shadow_params))]
        ema.optimization_step = done = facts["step"]
        schedule.load_state_dict(facts["schedule"])
    saved_at = began = ended = time.monotonic()
    half = (done + steps) // 2
    bar = tqdm(range(done, steps), initial=done, total=steps, desc=name, mininterval=5)
    smooth = None
    for index in bar:
        if index == half:
            began = time.monotonic()
        generator = torch.Generator(args.device).manual_seed(args.seed * 1_000_003 + index)
        loss = step(index, generator)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        ema.step(model.parameters())
        smooth = loss.item() if smooth is None else 0.99 * smooth + 0.01 * loss.item()
        ended = time.monotonic()
        bar.set_postfix(loss=f"{smooth:.4f}", refresh=False)
        last = index + 1 == steps
        if last or time.monotonic() - saved_at > 60 * args.checkpointing_minutes:
            tensors = {f"model.{k}": v for k, v in model.state_dict().items()}
            tensors |= {f"ema.{i}": p for i, p in enumerate(ema.shadow_params)}
            facts = {"step": index + 1, "loss": smooth, "schedule": schedule.state_dict()}
            save_training_state(state, tensors, model=model, optimizer=optimizer, facts=facts)
            if look is not None:
                ema.store(model.parameters())
                ema.copy_to(model.parameters())
                look(args.work_dir / "looks" / f"{name}-{index + 1:06d}.png")
                ema.restore(model.parameters())
            saved_at = time.monotonic()
    ema.copy_to(model.parameters())
    return (ended - began) / max(1, steps - half)
