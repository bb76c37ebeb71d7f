"""Every schedule with every optimizer and shortcut trains and exports, or is refused for the reason in the table."""

import re

import pytest
import torch

from dora_reference import decomposed
from dreambooth import arguments
from models import build, inputs, output
from reslora_diffusion import calibrate, factor_pairs, get_adapter, merged_factors
from reslora_diffusion.core.attach import AdaptedModel
from reslora_diffusion.diffusion.models.architecture import read_architecture
from reslora_diffusion.diffusion.options.model_checks import adapter_problems
from reslora_diffusion.diffusion.train.schedules import conflict_problems, schedule_problems
from reslora_diffusion.export import export_lora, export_peft
from reslora_diffusion.llm import methods as llm_methods
from reslora_diffusion.llm.checks import option_problems
from reslora_diffusion.llm.options import ModelOptions
from reslora_diffusion.llm.training_options import TrainingOptions
from reslora_diffusion.methods.optimizers import OPTIMIZERS
from reslora_diffusion.methods.schedules import Prune, Schedule, parse_schedule
from reslora_diffusion.methods.schedules.making import make_schedule
from reslora_diffusion.methods.schedules.settings import SCHEDULES, Settings, conflicts_of
from reslora_diffusion.methods.table import FEATURES, conflicts, table
from test_core_dora import with_dora
from test_core_shortcuts import adapted, loss_of

SHORTCUTS = ("none", "input", "block", "middle")
BATCHES = [inputs("llama", seed=n) for n in range(4)]


def forward(model, batch):
    return output("llama", model, batch)


@pytest.mark.parametrize("text", ["coto", "restart:stages=2,momentum=0.5", "restart:ranks=3/2", "fold:at=0.5"])
@pytest.mark.parametrize("shortcut", ["none", "input", "block", "middle"])
@pytest.mark.parametrize("kind", ["adamw", *OPTIMIZERS])
def test_what_the_table_says_is_what_happens(text: str, shortcut: str, kind: str) -> None:
    model, settings = adapted("llama", shortcut, 1), parse_schedule(text)
    trained = [p for p in model.parameters() if p.requires_grad]
    refusals = (
        [OPTIMIZERS[kind].conflicts[shortcut]] if shortcut in getattr(OPTIMIZERS.get(kind), "conflicts", ()) else []
    )
    if refusals:
        with pytest.raises(ValueError, match="shortcut none, input or block"):
            OPTIMIZERS[kind](trained, factor_pairs(model), lr=1e-3)
        return
    if kind == "adamw":
        optimizer = torch.optim.AdamW(trained, lr=1e-3)
    else:
        optimizer = OPTIMIZERS[kind](trained, factor_pairs(model), lr=1e-3)
    schedule = make_schedule(settings, seed=1, calibrate=lambda: calibrate(model, BATCHES, forward))
    if conflicts_of(settings, [shortcut]):
        if settings.name == "restart":
            with pytest.raises(ValueError, match="wanted shortcut none or block"):
                schedule.start([AdaptedModel(model)], 4, optimizer)
        return
    schedule.start([AdaptedModel(model)], 4, optimizer)
    for step, batch in enumerate(BATCHES):
        schedule.before_step(step)
        loss_of(forward(model, batch)).backward()
        schedule.after_backward(step)
        trained = [p for p in model.parameters() if p.requires_grad]
        gradients = [p.grad for p in trained if p.grad is not None]
        assert gradients
        assert all(gradient.isfinite().all() for gradient in gradients)
        assert any(gradient.any() for gradient in gradients)
        optimizer.step()
        optimizer.zero_grad()
        schedule.after_step(step + 1)
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == {id(p) for p in trained}
    if kind in OPTIMIZERS:
        assert {id(p) for pair in optimizer.pairs for p in (pair.A, pair.B)} == {id(p) for p in trained}
    calibrate(model, BATCHES, forward)
    plain = build("llama")
    for name, (A, B, scaling) in merged_factors(model).items():
        plain.get_submodule(name).weight.data += scaling * B @ A
    got, wanted = forward(plain, BATCHES[0]), forward(model, BATCHES[0])
    assert (got - forward(build("llama"), BATCHES[0])).abs().max() > 1e-3
    if get_adapter(model).merges_exactly:
        assert torch.allclose(got, wanted, atol=1e-10)


