"""`--schedule` and the optimizers of pairs in the DreamBooth trainer: training, resuming, exporting, and refusals."""

import json
import shutil
import signal
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file

from dreambooth import arguments, script, train
from reslora_diffusion.diffusion.objective.loss import Denoiser
from reslora_diffusion.diffusion.options import checks
from reslora_diffusion.diffusion.options.preflight import preflight
from reslora_diffusion.diffusion.train.history import read_history
from reslora_diffusion.diffusion.train.race import race
from reslora_diffusion.interruption import Interruption
from reslora_diffusion.methods.pruning import load_pruned
from reslora_diffusion.utils.problems import BadInput, Interrupted
from tiny import tiny_pipeline_folder

WEIGHTS = "pytorch_lora_weights.safetensors"


def state(folder, step):
    return load_file(folder / f"checkpoint-{step}" / "state" / "state.safetensors")


def assert_same(got, wanted):
    assert got.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(got[name], tensor), name


ENTIRE = [
    {"schedule": "coto", "shortcut": "middle", "use_ema": True, "gradient_accumulation_steps": 2},
    {"schedule": "coto:initial_p=0.3", "shortcut": "block", "optimizer": "rite", "train_text_encoder": True},
    {"schedule": "restart:stages=2,momentum=0.5,warmup=1", "shortcut": "block", "lr_scheduler": "linear"},
    {"schedule": "restart:ranks=4/2", "method": "lora", "use_ema": True, "gradient_checkpointing": True},
    {"schedule": "restart:ranks=4/2", "shortcut": "none", "optimizer": "pro"},
    {"schedule": "fold:at=0.5", "shortcut": "block", "optimizer": "rite"},
    {"schedule": "fold:at=0.5", "shortcut": "input", "optimizer": "scaled_adamw"},
    {"schedule": "coto", "shortcut": "input", "optimizer": "reflora"},
    {"schedule": "coto", "shortcut": "block", "optimizer": "scaled_adamw"},
    {"schedule": "coto", "method": "lora", "optimizer": "pro"},
    {"schedule": "ranks:ratio=0.5,every=1", "shortcut": "block", "train_text_encoder": True},
    {"schedule": "restart:stages=2,momentum=0.5,merge=true", "shortcut": "block", "train_text_encoder": True},
]


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(options, marks=[pytest.mark.slow] if place % 2 or place > 5 else [])
        for place, options in enumerate(ENTIRE)
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_a_run_resumed_at_any_step_is_the_uninterrupted_one(tmp_path, options):
    """Step 2 of 4 is the knot of two links; the second link begins there, with a B of zero."""
    options = options | {"max_train_steps": 4, "checkpointing_steps": 2, "lr_warmup_steps": 1}
    whole = train(tmp_path / "whole", **options)
    again = tmp_path / "again"
    shutil.copytree(whole / "checkpoint-2", again / "checkpoint-2")
    train(again, **options, resume_from_checkpoint="latest")
    assert_same(state(again, 4), state(whole, 4))
    assert_same(load_file(again / WEIGHTS), load_file(whole / WEIGHTS))
    ranks = {len(tensor) for name, tensor in load_file(whole / WEIGHTS).items() if "lora_A" in name}
    if "stages" in options["schedule"]:
        assert ranks == {2 * (4 + 4)}  # two links, those of the block before with them
        assert len(load_file(whole / "checkpoint-2" / WEIGHTS))  # at the knot, where every lora_B was small or zero
    elif options["schedule"].startswith("ranks:"):
        assert ranks == {2 * (4 - 2)}
    elif "ranks" in options["schedule"]:
        assert ranks == {4 + 2}
        assert (whole / "checkpoint-2" / WEIGHTS).is_file()
    for name, tensor in state(whole, 4).items():
        assert tensor.isfinite().all(), name


