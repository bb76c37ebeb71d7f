"""Schedules: what a training loop is told, and folding as the first of them, in a loop and on resumption."""

import copy

import pytest
import torch
from torch import nn

from reslora_diffusion import calibrate, get_adapter, merged_forward
from reslora_diffusion.core.attach import AdaptedModel
from reslora_diffusion.methods.schedules import Change, Fold, Schedule
from test_core_merging import BATCHES, HELD_OUT, adapted, forward


def train(model: nn.Module, schedule: Schedule, steps: int, first: int = 0, optimizer=None) -> list[Change]:
    """A visible loop; returns what the schedule said of each step."""
    optimizer = optimizer or torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    changes = []
    for step in range(first, steps):
        schedule.before_step(step)
        forward(model, BATCHES[step % len(BATCHES)]).square().mean().backward()
        schedule.after_backward(step)
        optimizer.step()
        optimizer.zero_grad()
        changes.append(schedule.after_step(step + 1))
    return changes


@pytest.mark.parametrize("shortcut", ["input", "middle", "block", "none"])
def test_folding_at_its_share_of_the_steps(shortcut: str) -> None:
    model = adapted(shortcut)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    schedule = Fold(0.5, lambda: calibrate(model, BATCHES, forward), optimizer)
    schedule.start([AdaptedModel(model)], 6)
    changes = train(model, schedule, 6, optimizer=optimizer)
    assert changes == [Change.NOTHING] * 2 + [Change.PARAMETERS | Change.OPTIMIZER_STATE] + [Change.NOTHING] * 3
    assert get_adapter(model).explain().links == 0
    after = forward(model, HELD_OUT[0])
    with merged_forward(model):
        assert torch.allclose(forward(model, HELD_OUT[0]), after, atol=1e-12)


@pytest.mark.parametrize("shortcut", ["middle", "block"])
def test_a_fold_that_was_passed_is_taken_up_before_values_are_loaded(shortcut: str) -> None:
    model = adapted(shortcut)
    schedule = Fold(0.5, lambda: calibrate(model, BATCHES, forward))
    schedule.start([AdaptedModel(model)], 2)
    train(model, schedule, 1)
    state, values = schedule.state_dict(), copy.deepcopy(model.state_dict())
    fresh = adapted(shortcut)
    again = Fold(None)
    again.start([AdaptedModel(fresh)], 2)
    assert again.load_state_dict(state) & Change.PARAMETERS
    fresh.load_state_dict(values)
    assert torch.allclose(forward(fresh, HELD_OUT[0]), forward(model, HELD_OUT[0]), atol=1e-12)
    assert get_adapter(fresh).config.merge_method == "least_squares"
    assert not again.load_state_dict(state)


def test_a_run_that_was_lengthened_folds_late_rather_than_never() -> None:
    model = adapted("block")
    schedule = Fold(0.5)
    schedule.start([AdaptedModel(model)], 4)
    assert schedule.after_step(3)
    assert not schedule.after_step(4)


@pytest.mark.parametrize("at", [0, 1, -0.5, 85])
def test_a_share_that_is_none(at: float) -> None:
    with pytest.raises(ValueError, match="wanted a share of the steps between 0 and 1"):
        Fold(at)


def test_what_a_schedule_does_not_override_changes_nothing() -> None:
    schedule = Schedule()
    model = adapted("block")
    schedule.start([AdaptedModel(model)], 2)
    assert train(model, schedule, 2) == [Change.NOTHING] * 2
    assert schedule.load_state_dict(schedule.state_dict()) is Change.NOTHING
    with schedule.evaluation():
        assert get_adapter(model).explain().links
