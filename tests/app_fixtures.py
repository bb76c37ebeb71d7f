"""A tiny Stable Diffusion pipeline, LoRA files for it and training runs, random, from configuration alone."""

import json
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from PIL import Image

from reslora_diffusion.diffusion.train.history import History
from reslora_diffusion.diffusion.train.merging import MergeReport
from tiny import tiny_pipeline

TARGETS = {"unet": ["to_q", "to_k", "to_v", "to_out.0"], "text_encoder": ["q_proj", "v_proj"]}


def make_pipeline(folder: Path, wide: bool = False) -> StableDiffusionPipeline:
    """The pipeline in `folder`, made there if it is not yet; a wide one is another model family to every LoRA."""
    if not (folder / "model_index.json").is_file():
        pipe = tiny_pipeline(folder)
        if wide:
            pipe.unet = UNet2DConditionModel.from_config(pipe.unet.config, block_out_channels=(32, 64)).eval()
            pipe.save_pretrained(folder)
    return StableDiffusionPipeline.from_pretrained(folder)


def make_lora_file(
    folder: Path,
    base: Path,
    seed: int,
    rank: int = 2,
    wide: bool = False,
    parts: tuple[str, ...] = tuple(TARGETS),
) -> Path:
    """A diffusers LoRA file with random, non-zero factors."""
    pipe = make_pipeline(base, wide)
    torch.manual_seed(seed)
    layers = {}
    for part in parts:
        model = getattr(pipe, part)
        inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=TARGETS[part]), model)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.3)
        layers[f"{part}_lora_layers"] = get_peft_model_state_dict(model)
    StableDiffusionPipeline.save_lora_weights(folder, **layers)
    return folder / "pytorch_lora_weights.safetensors"


def make_run(folder: Path, method: str, shortcut: str | None = None, steps: int = 40, seed: int = 0) -> Path:
    """What the trainer leaves behind, by the trainer's own writers where they need no model."""
    source = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    history = History(folder, 0, every=1)
    for step in range(1, steps + 1):
        loss = 0.1 + 0.3 / step + source.gamma(2, 0.01)
        history.add_step(step, torch.tensor(loss), torch.tensor(1.0), 1e-3)
        history.flush()
        if step % 10 == 0:
            history.write([{"step": step, "validation_loss": 0.1 + 0.3 / step}])
    trained = 0.1 + 0.3 / steps
    report = MergeReport(
        shortcut or "none",
        "least_squares",
        loss_base=0.5,
        loss_trained=trained,
        loss_merged=trained + 0.01,
        output_errors={"unet.a": 0.02},
    )
    (folder / "merge_report.json").write_text(json.dumps(report.to_dict()))
    options = {"method": method, "shortcut": shortcut, "validation_prompt": ["a cat", "a dog"]}
    (folder / "run.json").write_text(json.dumps({"options": options}))
    for step in range(0, steps + 1, 10):
        place = folder / "samples" / f"step-{step:06d}"
        place.mkdir(parents=True, exist_ok=True)
        for name in ("0-0.png", "0-1.png", "1-0.png", "1-1.png"):
            Image.fromarray(source.integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(place / name)
    return folder