def test_dropped_adapters_change_what_is_learned_and_the_header_says_so(tmp_path):
    plain = train(tmp_path / "plain", shortcut="block", optimizer="scaled_adamw")
    coto = train(tmp_path / "coto", shortcut="block", optimizer="reflora", schedule="coto")
    one, other = load_file(plain / WEIGHTS), load_file(coto / WEIGHTS)
    assert any(not torch.equal(one[name], other[name]) for name in one)
    assert json.loads((coto / "run.json").read_text())["options"]["schedule"] == "coto"


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        (
            {"schedule": "cotto", "shortcut": "block", "rank": 0},
            ["--schedule: got 'cotto', wanted coto, restart, fold, prune, ranks; did you mean coto?", "--rank: got 0"],
        ),
        (
            {"schedule": "restart:stages=9,ranks=8/4", "shortcut": "input", "scale_weight_norms": 1.0},
            ["restart: ranks: got 2 of them for 9 stages"],
        ),
        (
            {"schedule": "restart:ranks=8/4/2/1", "shortcut": "input", "scale_weight_norms": 1.0, "handover": 0.5},
            [
                "what `input` makes of it depends on activations",
                "--scale_weight_norms sees the link that is trained",
                "--handover is another schedule",
                "got 4 stages in 3 steps",
                "ranks begin with 8, and the adapter has rank 4",
            ],
        ),
        (
            {"schedule": "restart:merge=true", "shortcut": "block", "mixed_precision": "bf16"},
            ["restart: merge adds links to a base in bf16, which would round them away"],
        ),
        ({"schedule": "coto", "cuda_graph": True}, ["coto: a recorded step updates every adapter"]),
        ({"schedule": "fold", "shortcut": "none"}, ["fold: there is no shortcut to fold"]),
        (
            {"schedule": "restart", "shortcut": "block", "target_modules": ["to_q", "conv1"]},
            ["restart: convolutions and embeddings are adapted by PEFT's own layers"],
        ),
        (
            {"optimizer": "rite", "shortcut": "middle", "loraplus_lr_ratio": 16},
            ["--optimizer rite: with `middle` one lora_B", "--optimizer rite: LoRA+ trains lora_A and lora_B at two"],
        ),
        (
            {"optimizer": "pro", "cuda_graph": True, "method": "lora"},
            ["--optimizer pro: a step looks at values on the host"],
        ),
        ({"optimizer": "rite", "optimizer_args": ["damp=1"], "method": "lora"}, ["LoraRite has no 'damp'; it has "]),
    ],
)
def test_what_does_not_go_together_is_refused_before_a_model_is_loaded(tmp_path, options, wanted):
    with pytest.raises(BadInput) as caught:
        checks.check(arguments(tmp_path / "run", **options))
    for part in wanted:
        assert part in str(caught.value)


def test_another_schedule_does_not_continue_a_run(tmp_path):
    folder = train(tmp_path / "run", shortcut="block", schedule="coto", checkpointing_steps=3)
    with pytest.raises(BadInput, match="was trained with --schedule 'coto', got None; wanted the same"):
        script.main(arguments(folder, shortcut="block", resume_from_checkpoint="latest"))


def test_settings_of_an_optimizer_of_pairs(tmp_path):
    from reslora_diffusion.diffusion.train.optimizers import settings
    from reslora_diffusion.methods.optimizers import LoraPro, LoraRite

    args = arguments(tmp_path, optimizer="rite", adam_beta2=0.99, optimizer_args=["clip_unmagnified=None"])
    assert settings(LoraRite, args) == {"betas": (0.9, 0.99), "clip_unmagnified": None}  # its own eps and decay
    args = arguments(tmp_path, optimizer="rite", adam_epsilon=1e-5)
    assert settings(LoraRite, args)["eps"] == 1e-5
    assert settings(LoraPro, args)["weight_decay"] == args.adam_weight_decay


PRUNED = {"target_modules": ["to_q", "to_k", "to_v", "to_out.0", "net.0.proj", "net.2"], "method": "lora"}


def test_a_run_that_prunes_leaves_a_smaller_denoiser_and_resumes_bit_for_bit(tmp_path):
    """The outer blocks stay whole, so `load_pruned` reads it; half of the heads and channels of the others is gone."""
    options = PRUNED | {"schedule": "prune:ratio=0.5,every=1", "max_train_steps": 4, "checkpointing_steps": 2}
    whole = train(tmp_path / "whole", **options)
    again = tmp_path / "again"
    shutil.copytree(whole / "checkpoint-2", again / "checkpoint-2")
    train(again, **options, resume_from_checkpoint="latest")
    assert_same(state(again, 4), state(whole, 4))
    stored = load_file(whole / "pruned" / "diffusion_pytorch_model.safetensors")
    assert_same(load_file(again / "pruned" / "diffusion_pytorch_model.safetensors"), stored)
    assert not list(whole.rglob(WEIGHTS))  # a LoRA of the whole model was not trained
    report = json.loads((whole / "pruning_report.json").read_text())
    assert report["parameters_after"] == sum(value.numel() for value in stored.values()) < report["parameters_before"]
    assert report["loss_pruned"] == pytest.approx(report["loss_masked"], rel=1e-5)
    assert report["loss_pruned"] != pytest.approx(report["loss_base"], rel=1e-5)
    kept = {name: left for name, left in report["kept"].items() if name.endswith((".attn1", ".ff"))}
    assert sorted(left == "2 of 4" for name, left in kept.items() if name.endswith("attn1")) == [False] * 2 + [True] * 5
    unet = load_pruned(whole / "pruned", UNet2DConditionModel)
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_pipeline_folder(), unet=unet, safety_checker=None)
    made = pipeline("a sticker", num_inference_steps=1, height=64, width=64, output_type="latent").images
    assert made.isfinite().all()


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        (
            {"schedule": "prune:ratio=1.5,parts=mlp", "shortcut": "block"},
            ["prune: ratio: got 1.5, wanted a number above 0 and below 1", "prune: parts: got 'mlp'"],
        ),
        (
            {"schedule": "prune", "shortcut": "input", "cuda_graph": True, "train_text_encoder": True},
            ["`input` depends on activations", "wanted no --cuda_graph", "wanted no --train_text_encoder"],
        ),
        ({"schedule": "prune:ratio=0.9", **PRUNED}, ["ratio=0.9 would leave", "without heads: it has 4"]),
        ({"schedule": "prune", "method": "lora"}, ["channels of", "have no adapter, so nothing scores them"]),
    ],
)
def test_what_cannot_be_pruned_is_refused_before_weights_are_read(tmp_path, options, wanted):
    with pytest.raises(BadInput) as caught:
        checks.check(arguments(tmp_path / "run", **options))
    for part in wanted:
        assert part in str(caught.value)


