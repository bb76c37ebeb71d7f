"""Whole runs of the DreamBooth script on the tiny pipeline, in this process."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig
from PIL import Image
from safetensors.torch import load_file

from dreambooth import PROMPT, SUBJECTS, arguments, train, train_without_export
from reslora_diffusion.diffusion.models.adapters import add_adapters
from reslora_diffusion.diffusion.models.meta_pipeline import load_meta_pipeline
from reslora_diffusion.diffusion.objective.randomness import Stream, generator, seed_of
from reslora_diffusion.utils.problems import Interrupted, Stopped
from tiny import tiny_pipeline_folder, tiny_vae

WEIGHTS = "pytorch_lora_weights.safetensors"
METHODS = {
    "lora": {"method": "lora"},
    "none": {"shortcut": "none"},
    "input": {"shortcut": "input"},
    "block": {"shortcut": "block", "num_previous": 2},
    "middle": {"shortcut": "middle", "num_previous": "all"},
}


def rows(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder) -> list[float]:
    return [row["loss"] for row in rows(folder) if "loss" in row]


def report(folder) -> dict:
    return json.loads((folder / "merge_report.json").read_text())


def state(checkpoint) -> dict[str, torch.Tensor]:
    return load_file(checkpoint / "state" / "state.safetensors")


def assert_same(first: dict, second: dict) -> None:
    assert first.keys() == second.keys()
    different = [name for name in first if not torch.equal(first[name], second[name])]
    assert different == []


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A finished run of each method: UNet and text encoder, prior preservation, validation images."""
    folder = tmp_path_factory.mktemp("runs")

    def run(name):
        if not (folder / name / WEIGHTS).is_file():
            train(
                folder / name,
                max_train_steps=4,
                train_text_encoder=True,
                with_prior_preservation=True,
                class_data_dir=folder / "classes",
                class_prompt="a sticker of an animal",
                num_class_images=3,
                validation_prompt=[PROMPT, f"{PROMPT} on a blue background"],
                num_validation_images=1,
                validation_steps=2,
                checkpointing_steps=2,
                report_to="tensorboard",
                **METHODS[name],
            )
        return folder / name

    return run


@pytest.mark.parametrize("method", METHODS)
def test_a_run_leaves_what_it_promises(runs, method):
    folder = runs(method)
    for name in (
        WEIGHTS,
        f"kohya/{method}.safetensors",
        "merge_report.json",
        "export_report.json",
        "run.json",
        "loss.png",
        "samples.png",
        "README.md",
        "checkpoint-2/state/state.safetensors",
        f"checkpoint-4/{WEIGHTS}",
    ):
        assert (folder / name).is_file(), name
    assert not list(folder.rglob(".*"))
    assert list((folder / "logs").rglob("events.out.tfevents*"))
    assert len(list((folder.parent / "classes").iterdir())) == 3
    assert [row["step"] for row in rows(folder)] == [0, 1, 2, 2, 3, 4, 4]
    assert [sorted(p.name for p in step.iterdir()) for step in sorted((folder / "samples").iterdir())] == [
        ["0-0.png", "1-0.png"]
    ] * 3
    record = json.loads((folder / "run.json").read_text())
    assert record["options"]["seed"] == 0
    assert record["versions"]["torch"] == torch.__version__.split("+")[0] or record["versions"]["torch"]
    keys = load_file(folder / WEIGHTS).keys()
    assert {key.split(".")[0] for key in keys} == {"unet", "text_encoder"}
    card = (folder / "README.md").read_text()
    assert "![samples.png](samples.png)" in card
    assert str(tiny_pipeline_folder()) not in card


@pytest.mark.parametrize("method", METHODS)
def test_training_lowers_the_loss_and_the_report_says_what_merging_cost(runs, method):
    found = report(runs(method))
    assert found["loss_trained"] < found["loss_base"]
    assert found["gap"] == pytest.approx(found["loss_merged"] - found["loss_trained"])
    if method in ("lora", "none", "block"):
        assert abs(found["gap"]) < 1e-6
        assert not any(found["output_errors"].values())
    else:
        assert any(error > 1e-3 for error in found["output_errors"].values())
        assert found["shortcut"] == method
        assert found["merge_method"] == "least_squares"