TEXTS = ["coto", "restart:stages=2,momentum=0.5", "fold:at=0.5", "prune:parts=heads,every=1", "ranks:every=1", None]
UNET_BATCHES = [inputs("unet", seed=n) for n in range(3)]
MADE = {"llama": BATCHES[:3], "unet": UNET_BATCHES}


def combinations() -> list:
    """Every schedule, shortcut and optimizer; those that have both a schedule and an optimizer take their time."""
    return [
        pytest.param(name, text, shortcut, kind, marks=[pytest.mark.slow] if text and kind else [])
        for name in MADE
        for text in TEXTS
        for shortcut in SHORTCUTS
        for kind in (None, *OPTIMIZERS)
        if text or kind
    ]


@pytest.mark.parametrize(("name", "text", "shortcut", "kind"), combinations())
def test_every_pair_trains_three_steps_and_exports_what_is_proved(
    tmp_path, name: str, text: str | None, shortcut: str, kind: str | None
) -> None:
    settings = text and parse_schedule(text)
    refused = [*(conflicts_of(settings, [shortcut]) if settings else [])]
    refused += [OPTIMIZERS[kind].conflicts[shortcut]] if kind and shortcut in OPTIMIZERS[kind].conflicts else []
    if refused:  # by both trainers, before a model is loaded: below
        return
    model, batches = adapted(name, shortcut, 1), MADE[name]
    before = output(name, model, batches[0])
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = OPTIMIZERS[kind](trained, factor_pairs(model), lr=1e-3) if kind else torch.optim.AdamW(trained, lr=1e-3)
    run = lambda model, batch: output(name, model, batch)  # noqa: E731
    schedule = make_schedule(settings, seed=1, calibrate=lambda: calibrate(model, batches, run)) if text else Schedule()
    schedule.start([AdaptedModel(model)], 3, optimizer)
    for step, batch in enumerate(batches):
        schedule.before_step(step)
        loss_of(run(model, batch)).backward()
        schedule.after_backward(step)
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        assert all(gradient.isfinite().all() for gradient in gradients)
        assert any(gradient.any() for gradient in gradients)
        optimizer.step()
        optimizer.zero_grad()
        schedule.after_step(step + 1)
    after = output(name, model, batches[0])
    assert after.isfinite().all()
    assert (after - before).abs().max() > 1e-4
    if isinstance(schedule, Prune):
        slim, _ = schedule.slim()
        assert torch.allclose(output(name, slim, batches[0]), after, atol=1e-10)
        return
    calibrate(model, batches, run)
    factors = merged_factors(model)
    if name == "unet":
        report = export_lora(tmp_path, {"unet": factors}, name="x", dtype=torch.float32)
    else:
        report = export_peft(tmp_path, factors, dtype=torch.float32)
    assert report.files
    assert all(path.is_file() for path in report.files.values())


@pytest.mark.parametrize("text", ["coto", "restart:stages=2,momentum=0.5", None])
@pytest.mark.parametrize("shortcut", ["none", "block"])
@pytest.mark.parametrize("name", MADE)
def test_dora_trains_three_steps_with_what_it_composes_with(
    tmp_path, name: str, shortcut: str, text: str | None
) -> None:
    model, batches = with_dora(name, shortcut), MADE[name]
    before = output(name, model, batches[0])
    assert (before - output(name, build(name), batches[0])).abs().max() > 1e-3
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    schedule = make_schedule(parse_schedule(text), seed=1) if text else Schedule()
    schedule.start([AdaptedModel(model)], 3, optimizer)
    moved = {key: p.detach().clone() for key, p in model.named_parameters() if "magnitude" in key}
    for step, batch in enumerate(batches):
        schedule.before_step(step)
        loss_of(output(name, model, batch)).backward()
        schedule.after_backward(step)
        gradients = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
        assert all(gradient.isfinite().all() for gradient in gradients.values())
        assert any(gradient.any() for key, gradient in gradients.items() if "magnitude" in key)
        optimizer.step()
        optimizer.zero_grad()
        schedule.after_step(step + 1)
    parameters = dict(model.named_parameters())
    assert any(not torch.equal(parameters[key], value) for key, value in moved.items())
    after = output(name, model, batches[0])
    assert (after - before).abs().max() > 1e-4
    factors, plain = merged_factors(model), build(name)
    for path, f in factors.items():
        weight = plain.get_submodule(path).weight
        weight.data.copy_(decomposed(weight, *f, f.magnitude.values))
    assert torch.allclose(output(name, plain, batches[0]), after, atol=1e-9)
    if name == "unet":
        report = export_lora(tmp_path, {"unet": factors}, name="x", dtype=torch.float32, models={"unet": model})
    else:
        report = export_peft(tmp_path, factors, dtype=torch.float32)
    assert report.largest_error < 1e-5


