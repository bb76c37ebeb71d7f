"""Every schedule with every optimizer and shortcut trains and exports, or is refused for the reason in the table."""

import pytest
import torch

from models import build, inputs, output
from reslora_diffusion import calibrate, factor_pairs, get_controller, merged_factors
from reslora_diffusion.core.attach import AdaptedModel
from reslora_diffusion.methods.optimizers import OPTIMIZERS
from reslora_diffusion.methods.schedules import parse_schedule
from reslora_diffusion.methods.schedules.making import make_schedule
from reslora_diffusion.methods.schedules.settings import SCHEDULES, conflicts_of
from reslora_diffusion.methods.table import FEATURES, conflicts, table
from test_core_shortcuts import adapted, loss_of

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
    if get_controller(model).merges_exactly:
        assert torch.allclose(got, wanted, atol=1e-10)


def test_the_table_is_made_of_what_is_checked() -> None:
    text = table()
    for method, reasons in conflicts().items():
        assert method.rpartition(" ")[2] in text
        assert set(reasons) <= set(FEATURES), method
        for reason in reasons.values():
            assert reason in text
    lines = {line.split("  ")[0]: line.split("  ")[1:] for line in text.splitlines()}
    marks = [cell.strip() for cell in lines["--shortcut middle"] if cell.strip()]
    assert marks == ["yes", "no", "yes", "no", "no", "no", "no"]
    assert [kind.conflicts for kind in SCHEDULES.values()] == list(conflicts().values())[:3]