@pytest.mark.parametrize("method", METHODS)
def test_the_exported_file_generates_in_plain_diffusers_what_validation_showed(runs, method):
    folder = runs(method)
    pipe = StableDiffusionPipeline.from_pretrained(tiny_pipeline_folder())
    pipe.set_progress_bar_config(disable=True)

    def generate() -> np.ndarray:
        image = pipe(
            PROMPT, num_inference_steps=2, guidance_scale=7.5, generator=generator(0, Stream.VALIDATION, 0)
        ).images[0]
        return np.asarray(image).astype(int)

    base = generate()
    pipe.load_lora_weights(folder)
    exported = generate()
    shown = {
        step: np.asarray(Image.open(folder / "samples" / f"step-{step:06d}" / "0-0.png")).astype(int) for step in (0, 4)
    }
    np.testing.assert_array_equal(base, shown[0])
    assert np.abs(exported - base).max() > 10
    assert np.abs(exported - shown[4]).max() <= 3  # the file holds half precision


def test_the_program_on_the_model_card_runs_and_generates_with_the_adapter(tmp_path, monkeypatch):
    folder = train(tmp_path / "run", shortcut="block", prediction_type="v_prediction", instance_prompt='a "sks" animal')
    program = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
    start, call = program.split("image = ")
    seeded = f"torch.manual_seed(0)\nimage = {call}"
    again = f"pipe.unload_lora_weights()\n{seeded}".replace("image.png", "base.png")
    monkeypatch.chdir(folder)
    exec(f"import torch\n{start}{seeded}\n{again}", {})
    images = [np.asarray(Image.open(folder / name)).astype(int) for name in ("image.png", "base.png")]
    assert np.abs(images[0] - images[1]).max() > 10


def test_methods_see_the_same_draws_from_the_same_start(runs):
    first = {method: losses(runs(method)) for method in METHODS}
    assert all(values[0] == pytest.approx(first["lora"][0], rel=1e-6) for values in first.values())
    assert first["none"] == pytest.approx(first["lora"], rel=1e-4)
    assert len({round(values[-1], 6) for values in (first["lora"], first["input"], first["block"])}) == 3


# ------------------------------------------------------------------------------------------------ resuming

EVERYTHING = {
    "max_train_steps": 6,
    "checkpointing_steps": 3,
    "train_text_encoder": True,
    "lora_dropout": 0.3,
    "lr_scheduler": "cosine",
    "lr_warmup_steps": 2,
    "use_ema": True,
    "caption_dropout_rate": 0.3,
    "random_flip": True,
    "noise_offset": 0.1,
    "gradient_accumulation_steps": 2,
    "train_batch_size": 1,
    "validation_steps": 3,
}


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"method": "lora"}, marks=pytest.mark.slow),  # "input adafactor" has no handover either
        {"shortcut": "middle", "handover": 0.34},
        {"shortcut": "block", "handover": 0.67},
        {"shortcut": "input", "optimizer": "adafactor"},
    ],
    ids=["lora", "middle handed over before", "block handed over after", "input adafactor"],
)
def test_a_resumed_run_is_bit_for_bit_the_uninterrupted_one(tmp_path, options):
    whole = train(tmp_path / "whole", **EVERYTHING, **options)
    half = shutil.copytree(whole, tmp_path / "half")
    shutil.rmtree(half / "checkpoint-6")
    for path in (half / WEIGHTS, half / "merge_report.json"):
        path.unlink()
    train(half, **EVERYTHING, **options, resume_from_checkpoint="latest")
    assert_same(state(whole / "checkpoint-6"), state(half / "checkpoint-6"))
    assert_same(load_file(whole / WEIGHTS), load_file(half / WEIGHTS))
    assert rows(whole) == rows(half)
    assert report(whole) == report(half)


def test_a_seed_that_was_drawn_is_kept_when_resuming(tmp_path):
    folder = train_without_export(tmp_path / "run", seed=None, checkpointing_steps=2)
    drawn = json.loads((folder / "run.json").read_text())["options"]["seed"]
    train_without_export(folder, seed=None, resume_from_checkpoint="checkpoint-2", max_train_steps=4)
    assert json.loads((folder / "run.json").read_text())["options"]["seed"] == drawn
    assert [row["step"] for row in rows(folder) if "loss" in row] == [1, 2, 3, 4]


def test_another_learning_rate_may_be_taken_up_when_resuming(tmp_path):
    folder = train_without_export(tmp_path / "run", checkpointing_steps=2)
    train_without_export(folder, resume_from_checkpoint="checkpoint-2", learning_rate=1e-4)
    assert [row["lr"] for row in rows(folder) if "loss" in row] == [0.01, 0.01, 1e-4]