ASKED = {  # options of the DreamBooth trainer, or of the language models', by feature
    **{shortcut: {"shortcut": shortcut} for shortcut in SHORTCUTS},
    "loraplus": {"loraplus_lr_ratio": 16.0, "shortcut": "block"},
    "max_norm": {"scale_weight_norms": 1.0, "shortcut": "block"},
    "convolutions": {"target_modules": ["to_q", "conv1"], "shortcut": "block"},
    "cuda_graph": {"cuda_graph": True, "shortcut": "block"},
    "text_encoder": {"train_text_encoder": True, "shortcut": "block"},
    "sharded_base": {"shortcut": "block"},
    "best": {"keep_best": True, "shortcut": "block"},
    "network_weights": {"network_weights": "lora.safetensors", "shortcut": "block"},
    "dora": {"use_dora": True, "shortcut": "block"},
    "ema": {"use_ema": True, "shortcut": "block"},
    "quantised": {"quantization": "int8wo", "shortcut": "block"},
}
OF_LLM = {
    **{shortcut: {"shortcut": shortcut} for shortcut in SHORTCUTS},
    "best": {"load_best_model_at_end": True, "shortcut": "none"},
    "fsdp": {"fsdp": "full_shard", "shortcut": "none"},
    "deepspeed": {"deepspeed": "zero.json", "shortcut": "none"},
    "dora": {"use_dora": True, "shortcut": "none"},
    "quantised": {"load_in_8bit": True, "shortcut": "none"},
}


def words_of(method: str) -> dict[str, str]:
    flag, _, name = method.removeprefix("--").partition(" ")
    return {flag: name or True}


@pytest.mark.parametrize("method", conflicts())
def test_every_no_of_the_table_is_said_before_a_model_is_loaded(tmp_path, monkeypatch, method: str) -> None:
    """The trainers that have the feature say it."""
    for feature, reason in conflicts()[method].items():
        said = []
        if feature in ASKED:
            monkeypatch.setenv("ACCELERATE_USE_FSDP", str(feature == "sharded_base").lower())
            options = arguments(tmp_path, **words_of(method), **ASKED[feature])
            base = read_architecture(options)
            options.take_defaults(base.family)
            said += [*schedule_problems(options, base, None), *conflict_problems(options)]
            said += adapter_problems(options)
            assert any(reason in line for line in said), (method, feature)
        if feature in OF_LLM:
            options, training = ModelOptions(), TrainingOptions()
            for name, value in {**words_of(method), **OF_LLM[feature]}.items():
                setattr(options if hasattr(options, name) else training, name, value)
            training.load_best_model_at_end = feature == "best"
            for find in (llm_methods.schedule_problems, llm_methods.optimizer_problems):
                said += find(options, training)
            said += option_problems(options)
            assert any(reason in line for line in said), (method, feature)
        assert feature in {*ASKED, *OF_LLM}, feature


def test_the_table_is_made_of_what_is_checked() -> None:
    text = table()
    for method, reasons in conflicts().items():
        assert method.rpartition(" ")[2] in text
        assert set(reasons) <= set(FEATURES), method
        for reason in reasons.values():
            assert reason in text
    head, *lines = [re.split(r" {2,}", line.strip()) for line in text.splitlines()]
    marks = dict(zip(head, next(line for line in lines if line[0] == "--shortcut middle")[1:], strict=True))
    assert marks.items() >= {"coto": "yes", "restart": "no", "fold": "yes", "rite": "no", "dora": "no"}.items()
    assert marks == {
        method.rpartition(" ")[2].removeprefix("--use_"): "no" if "middle" in reasons else "yes"
        for method, reasons in conflicts().items()
    }


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_that_is_offered_is_made(name: str) -> None:
    assert type(make_schedule(parse_schedule(name), seed=0)).__name__.lower() == name


def test_settings_that_nobody_makes_a_schedule_of_are_refused() -> None:
    class Other(Settings):
        name, summary, conflicts = "other", "", {}

    with pytest.raises(NotImplementedError, match="Other"):
        make_schedule(Other(), seed=0)