def test_contenders_of_a_race_are_methods_of_the_family(tmp_path):
    words = ["lora", "lora+rite", "reslora-block+coto:num_previous=2"]
    script.main(arguments(tmp_path, compare=words, max_train_steps=2, seed=1))
    found, weights = {}, []
    for folder in ("lora", "lora+rite", "reslora-block+coto-num_previous=2"):
        options = json.loads((tmp_path / folder / "run.json").read_text())["options"]
        found[folder] = [options[name] for name in ("optimizer", "schedule", "shortcut", "num_previous")]
        weights.append(load_file(tmp_path / folder / WEIGHTS))
    assert [*found.values()] == [
        ["adamw", None, None, None],
        ["rite", None, None, None],
        ["adamw", "coto", "block", 2],
    ]
    first, second, _ = weights
    assert any(not torch.equal(first[name], second[name]) for name in first)


def test_a_race_has_no_place_for_a_run_that_leaves_no_lora(tmp_path):
    options = {"compare": ["lora", "reslora-block"], "schedule": "prune", "target_modules": PRUNED["target_modules"]}
    with pytest.raises(BadInput, match="no LoRA that could be compared"):
        script.main(arguments(tmp_path / "race", **options))


def test_rite_is_told_that_gradients_are_clipped_before_it(tmp_path):
    args = arguments(tmp_path, optimizer="rite", shortcut="block")
    assert any("rite clips by itself" in line for line in preflight(checks.check(args), args))
    high = arguments(tmp_path, optimizer="rite", shortcut="block", max_grad_norm=1000)
    assert not any("rite clips by itself" in line for line in preflight(checks.check(high), high))


def test_nothing_is_measured_twice_where_nothing_is_merged(tmp_path, monkeypatch):
    """A plain LoRA of two steps: 4 forwards for the base, 1 for its memory, 2 steps, and 4 at the end."""
    count, predict = [0], Denoiser.predict

    def counted(self, batch):
        count[0] += 1
        return predict(self, batch)

    monkeypatch.setattr(Denoiser, "predict", counted)
    options = {"keep_best": True, "validation_split": 0.4}  # which asks for the loss as merged
    output = train(tmp_path / "lora", method="lora", max_train_steps=2, **options)
    assert count[0] == 11
    report = json.loads((output / "merge_report.json").read_text())
    last = [row for row in read_history(output) if "validation_loss" in row][-1]
    assert (report["loss_trained"], last["step"]) == (last["validation_loss"], 2)
    assert report["loss_trained"] == report["loss_merged"] != report["loss_base"]
    count[0] = 0
    output = train(tmp_path / "block", shortcut="block", max_train_steps=2)
    assert count[0] == 11 + 4  # as merged
    report = json.loads((output / "merge_report.json").read_text())
    assert report["gap"] == pytest.approx(0, abs=1e-5)


def test_ctrl_c_in_the_last_step_of_a_contender_ends_the_comparison(tmp_path):
    """The contender finishes, and the next one must not begin."""
    begun = []

    def run(options):
        with Interruption(Accelerator()):
            begun.append(options.output_dir)
            signal.raise_signal(signal.SIGINT)
        return Path(options.output_dir)

    with pytest.raises(Interrupted, match="after lora, 1 of 2"):
        race(arguments(tmp_path, compare=["lora", "reslora-block"], max_train_steps=2, seed=1), run)
    assert len(begun) == 1