def test_resuming_a_finished_run_only_exports_again(tmp_path):
    folder = train(tmp_path / "run", checkpointing_steps=3)
    paths = (
        folder / WEIGHTS,
        folder / "kohya" / "run.safetensors",
        folder / "checkpoint-3" / "state" / "merged.safetensors",
    )
    before = [path.read_bytes() for path in paths]
    (folder / WEIGHTS).unlink()
    (folder / "metrics.jsonl").write_text('{"step": 3, "validation_loss": 99.0}\n')  # by whatever was there before
    reported = json.loads((folder / "merge_report.json").read_text())
    train(folder, checkpointing_steps=3, resume_from_checkpoint="latest")
    assert [path.read_bytes() for path in paths] == before
    assert json.loads((folder / "merge_report.json").read_text()) == reported


def test_only_the_last_checkpoints_are_kept(tmp_path):
    folder = train_without_export(tmp_path / "run", max_train_steps=4, checkpointing_steps=1, checkpoints_total_limit=2)
    assert sorted(path.name for path in folder.glob("*checkpoint*")) == ["checkpoint-3", "checkpoint-4"]


# ------------------------------------------------------------------------------------------------ equivalences


def test_accumulated_micro_batches_are_one_batch(tmp_path):
    options = {"shortcut": "input", "train_text_encoder": True, "checkpointing_steps": 3}
    one = train_without_export(tmp_path / "one", train_batch_size=4, **options)
    two = train_without_export(tmp_path / "two", train_batch_size=2, gradient_accumulation_steps=2, **options)
    assert losses(one) == pytest.approx(losses(two), rel=1e-4)
    first, second = state(one / "checkpoint-3"), state(two / "checkpoint-3")
    moved = [name for name in first if "lora_B" in name and not name.startswith("optimizer")]
    for name in moved:
        torch.testing.assert_close(first[name], second[name], rtol=1e-2, atol=1e-4)


def test_plain_lora_has_the_weights_and_the_numbers_of_peft(tmp_path):
    args = arguments(tmp_path, method="lora")
    ours, peft = (StableDiffusionPipeline.from_pretrained(tiny_pipeline_folder()) for _ in range(2))
    add_adapters(ours, load_meta_pipeline(args), args)
    torch.manual_seed(seed_of(args.seed, Stream.ADAPTER))
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    peft.unet.add_adapter(
        LoraConfig(r=args.rank, lora_alpha=args.rank, init_lora_weights="gaussian", target_modules=targets)
    )
    own = dict(ours.unet.named_parameters())
    for name, parameter in peft.unet.named_parameters():
        assert torch.equal(own[name], parameter)
        if "lora_B" in name:
            torch.nn.init.normal_(parameter.data)
            own[name].data.copy_(parameter.data)
    noisy, states = (
        torch.randn(2, peft.unet.config.in_channels, 8, 8),
        torch.randn(2, 5, peft.unet.config.cross_attention_dim),
    )
    inputs = noisy.double(), 7, states.double()
    a, b = (pipeline.unet.double()(*inputs).sample for pipeline in (ours, peft))
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    with torch.no_grad():
        peft.unet.disable_adapters()
        assert (peft.unet(*inputs).sample - b).abs().max() > 1e-2


# "block" shares no values between layers; tests/test_core_hazards.py checkpoints it in float64.
WITH_SLOW_BLOCK = ["input", "middle", pytest.param("block", marks=pytest.mark.slow)]


