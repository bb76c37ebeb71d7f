#!/usr/bin/env python
"""The loss by merging, on trained small models: every shortcut, every merge, several seeds.

    python benchmarks/merge.py                    # the embedded pipeline: about fifteen minutes on a CPU
    python benchmarks/merge.py --model llm --steps 150    # the embedded language model
    python benchmarks/merge.py --model llm --steps 150 --tune    # each shortcut at its own best rate and alpha
    python benchmarks/merge.py --steps 20 --seeds 0 --output /tmp/merge.json    # a smoke run

For each seed an adapter is trained with `input` and with `middle`; then its held-out loss is measured unmerged and as a
plain LoRA by each merge method (gap = merged - unmerged), all fitted on the same calibration batches; `distilled` is
least squares refined by `distill`. A second adapter is handed over at 85 % and trained to the same budget: its gap is
zero, so its loss is what counts. Plain LoRA of the same budget is the yardstick. Without `--tune` all have one learning
rate and alpha: this compares merges, not methods. `--tune` first searches both for each shortcut, on a seed and
held-out batches of its own, by the loss of the model merged by least squares.
"""

import argparse
import itertools
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from reslora_diffusion import ResLoraConfig, attach, calibrate, distill, get_adapter, handover, merged_forward
from reslora_diffusion.rules import MergeMethod

ROOT = Path(__file__).resolve().parent.parent
HANDOVER = 0.85
DISTILLATION_STEPS = 100
CALIBRATION_SEED, HELD_OUT_SEED, VALIDATION_SEED = 10_000, 20_000, 30_000
TUNING_SEED = 100
GRID = {"learning_rate": (5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2), "alpha_over_rank": (1.0, 4.0)}


class Setting(NamedTuple):
    """The settings that are tuned for each shortcut."""

    learning_rate: float
    alpha_over_rank: float = 1.0


@dataclass(frozen=True)
class Bench:
    """A frozen model and what it is tuned on: `batch(seed, index)` draws, `loss(model, batch)` is to be minimised.

    By `output` and `distance` the merged model is compared with the unmerged one when a merge is refined.
    """

    make: Callable[[], nn.Module]
    batch: Callable[[int, int], Any]
    loss: Callable[[nn.Module, Any], Tensor]
    output: Callable[[nn.Module, Any], Tensor]
    distance: Callable[[Tensor, Tensor], Tensor]
    target_modules: Sequence[str]
    learning_rate: float


