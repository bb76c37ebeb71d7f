"""Tasks to learn: a frozen base, batches as a function of (seed, step), and losses of a model on held-out data.

    word_problems   the embedded language model on problems of templates that it never saw: loss of the answer in nats,
                    and how often the greedy answer is the right number
    chain_sums      SmolLM2-135M-Instruct on sums of two or three numbers, likewise
    stickers        the embedded pipeline on one held-out subject (which one is a function of the seed): loss on fixed
                    noise of a held-out image, and of another subject, which says how far the model drifted; how many
                    of some generated images show the subject, and the background that the prompt names

Settings are chosen on the split "validation" and reported on the split "test".
"""

import json
import os
import sys
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[2]
SPLITS = ("validation", "test")


def generator(*numbers: int) -> torch.Generator:
    """Random numbers as a function of a few integers."""
    seed = 0
    for number in numbers:
        seed = (seed * 1_000_003 + number + 1) % (2**63)
    return torch.Generator().manual_seed(seed)


class Task(Protocol):
    target_modules: Sequence[str]

    def base(self) -> nn.Module: ...

    def batch(self, seed: int, step: int, size: int) -> Any: ...

    def loss(self, model: nn.Module, batch: Any) -> Tensor: ...

    def output(self, model: nn.Module, batch: Any) -> Tensor:
        """The tensor that `distill` compares: [N, classes] log-probabilities, or a prediction."""

    def distance(self, merged: Tensor, trained: Tensor) -> Tensor: ...

    def measure(self, model: nn.Module, split: str, seed: int) -> dict[str, float]:
        """`loss`, and the metrics of the task, on held-out data."""

    def measure_once(self, model: nn.Module, seed: int) -> dict[str, float]:
        """Metrics that are too slow to follow a training with: they are taken of its end, on the split "test"."""