@pytest.mark.parametrize("shortcut", WITH_SLOW_BLOCK)
def test_gradient_checkpointing_changes_nothing(tmp_path, shortcut):
    options = {"shortcut": shortcut, "train_text_encoder": True, "max_train_steps": 2, "checkpointing_steps": 2}
    plain = train_without_export(tmp_path / "plain", **options)
    saving = train_without_export(tmp_path / "saving", gradient_checkpointing=True, **options)
    assert losses(plain) == pytest.approx(losses(saving), rel=1e-5)
    first, second = state(plain / "checkpoint-2"), state(saving / "checkpoint-2")
    for name in first:
        if name.startswith("optimizer.state") and name.endswith("exp_avg"):
            torch.testing.assert_close(first[name], second[name], rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("shortcut", ["input", "middle", "block"])
def test_fused_attention_and_low_memory_layers_change_nothing(tmp_path, shortcut):
    options = {
        "shortcut": shortcut,
        "num_previous": 1,
        "handover": 0.67,
        "gradient_checkpointing": shortcut == "middle",
    }
    options |= {"validation_prompt": [PROMPT], "num_validation_images": 1}
    plain = train(tmp_path / "plain", **options, fused_attention=False, low_memory_layers=False)
    fast = train(tmp_path / "fast", **options, fused_attention=True, low_memory_layers=True)
    assert losses(plain) == pytest.approx(losses(fast), rel=1e-5)
    assert report(plain)["loss_merged"] == pytest.approx(report(fast)["loss_merged"], rel=1e-4)
    shown = [
        np.asarray(Image.open(folder / "samples" / "step-000003" / "0-0.png")).astype(int) for folder in (plain, fast)
    ]
    assert np.abs(shown[0] - shown[1]).max() <= 2


def test_half_precision_is_of_the_base_alone(tmp_path):
    options = {"train_text_encoder": True, "learning_rate": 1e-3}
    full = train_without_export(tmp_path / "full", **options)
    for precision in ("bf16", "fp16"):  # the latter scales the loss
        folder = train(tmp_path / precision, **options, mixed_precision=precision, checkpointing_steps=3)
        tensors = state(folder / "checkpoint-3")
        assert {value.dtype for name, value in tensors.items() if "lora_" in name} == {torch.float32}
        assert losses(folder) == pytest.approx(losses(full), rel=0.02)


# ------------------------------------------------------------------------------------------------ options


def test_another_autoencoder_of_the_same_latents(tmp_path):
    vae = tiny_vae()
    vae.save_pretrained(tmp_path / "vae")
    other = train_without_export(tmp_path / "other", method="lora", pretrained_vae_model_name_or_path=tmp_path / "vae")
    own = train_without_export(tmp_path / "own", method="lora")
    assert losses(other)[0] != losses(own)[0]


def test_distillation_changes_what_is_exported_and_nothing_else(tmp_path):
    options = {"shortcut": "middle", "num_previous": "all", "max_train_steps": 10, "calibration_batches": 32}
    plain, refined = (
        train(tmp_path / name, **options, **more)
        for name, more in (("plain", {}), ("refined", {"distillation_steps": 60}))
    )
    assert report(refined)["loss_trained"] == report(plain)["loss_trained"] != report(plain)["loss_base"]
    assert report(refined)["loss_merged"] != report(plain)["loss_merged"]
    one, other = (load_file(folder / WEIGHTS) for folder in (plain, refined))
    assert {name: value.shape for name, value in one.items()} == {name: value.shape for name, value in other.items()}
    assert not any(torch.equal(value, other[name]) for name, value in one.items() if "lora_A" in name)


def test_after_a_handover_what_is_exported_is_what_was_trained(tmp_path):
    folder = train(tmp_path / "run", shortcut="middle", handover=0.5, max_train_steps=4, learning_rate=0.02)
    assert abs(report(folder)["gap"]) < 1e-6
    assert report(folder)["shortcut"] == "middle"


def test_a_run_that_goes_on_with_another_length_hands_over_once(tmp_path):
    options = {"shortcut": "middle", "handover": 0.5, "learning_rate": 0.02, "checkpointing_steps": 2, "use_ema": True}
    train_without_export(tmp_path, max_train_steps=6, **options)  # at step 3
    train(tmp_path, max_train_steps=4, resume_from_checkpoint="checkpoint-2", **options)  # it would have been step 2
    assert abs(report(tmp_path)["gap"]) < 1e-6
    options["checkpointing_steps"] = 6
    options["max_train_steps"] = 12  # it would be step 6
    train_without_export(tmp_path, resume_from_checkpoint="checkpoint-4", **options)
    found = state(tmp_path / "checkpoint-6")  # a handover begins the average anew
    assert not any(torch.equal(found[name], found[f"ema.{name}"]) for name in found if f"ema.{name}" in found)


def test_a_signal_while_merging_keeps_what_was_trained(tmp_path, monkeypatch):
    def quits(*args, **options):
        raise KeyboardInterrupt

    options = {"max_train_steps": 2, "use_ema": True}
    with monkeypatch.context() as patched:
        patched.setattr("reslora_diffusion.diffusion.train.finishing.merge_report", quits)
        with pytest.raises(Interrupted, match="after step 2, while merging; continue by"):
            train(tmp_path / "run", **options)
        patched.setattr("reslora_diffusion.diffusion.train.setup.add_adapters", quits)
        with pytest.raises(Interrupted, match="before the first step"):
            train(tmp_path / "none", **options)
    assert not (tmp_path / "none").exists()
    again = train(tmp_path / "run", resume_from_checkpoint="latest", **options)
    whole = train(tmp_path / "whole", **options)
    assert_same(load_file(again / WEIGHTS), load_file(whole / WEIGHTS))


def test_the_moving_average_is_exported(tmp_path):
    options = {"method": "lora", "checkpointing_steps": 3}
    plain = train_without_export(tmp_path / "plain", **options)
    averaged = train(tmp_path / "averaged", use_ema=True, **options)
    live, with_ema = state(plain / "checkpoint-3"), state(averaged / "checkpoint-3")
    assert all(torch.equal(with_ema[name], live[name]) for name in live)  # training itself is the same
    layer = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"

    def delta(tensors, prefix="", suffix=".weight") -> torch.Tensor:
        A, B = (tensors[f"{prefix}{layer}.{factor}{suffix}"].float() for factor in ("lora_A", "lora_B"))
        return B @ A

    average = delta(with_ema, "ema.", ".default.weight")
    assert not torch.allclose(average, delta(live, suffix=".default.weight"), rtol=0.1)
    torch.testing.assert_close(delta(load_file(averaged / WEIGHTS)), average, rtol=5e-3, atol=1e-5)


def test_the_norm_of_every_update_is_bounded(tmp_path):
    folder = train(tmp_path / "run", method="lora", scale_weight_norms=0.01, learning_rate=0.1, lora_alpha=8)
    tensors = load_file(folder / WEIGHTS)
    norms = [
        (tensors[name.replace("lora_A", "lora_B")].float() @ value.float()).norm().item()
        for name, value in tensors.items()
        if "lora_A" in name
    ]
    assert max(norms) == pytest.approx(0.01, rel=0.01)


def test_ranks_may_differ_by_layer(tmp_path):
    ranks = ["attn1.to_q=2", "attn2.to_v=6"]
    folder = train(tmp_path / "run", shortcut="block", rank_pattern=ranks, checkpointing_steps=3)
    ranks = {
        name.split("blocks.0.")[-1]: value.shape[0]
        for name, value in state(folder / "checkpoint-3").items()
        if "lora_A" in name and not name.startswith("optimizer")
    }
    assert ranks["attn1.to_q.lora_A.default.weight"] == 2
    assert ranks["attn2.to_v.lora_A.default.weight"] == 6
    assert ranks["attn1.to_k.lora_A.default.weight"] == 4


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("sgd", "rmsprop")]  # of torch, as NAdam is


