"""The step benchmark: a whole step trains, a case ends in time, and what is left out leaves the tables whole."""

import json

import pytest
import torch

from benchmarks import report
from benchmarks.models import SUBJECTS
from benchmarks.step import CUDA_CASES, DEFAULT, LARGE, MAIN, Case, build, prepare, takes_part, trained
from benchmarks.timing import LEAST, compare


@pytest.mark.parametrize("variant", ["floor", "peft", "input", "block_frozen"])
def test_a_whole_step_trains(variant: str) -> None:
    cpu, subject = torch.device("cpu"), SUBJECTS["tiny_unet"]
    model = build(variant, subject, cpu, torch.float32)
    before = [parameter.detach().clone() for parameter in trained(model)]
    step = prepare(model, subject.inputs(2, cpu, torch.float32), mode="whole step, eager")
    first, second = step(), step()
    assert first.isfinite()
    assert first != second  # noise is drawn anew
    changed = [not torch.equal(p, old) for p, old in zip(trained(model), before, strict=True)]
    assert any(changed) == (variant != "floor")
    assert variant == "floor" or sum(changed) >= len(changed) - 2


def test_a_case_ends_in_time() -> None:
    steps = {name: lambda: None for name in ("floor", "peft")}
    seconds = iter(range(1, 10**6))

    def clock(step):
        return {"seconds": float(next(seconds))}

    assert compare(steps, clock, rounds=9)["peft"]["rounds"] == 9
    assert compare(steps, clock, rounds=9, until=0)["peft"]["rounds"] == LEAST


def test_every_case_has_its_yardsticks_and_some_case_every_variant() -> None:
    assert {"floor", "peft"} < set(MAIN)
    assert all(any(takes_part(name, case) for case in CUDA_CASES) for name in DEFAULT)
    assert not takes_part("kohya", Case("sdxl", 1, "eager"))
    assert all(takes_part(name, case) for case in CUDA_CASES for name in MAIN)
    assert takes_part(LARGE[-1], Case("sd15", 8, "eager"))


def test_a_variant_for_which_there_was_no_memory_leaves_a_gap() -> None:
    content = json.loads((report.FOLDER / "step-cpu.json").read_text(encoding="utf-8"))
    first = next(iter(content["results"].values()))
    del first["middle"]
    line = report.summary({"step-cpu": content}).splitlines()[2]
    assert line.endswith("|  |")
    assert "ours, `middle`" not in report.document({"step-cpu": content}).split("### ")[1]