class WordProblems:
    """Llama of 8 layers on arithmetic word problems in SVAMP's columns."""

    target_modules = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    folder = ROOT / "assets" / "tiny-llm"

    def base(self) -> nn.Module:
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32)

    @cached_property
    def tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.folder)

    @cached_property
    def rows(self) -> dict[str, list[tuple[list[int], list[int]]]]:
        """`(prompt, response)` token ids of each split."""
        found = {}
        for split in ("train", *SPLITS):
            lines = (self.folder / "word_problems" / f"{split}.jsonl").read_text(encoding="utf-8").strip().split("\n")
            problems = [json.loads(line) for line in lines]
            found[split] = [self.encode(problem) for problem in problems]
        return found

    def encode(self, problem: dict[str, str]) -> tuple[list[int], list[int]]:
        prompt = self.tokenizer(f"{problem['Body']} {problem['Question']}").input_ids
        response = self.tokenizer(f" The answer is {problem['Answer']}.", add_special_tokens=False).input_ids
        return prompt, [*response, self.tokenizer.eos_token_id]

    def collate(self, rows: Sequence[tuple[list[int], list[int]]]) -> dict[str, Tensor]:
        width = max(len(prompt) + len(response) for prompt, response in rows)
        ids, mask, labels = [], [], []
        for prompt, response in rows:
            rest = width - len(prompt) - len(response)
            ids.append([*prompt, *response] + [0] * rest)
            mask.append([1] * (width - rest) + [0] * rest)
            labels.append([-100] * len(prompt) + response + [-100] * rest)
        return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask), "labels": torch.tensor(labels)}

    def batch(self, seed: int, step: int, size: int) -> dict[str, Tensor]:
        rows = self.rows["train"]
        chosen = torch.randint(len(rows), (size,), generator=generator(seed, step)).tolist()
        return self.collate([rows[row] for row in chosen])

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return model(**batch).loss

    def output(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return F.log_softmax(model(**batch).logits[batch["attention_mask"] == 1], dim=-1)

    def distance(self, merged: Tensor, trained: Tensor) -> Tensor:
        return F.kl_div(merged, trained, log_target=True, reduction="batchmean")

    @torch.no_grad()
    def measure(self, model: nn.Module, split: str, seed: int) -> dict[str, float]:
        """Loss, and exact match, by teacher forcing: every token of the answer is the likeliest one."""
        rows = sorted(self.rows[split], key=lambda row: len(row[0]) + len(row[1]))
        total, tokens, right = 0.0, 0, 0
        for first in range(0, len(rows), 50):
            batch = self.collate(rows[first : first + 50])
            logits, labels = model(**batch).logits[:, :-1], batch["labels"][:, 1:]
            answered = labels != -100
            total += F.cross_entropy(logits[answered], labels[answered], reduction="sum").item()
            tokens += int(answered.sum())
            right += int(((logits.argmax(-1) == labels) | ~answered).all(-1).sum())
        return {"loss": total / tokens, "exact_match": right / len(rows)}

    def measure_once(self, model: nn.Module, seed: int) -> dict[str, float]:
        return {}


class ChainSums(WordProblems):
    """SmolLM2-135M-Instruct on sums of two or three numbers, as `reasoning-gym` makes them (`pip install
    reasoning-gym`). Its folder is that of the environment variable SMOLLM2_FOLDER, or where `make demo-llm
    MODEL=smollm2` converts the weights to."""

    target_modules = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    sizes = {"train": 2000, "validation": 100, "test": 200}

    @property
    def folder(self) -> Path:  # type: ignore[override]
        cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
        own = cache / "reslora_diffusion" / "smollm2-135m-instruct"
        return Path(os.environ.get("SMOLLM2_FOLDER", own))

    def problems(self) -> list[dict[str, str]]:
        """Different problems, in an order that a seed of the task's own decides: as many as all splits need."""
        from reasoning_gym import create_dataset

        settings = {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 2}
        made = create_dataset("chain_sum", seed=1, size=2 * sum(self.sizes.values()), **settings)
        return list({problem["question"]: problem for problem in made}.values())

    @cached_property
    def rows(self) -> dict[str, list[tuple[list[int], list[int]]]]:
        rows = [self.encode(problem) for problem in self.problems()]
        found, first = {}, 0
        for split, size in self.sizes.items():
            found[split] = rows[first : first + size]
            first += size
        return found

    def encode(self, problem: dict[str, str]) -> tuple[list[int], list[int]]:
        prompt = self.tokenizer(problem["question"]).input_ids
        response = self.tokenizer(f" {problem['answer']}", add_special_tokens=False).input_ids
        return prompt, [*response, self.tokenizer.eos_token_id]


class Stickers:
    """The embedded pipeline's UNet on four images of a subject; a fifth is held out."""

    target_modules = ("to_q", "to_k", "to_v", "to_out.0")
    folder = ROOT / "assets" / "sticker-sd"
    held_out_draws = {"validation": 0, "test": 1}
    images_a_background = 4

    def base(self) -> nn.Module:
        from diffusers import UNet2DConditionModel

        return UNet2DConditionModel.from_pretrained(self.folder, subfolder="unet")

    @cached_property
    def recipe(self) -> tuple[ModuleType, ModuleType]:
        """The drawings and the judge of the embedded pipeline, which stand beside the training scripts."""
        sys.path.insert(0, str(ROOT / "train_scripts"))
        import sticker_data
        import sticker_judge

        return sticker_data, sticker_judge

    @cached_property
    def pipeline(self) -> Any:
        from diffusers import StableDiffusionPipeline

        pipeline = StableDiffusionPipeline.from_pretrained(self.folder)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    @cached_property
    def subjects(self) -> list[tuple[str, list[Image.Image]]]:
        """Names and images."""
        folders = sorted((ROOT / "assets" / "subjects").iterdir())
        return [(f.name, [Image.open(p).convert("RGB") for p in sorted(f.glob("*.png"))]) for f in folders]

    def prompt(self, name: str) -> str:
        return f"a sticker of sks {self.recipe[0].HELD_OUT[name][1]}"

    @cached_property
    def encoded(self) -> tuple[list[Tensor], list[Tensor], Any]:
        """Latents [images, 4, 8, 8] and the prompt's embedding [1, tokens, width] of each subject; the scheduler."""
        from diffusers import DDPMScheduler

        pipeline, latents, texts = self.pipeline, [], []
        with torch.no_grad():
            for name, images in self.subjects:
                pixels = torch.from_numpy(np.stack([np.asarray(i) for i in images])).permute(0, 3, 1, 2).float()
                encoded = pipeline.vae.encode(pixels / 127.5 - 1).latent_dist.mean
                latents.append(encoded * pipeline.vae.config.scaling_factor)
                prompt = pipeline.tokenizer(self.prompt(name), padding="max_length", return_tensors="pt")
                texts.append(pipeline.text_encoder(prompt.input_ids)[0])
        return latents, texts, DDPMScheduler.from_config(pipeline.scheduler.config)

    def draw(self, latent: Tensor, text: Tensor, rng: torch.Generator) -> tuple[Tensor, ...]:
        scheduler = self.encoded[2]
        noise = torch.randn(latent.shape, generator=rng)
        timesteps = torch.randint(scheduler.config.num_train_timesteps, (len(latent),), generator=rng)
        noisy = scheduler.add_noise(latent, noise, timesteps)
        target = scheduler.get_velocity(latent, noise, timesteps)
        return noisy, timesteps, text.expand(len(latent), -1, -1), target

    def batch(self, seed: int, step: int, size: int) -> tuple[Tensor, ...]:
        latents, texts, _ = self.encoded
        subject = seed % len(latents)
        rng = generator(seed, step)
        rows = torch.randint(len(latents[subject]) - 1, (size,), generator=rng)
        return self.draw(latents[subject][rows], texts[subject], rng)

    def output(self, model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        return model(*batch[:3], return_dict=False)[0]

    def loss(self, model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        return F.mse_loss(self.output(model, batch), batch[3])

    def distance(self, merged: Tensor, trained: Tensor) -> Tensor:
        return F.mse_loss(merged, trained)

    @torch.no_grad()
    def measure(self, model: nn.Module, split: str, seed: int) -> dict[str, float]:
        """Loss of the subject's held-out image on fixed noise, and of the next subject under its own prompt."""
        latents, texts, _ = self.encoded
        subject, other = seed % len(latents), (seed + 1) % len(latents)
        found = {}
        for name, place in (("loss", subject), ("other_subject_loss", other)):
            rng = generator(7_000_000, self.held_out_draws[split], place)
            latent = latents[place][-1:].expand(64, -1, -1, -1)
            found[name] = self.loss(model, self.draw(latent, texts[place], rng)).item()
        return found

    def measure_once(self, model: nn.Module, seed: int) -> dict[str, float]:
        """Shares of generated images that show the subject, and that have the background which the prompt names (one
        that no training image has). Images are generated as the demo generates them."""
        data, judge = self.recipe
        name, images = self.subjects[seed % len(self.subjects)]
        seen = {judge.judge_background(image) for image in images}
        colours = [colour for colour in data.BACKGROUNDS if colour not in seen][:3]
        wanted = [colour for colour in colours for _ in range(self.images_a_background)]
        self.pipeline.unet = model
        prompts = [f"{self.prompt(name)} on a {colour} background" for colour in wanted]
        noise = [generator(8_000_000, number) for number in range(len(prompts))]
        made = self.pipeline(prompts, num_inference_steps=25, guidance_scale=2.5, generator=noise).images
        subjects = [judge.judge_subject(image, held_out=True) == name for image in made]
        backgrounds = [judge.judge_background(image) == colour for image, colour in zip(made, wanted, strict=True)]
        return {"subject": sum(subjects) / len(made), "background": sum(backgrounds) / len(made)}


TASKS = {"word_problems": WordProblems, "chain_sums": ChainSums, "stickers": Stickers}