@pytest.mark.parametrize("optimizer", [*SLOW, "adafactor", "NAdam", "lion4bit"])
def test_optimizers_by_name(tmp_path, optimizer):
    if optimizer == "lion4bit":
        with pytest.raises(ValueError, match="--optimizer: got 'lion4bit', wanted"):
            train(tmp_path / "run", optimizer=optimizer)
        return
    folder = train(tmp_path / "run", optimizer=optimizer, learning_rate=0.05, max_train_steps=2)
    assert report(folder)["loss_trained"] != report(folder)["loss_base"]


def test_concepts_shapes_masks_and_losses_in_one_run(tmp_path):
    (tmp_path / "wide").mkdir()
    for number in range(3):
        image = Image.open(SUBJECTS / "cake" / f"{number}.png").convert("RGBA").resize((96, 60))
        image.putalpha(Image.linear_gradient("L").resize(image.size))
        image.save(tmp_path / "wide" / f"{number}.png")
    concepts = [
        {"instance_data_dir": str(SUBJECTS / "octopus"), "instance_prompt": "sks octopus", "repeats": 2},
        {
            "instance_data_dir": str(tmp_path / "wide"),
            "instance_prompt": "ohwx cake",
            "class_data_dir": str(SUBJECTS / "teapot"),
            "class_prompt": "a thing",
            "num_class_images": 2,
        },
    ]
    (tmp_path / "concepts.json").write_text(json.dumps(concepts))
    folder = train(
        tmp_path / "run",
        instance_data_dir=None,
        instance_prompt=None,
        concepts=tmp_path / "concepts.json",
        with_prior_preservation=True,
        aspect_ratio_buckets="auto",
        alpha_mask=True,
        random_flip=True,
        snr_gamma=5.0,
        loss_type="huber",
        loraplus_lr_ratio=4.0,
        lr_pattern=["attn2.*=0.1"],
        max_train_steps=7,
    )
    assert all(np.isfinite(losses(folder)))
    assert report(folder)["loss_trained"] < report(folder)["loss_base"]