def sticker_bench() -> Bench:
    """DreamBooth's denoising loss on all held-out subjects of the embedded pipeline, UNet only."""
    import numpy as np
    from diffusers import DDPMScheduler, StableDiffusionPipeline
    from PIL import Image

    folder = ROOT / "assets" / "sticker-sd"
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    latents, texts = [], []
    with torch.no_grad():
        for number, subject in enumerate(sorted((ROOT / "assets" / "subjects").iterdir())):
            images = [np.asarray(Image.open(path).convert("RGB")) for path in sorted(subject.glob("*.png"))]
            pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1
            latents.append(pipeline.vae.encode(pixels).latent_dist.mean * pipeline.vae.config.scaling_factor)
            words = pipeline.tokenizer(f"a sticker of thing {number}", padding="max_length", return_tensors="pt")
            texts.append(pipeline.text_encoder(words.input_ids)[0].expand(len(pixels), -1, -1))
    latent, text = torch.cat(latents), torch.cat(texts)

    def batch(seed: int, index: int) -> tuple[Tensor, ...]:
        g = torch.Generator().manual_seed(1_000_003 * seed + index)
        rows = torch.randint(len(latent), (8,), generator=g)
        noise = torch.randn(8, *latent.shape[1:], generator=g)
        timesteps = torch.randint(scheduler.config.num_train_timesteps, (8,), generator=g)
        noisy = scheduler.add_noise(latent[rows], noise, timesteps)
        return noisy, timesteps, text[rows], scheduler.get_velocity(latent[rows], noise, timesteps)

    def output(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        return model(*batch[:3], return_dict=False)[0]

    def loss(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        return F.mse_loss(output(model, batch), batch[3])

    def make() -> nn.Module:
        from diffusers import UNet2DConditionModel

        return UNet2DConditionModel.from_pretrained(folder, subfolder="unet")

    return Bench(make, batch, loss, output, F.mse_loss, ["to_q", "to_k", "to_v", "to_out.0"], learning_rate=1e-3)


def llm_bench() -> Bench:
    """Next-token loss of the embedded language model on word problems of templates that it never saw."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    sys.path.insert(0, str(ROOT / "train_scripts"))
    from word_problems import held_out_split

    folder = ROOT / "assets" / "tiny-llm"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    problems = {
        split: [
            tokenizer(f"{p['Body']} {p['Question']} {p['Equation']}. The answer is {p['Answer']}.").input_ids
            for p in held_out_split(split)
        ]
        for split in ("train", "validation", "test")
    }
    splits = {HELD_OUT_SEED: "test", VALIDATION_SEED: "validation"}

    def batch(seed: int, index: int) -> dict[str, Tensor]:
        rows = problems[splits.get(seed, "train")]
        g = torch.Generator().manual_seed(1_000_003 * seed + index)
        chosen = [rows[row] for row in torch.randint(len(rows), (8,), generator=g).tolist()]
        width = max(map(len, chosen))
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in chosen])
        ids = torch.tensor([row + [0] * (width - len(row)) for row in chosen])
        return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}

    def output(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """Log-probabilities of what follows each token that is no padding, [T, vocabulary]."""
        return F.log_softmax(model(**batch).logits[batch["attention_mask"] == 1], dim=-1)

    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    return Bench(
        lambda: AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        batch,
        lambda model, batch: model(**batch).loss,
        output,
        lambda merged, trained: F.kl_div(merged, trained, log_target=True, reduction="batchmean"),
        targets,
        learning_rate=2e-3,
    )


def train(
    bench: Bench, shortcut: str, seed: int, steps: int, rank: int, setting: Setting, fold_at: int | None = None
) -> nn.Module:
    """An adapted model after `steps` AdamW steps; equal seeds see equal batches."""
    torch.manual_seed(seed)
    model = bench.make().requires_grad_(False)
    num_previous = 1 if shortcut == "input" else None
    config = ResLoraConfig(
        r=rank,
        lora_alpha=setting.alpha_over_rank * rank,
        target_modules=list(bench.target_modules),
        shortcut=shortcut,
        num_previous=num_previous,
    )
    attach(model, config)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=setting.learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    model.train()
    for step in tqdm(range(steps), desc=f"seed {seed}, {shortcut}", leave=False):
        if step == fold_at:
            calibrate(model, calibration_of(bench, seed), bench.loss)
            handover(model, optimizer=optimizer)
        bench.loss(model, bench.batch(seed, step)).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
    return model.eval()


def calibration_of(bench: Bench, seed: int, batches: int = 16) -> list[Any]:
    return [bench.batch(CALIBRATION_SEED + seed, n) for n in range(batches)]


@torch.no_grad()
def held_out(bench: Bench, model: nn.Module, seed: int = HELD_OUT_SEED) -> float:
    return statistics.fmean(bench.loss(model, bench.batch(seed, n)).item() for n in range(24))


def tune(bench: Bench, shortcut: str, steps: int, rank: int) -> dict[Setting, float]:
    """Validation loss of the merged model at each setting of the grid."""
    losses = {}
    for setting in itertools.starmap(Setting, itertools.product(*GRID.values())):
        model = train(bench, shortcut, TUNING_SEED, steps, rank, setting)
        calibrate(model, calibration_of(bench, TUNING_SEED), bench.loss)
        with merged_forward(model):
            losses[setting] = held_out(bench, model, VALIDATION_SEED)
        tqdm.write(
            f"{shortcut}, {setting.learning_rate:g}, alpha / rank {setting.alpha_over_rank:g}: {losses[setting]:.5f}"
        )
    return losses


def measure(
    bench: Bench, seed: int, steps: int, rank: int, settings: Mapping[str, Setting]
) -> dict[str, dict[str, float]]:
    """Held-out losses of one seed: {shortcut: {unmerged, each merge method, handover}}, and plain LoRA's."""
    losses = {"none": {"unmerged": held_out(bench, train(bench, "none", seed, steps, rank, settings["none"]))}}
    for shortcut in ("input", "middle"):
        model = train(bench, shortcut, seed, steps, rank, settings[shortcut])
        row = losses[shortcut] = {"unmerged": held_out(bench, model)}
        for method in MergeMethod:
            get_adapter(model).config.merge_method = method
            calibrate(model, calibration_of(bench, seed), bench.loss)
            with merged_forward(model):
                row[str(method)] = held_out(bench, model)
            if method == MergeMethod.LEAST_SQUARES:
                batches = calibration_of(bench, seed, DISTILLATION_STEPS)
                distill(model, batches, bench.output, steps=DISTILLATION_STEPS, distance=bench.distance)
                with merged_forward(model):
                    row["distilled"] = held_out(bench, model)
        folded = train(bench, shortcut, seed, steps, rank, settings[shortcut], fold_at=round(HANDOVER * steps))
        row["handover"] = held_out(bench, folded)
    return losses


def table(results: list[dict[str, dict[str, float]]]) -> list[str]:
    lines = [f"{'shortcut':9} {'merge':14} {'held-out loss':>22} {'gap':>22}"]
    for shortcut, row in results[0].items():
        for name in row:
            losses = [result[shortcut][name] for result in results]
            gaps = [result[shortcut][name] - result[shortcut]["unmerged"] for result in results]
            lines.append(
                f"{shortcut:9} {name:14} {spread(losses):>22} {spread(gaps) if name != 'unmerged' else '':>22}"
            )
    for shortcut, method in itertools.product(("input", "middle"), ("least_squares", "distilled")):
        rows = [result[shortcut] for result in results]
        ours, paper = (statistics.fmean(r[m] - r["unmerged"] for r in rows) for m in (method, "paper_input"))
        lines.append(f"{shortcut}: {method} keeps {ours / paper:.2f} of the gap of the paper's merge by inputs")
    return lines


def spread(values: list[float]) -> str:
    return f"{statistics.fmean(values):+.5f} +- {statistics.stdev(values) if len(values) > 1 else 0:.5f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("sticker", "llm"), default="sticker")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--tune", action="store_true", help="search learning rate and alpha for each shortcut first")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/merge-<model>[-tuned].json")
    args = parser.parse_args()
    bench = sticker_bench() if args.model == "sticker" else llm_bench()
    started = time.monotonic()
    shortcuts = ("none", "input", "middle")
    settings = dict.fromkeys(shortcuts, Setting(bench.learning_rate))
    tried = {shortcut: tune(bench, shortcut, args.steps, args.rank) for shortcut in shortcuts if args.tune}
    settings |= {shortcut: min(losses, key=losses.__getitem__) for shortcut, losses in tried.items()}
    results = [measure(bench, seed, args.steps, args.rank, settings) for seed in args.seeds]
    print("\n".join(table(results)))
    tuned = "-tuned" if args.tune else ""
    output = args.output or ROOT / "benchmarks" / "results" / f"merge-{args.model}{tuned}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    facts = {
        "model": args.model,
        "steps": args.steps,
        "rank": args.rank,
        "settings": {shortcut: setting._asdict() for shortcut, setting in settings.items()},
        "tried": {
            shortcut: [setting._asdict() | {"loss": loss} for setting, loss in losses.items()]
            for shortcut, losses in tried.items()
        },
        "seconds": round(time.monotonic() - started),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("torch", "diffusers", "transformers", "peft")},
        "seeds": dict(zip(map(str, args.seeds), results, strict=True)),
    }
    output.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    print(f"wrote {output}")


if __name__ == "__main__":
    main()