def test_images_that_are_held_out_are_measured_on_and_not_trained_on(tmp_path, capsys):
    options = {"max_train_steps": 4, "validation_steps": 2}
    folder = train_without_export(tmp_path / "run", validation_split=0.2, **options)
    held_out = re.search(r"1 held out for validation: (\d.png)", capsys.readouterr().out)[1]
    shutil.copytree(SUBJECTS / "octopus", tmp_path / "without", ignore=shutil.ignore_patterns(held_out))
    without = train_without_export(tmp_path / "other", instance_data_dir=tmp_path / "without", **options)
    assert losses(folder) == losses(without)
    seen, unseen = (
        [row["validation_loss"] for row in rows(run) if "validation_loss" in row] for run in (without, folder)
    )
    assert len(seen) == len(unseen) == 3
    assert all(one != other for one, other in zip(seen, unseen, strict=True))


def test_shuffled_captions_are_trained_and_what_is_kept_serves_another_seed(tmp_path, capsys):
    folder = tmp_path / "tagged"
    shutil.copytree(SUBJECTS / "octopus", folder)
    for number in range(5):
        (folder / f"{number}.txt").write_text(f"sks, octopus, number {number}, blue")
    options = {"instance_data_dir": folder, "encoding_cache_dir": tmp_path / "kept", "seed": None}
    plain = train_without_export(tmp_path / "plain", **options | {"seed": 0})
    shuffled = train_without_export(tmp_path / "shuffled", **options | {"seed": 0}, shuffle_caption=True, keep_tokens=1)
    assert losses(plain) != losses(shuffled)
    capsys.readouterr()
    train_without_export(tmp_path / "again", **options, shuffle_caption=True, keep_tokens=1)
    assert "kept: 0 images and prompts were added" in capsys.readouterr().out
    with pytest.raises(ValueError, match="--keep_tokens is used only with one of --shuffle_caption, "):
        train(tmp_path / "wrong", keep_tokens=1)


def test_choices_and_dropped_tags_reach_the_training(tmp_path):
    def captioned(name: str, caption: str, **options) -> Path:
        folder = tmp_path / f"{name} images"
        shutil.copytree(SUBJECTS / "octopus", folder)
        for number in range(5):
            (folder / f"{number}.txt").write_text(caption)
        return train_without_export(tmp_path / name, instance_data_dir=folder, **options)

    plain = captioned("plain", "sks, octopus")
    assert losses(captioned("braces", "sks, {octopus|octopus}", enable_wildcard=True)) == losses(plain)
    assert losses(captioned("choices", "sks, {octopus|cactus}", enable_wildcard=True)) != losses(plain)
    first = losses(captioned("first", "sks"))
    every = captioned("dropped", "sks, octopus", caption_tag_dropout_rate=0.999, keep_tokens=1)
    assert losses(every) == first


def test_layers_of_clip_are_skipped_as_everybody_skips_them(tmp_path):
    options = {"max_train_steps": 1, "validation_prompt": [PROMPT], "num_validation_images": 1}
    folder = train(tmp_path / "run", skip_clip_layers=1, train_text_encoder=True, **options)
    pipe = StableDiffusionPipeline.from_pretrained(tiny_pipeline_folder())
    pipe.set_progress_bar_config(disable=True)
    inner = getattr(pipe.text_encoder, "text_model", pipe.text_encoder)

    def encoded(prompt: str) -> torch.Tensor:
        ids = pipe.tokenizer(prompt, padding="max_length", return_tensors="pt").input_ids
        with torch.no_grad():
            states = pipe.text_encoder(ids, output_hidden_states=True).hidden_states
            assert not torch.allclose(states[-2], states[-1])
            return inner.final_layer_norm(states[-2])

    embeds = {"prompt_embeds": encoded(PROMPT), "negative_prompt_embeds": encoded("")}
    source = generator(0, Stream.VALIDATION, 0)
    generated = np.asarray(pipe(**embeds, num_inference_steps=2, generator=source).images[0])
    np.testing.assert_array_equal(generated, Image.open(folder / "samples" / "step-000000" / "0-0.png"))
    layers = {int(name.split("layers.")[1][0]) for name in load_file(folder / WEIGHTS) if "text_encoder" in name}
    assert layers == {0}
    program = (folder / "README.md").read_text().split("```python\n")[1].split("image = ")[0]
    names = {}
    here = program.replace('"."', json.dumps(str(folder))).replace('base = "', f'base = "{folder}/')
    exec(here, names)
    assert len(getattr(names["pipe"].text_encoder, "text_model", names["pipe"].text_encoder).encoder.layers) == 1
    with pytest.raises(ValueError, match="--skip_clip_layers: got 2, wanted less than the 2 layers"):
        train(tmp_path / "too-many", skip_clip_layers=2)


def test_class_images_that_are_there_are_used_and_missing_ones_are_made(tmp_path):
    classes = tmp_path / "classes"
    classes.mkdir()
    Image.open(SUBJECTS / "cake" / "0.png").save(classes / "mine.png")
    (classes / ".DS_Store").write_bytes(b"\0")
    options = {"with_prior_preservation": True, "class_data_dir": classes, "class_prompt": "food", "max_train_steps": 1}
    train_without_export(tmp_path / "one", num_class_images=3, **options)
    made = sorted(path.name for path in classes.glob("0*.png"))
    assert len(made) == 2
    train_without_export(tmp_path / "two", num_class_images=3, **options)
    assert sorted(path.name for path in classes.glob("0*.png")) == made


def test_class_images_are_a_function_of_seed_and_number(tmp_path):
    """Whatever was there before, and wherever it was broken off."""
    options = {"with_prior_preservation": True, "class_prompt": "food", "max_train_steps": 1, "sample_batch_size": 2}
    train_without_export(tmp_path / "one", class_data_dir=tmp_path / "whole", num_class_images=5, **options)
    whole = {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}
    assert [name[:4] for name in sorted(whole)] == [f"{n:04d}" for n in range(5)]
    torn = tmp_path / "torn"  # what two processes may leave: 0, 2 and 4 are there, 4 of them only half
    torn.mkdir()
    for name in sorted(whole)[0:3:2]:
        (torn / name).write_bytes(whole[name])
    Image.open(SUBJECTS / "cake" / "0.png").save(torn / "mine.png")
    train_without_export(tmp_path / "two", class_data_dir=torn, num_class_images=6, **options)
    assert {path.name: path.read_bytes() for path in torn.glob("0*.png")} == whole


def test_images_and_captions_that_changed_since_a_checkpoint_are_said(tmp_path, capsys):
    folder = tmp_path / "images"
    shutil.copytree(SUBJECTS / "octopus", folder)
    names = sorted(path.name for path in folder.glob("*.png"))
    train_without_export(tmp_path / "run", instance_data_dir=folder, max_train_steps=1, checkpointing_steps=1)
    options = {"instance_data_dir": folder, "resume_from_checkpoint": "latest"}
    capsys.readouterr()
    train_without_export(tmp_path / "run", max_train_steps=1, **options)
    assert "since the checkpoint" not in capsys.readouterr().out
    (folder / names[0]).unlink()
    (folder / names[1]).with_suffix(".txt").write_text("another caption")
    shutil.copy(SUBJECTS / "cake" / "0.png", folder / names[2])
    shutil.copy(SUBJECTS / "cake" / "1.png", folder / "new.png")
    train_without_export(tmp_path / "run", max_train_steps=2, **options)
    said = capsys.readouterr().out
    assert "1 images were added since the checkpoint: instance 1/new.png" in said
    assert f"1 images of the checkpoint are gone: instance 1/{names[0]}" in said
    assert f"changed since the checkpoint, image: instance 1/{names[2]}" in said
    assert f"changed since the checkpoint, caption: instance 1/{names[1]}" in said


def test_a_run_may_start_from_a_lora_of_any_program(tmp_path, capsys):
    options = {"method": "lora", "train_text_encoder": True, "save_precision": "fp32", "lora_alpha": 8}
    first = train(tmp_path / "first", **options)
    found = report(first)
    count = sum(name.endswith("lora_down.weight") for name in load_file(first / "kohya" / "first.safetensors"))
    more = {"rank": 6, "lora_alpha": 3, "max_train_steps": 1, "learning_rate": 1e-3}
    for name, source in (("kohya", first / "kohya" / "first.safetensors"), ("folder", first)):
        second = train(tmp_path / name, **{**options, **more, "network_weights": source})
        assert f"{source} fills {count} layers" in capsys.readouterr().out
        start = rows(second)[0]["validation_loss"]
        assert start == pytest.approx(found["loss_trained"], rel=1e-5)
        assert start != pytest.approx(found["loss_base"], rel=1e-5)
        assert report(second)["loss_base"] == pytest.approx(found["loss_base"], rel=1e-5)
        assert report(second)["loss_trained"] not in (start, found["loss_base"])
    for wrong, said in (
        ({"network_weights": first / "nothing"}, "--network_weights .* does not exist"),
        ({"rank": 2}, "is of rank 4 in .*; wanted --rank 4 or more"),
        ({"train_text_encoder": False}, "modules that this run does not train .--train_text_encoder\\?.: text_encoder"),
        ({"target_modules": ["to_q"]}, "modules that this run does not train: unet"),
        ({"method": "reslora"}, "a shortcut would change it; wanted --method lora"),
    ):
        with pytest.raises(ValueError, match=said):
            train(tmp_path / "wrong", **{**options, "network_weights": first, **wrong})


# ------------------------------------------------------------------------------------------------ when it goes wrong


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_state(tmp_path):
    folder = tmp_path / "run"
    train(folder, checkpointing_steps=2, max_train_steps=2)
    exported, good = (folder / WEIGHTS).read_bytes(), state(folder / "checkpoint-2")
    with pytest.raises(Stopped, match=r"step \d+: the loss is (nan|inf)"):
        train(
            folder,
            resume_from_checkpoint="latest",
            max_train_steps=30,
            checkpointing_steps=2,
            checkpoints_total_limit=1,
            learning_rate=1e25,
        )
    assert (folder / WEIGHTS).read_bytes() == exported
    assert all(np.isfinite(losses(folder)))
    kept = sorted(folder.glob("checkpoint-*"))
    assert kept
    for checkpoint in kept:
        assert all(value.isfinite().all() for name, value in state(checkpoint).items() if "lora_" in name)
    assert good


def test_adapters_that_learned_nothing_are_not_exported(tmp_path):
    with pytest.raises(ValueError, match="every lora_B is zero"):
        train(tmp_path / "run", lr_scheduler="constant_with_warmup", max_train_steps=1, optimizer="sgd")
    assert not (tmp_path / "run" / WEIGHTS).exists()


def test_the_best_step_on_held_out_images_is_exported_by_a_continued_run_too(tmp_path):
    """The third of six steps is best, which lies before the checkpoint that is continued from."""
    options = {"learning_rate": 1.0, "rank": 16, "lora_alpha": 160, "num_previous": "all"}
    options |= {"max_train_steps": 6, "checkpointing_steps": 1, "validation_steps": 1, "validation_split": 0.2}
    folder = train(tmp_path / "run", keep_best=True, **options)
    measured = {row["step"]: row["validation_loss"] for row in rows(folder) if row.get("step") and "merge_gap" in row}
    best = min(measured, key=measured.get)
    assert best == 3, f"another step is best: {measured}"
    found, exported = report(folder), load_file(folder / WEIGHTS)
    assert found["step"] == best
    assert found["loss_merged"] == pytest.approx(measured[best], rel=1e-5)
    assert_same(exported, load_file(folder / f"checkpoint-{best}" / WEIGHTS))
    last, metrics = load_file(folder / "checkpoint-6" / WEIGHTS), rows(folder)
    assert any(not torch.equal(value, last[name]) for name, value in exported.items())
    for name in ("checkpoint-6", "checkpoint-5", WEIGHTS, "merge_report.json"):
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    train(folder, keep_best=True, **options, resume_from_checkpoint="latest")
    assert report(folder) == found
    assert rows(folder) == metrics
    assert_same(load_file(folder / WEIGHTS), exported)


def test_images_of_another_folder_are_validated_on_and_not_trained_on(tmp_path):
    for name, numbers in {"train": (0, 1, 2), "apart": (3, 4)}.items():
        (tmp_path / name).mkdir()
        for number in numbers:  # of the same names in both folders
            shutil.copy(SUBJECTS / "octopus" / f"{number}.png", tmp_path / name / f"{number % 3}.png")
    options = {"instance_data_dir": tmp_path / "train", "max_train_steps": 4, "validation_steps": 2}
    plain = train_without_export(tmp_path / "plain", **options)
    apart = train(tmp_path / "measured", validation_data_dir=tmp_path / "apart", keep_best=True, **options)
    assert losses(plain) == losses(apart)
    seen, unseen = ([row["validation_loss"] for row in rows(run) if "validation_loss" in row] for run in (plain, apart))
    assert all(one != other for one, other in zip(seen, unseen, strict=True))
