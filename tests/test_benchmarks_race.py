"""The race: plans, search, one run's export, statistics, and the page that is made of results."""

import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import OrderedDict
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
import yaml
from peft import get_peft_model
from scipy import stats
from torch import nn
from typer.testing import CliRunner

from benchmarks.race import results, stages
from benchmarks.race.__main__ import app as program
from benchmarks.race.analysis import analyse, at_time
from benchmarks.race.guidance import guidance, near
from benchmarks.race.methods import parse_method
from benchmarks.race.plan import Plan, PlanError, TaskSettings, read_plan
from benchmarks.race.report import document
from benchmarks.race.run import added, exported, run
from benchmarks.race.search import best_of, first_grid, is_interior, key, next_setting
from benchmarks.race.statistics import compare, holm, smallest_difference, verdict
from benchmarks.race.tasks import TASKS
from reslora_diffusion import ResLoraConfig
from reslora_diffusion.llm.training_options import TrainingOptions
from reslora_diffusion.utils.problems import BadInput

PLANS = sorted((Path(results.__file__).parent / "plans").glob("*.yaml"))


class Line:
    """A task in a millisecond: a chain of two linear layers learns a linear map; loss on held-out points."""

    target_modules = ("first", "second")

    def base(self) -> nn.Module:
        torch.manual_seed(5)
        return nn.Sequential(OrderedDict(first=nn.Linear(6, 6), second=nn.Linear(6, 6)))

    def batch(self, seed: int, step: int, size: int):
        g = torch.Generator().manual_seed(1000 * seed + step)
        x = torch.randn(size, 6, generator=g)
        return x, x.flip(1)

    def loss(self, model, batch):
        return (model(batch[0]) - batch[1]).square().mean()

    def output(self, model, batch):
        return model(batch[0])

    def distance(self, merged, trained):
        return (merged - trained).square().mean()

    @torch.no_grad()
    def measure(self, model, split: str, seed: int):
        return {"loss": self.loss(model, self.batch({"validation": 77, "test": 78}[split], 0, 64)).item()}

    def measure_once(self, model, seed: int):
        return {"seed": seed, "weight": model[0].weight.sum().item()}


def plan(**changes) -> Plan:
    content = {
        "name": "line",
        "task": {"name": "word_problems", "steps": 6, "rank": 2, "warmup_steps": 1, "evaluations": 2},
        "methods": {"lora": {}, "reslora-block": {"num_previous": [1]}},
        "search": {"trials": 3, "seeds": [0], "learning_rate": [1e-2, 1e-1], "alpha_over_rank": [1]},
        "final": {"seeds": [10, 11, 12], "robustness": [3]},
        "controls": {"lora, alpha x 2": {"of": "lora", "alpha_over_rank": 2}},
    }
    return Plan.model_validate(content | changes)


# ----------------------------------------------------------------------------------------------------------- plans


def test_every_problem_of_a_plan_is_named_at_once(tmp_path) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text(
        "name: bad\ntask: {name: word_problems, steps: 4, warmup_steps: 9}\n"
        "methods: {lora: {}, lorra: {}, reslora-middle+rite: {}, lora+rite+pro: {}, "
        "lora+fold: {}, dora+coto: {}, reslora-input+fold+restart: {}, lora+rite: {speed: [1]}}\n"
        "final: {seeds: [0]}\ncontrols: {twice: {of: nothing}}\nreference: best\n"
    )
    with pytest.raises(PlanError) as error:
        read_plan(path)
    for part in (
        "'lorra'",
        "one lora_B",
        "two optimizers",
        "merges exactly",
        "+coto is for our adapters",
        "+fold and +restart are two schedules",
        "depends on activations",
        "'speed'",
        "fresh",
        "'nothing'",
        "'best'",
        "warmup",
    ):
        assert part in str(error.value), part


HEAD = "name: x\ntask: {name: word_problems}\n"


@pytest.mark.parametrize(
    "text",
    [
        f"{HEAD}methods: {{lora: {{}}}}\nspeed: 3",
        "a: [",
        "3",
        "",
        f"{HEAD}methods: {{lora: {{}}, lora: {{}}}}",
        f"{HEAD}methods: {{lora: {{}}}}\nsearch: {{trials: true}}",
    ],
)
def test_unknown_keys_and_broken_files_are_refused(tmp_path, text) -> None:
    (tmp_path / "plan.yaml").write_text(text)
    with pytest.raises(PlanError):
        read_plan(tmp_path / "plan.yaml")


def test_what_would_stop_a_race_in_its_middle_is_refused_before_it(tmp_path) -> None:
    (tmp_path / "plan.yaml").write_text(
        "name: bad\ntask: {name: word_problems, steps: 4, warmup_steps: 0, rank: 4, evaluations: 5}\nspeed: 3\n"
        "methods:\n  lora: {}\n  reslora-block: {num_previous: [x, 0]}\n  lora+loraplus: {loraplus_lr_ratio: [-4]}\n"
        "  reslora-input+fold: {fold_at: [7]}\n  lora+coto: {initial_p: []}\n  pissa+pissa: {}\n"
        "  reslora-middle+fold+loraplus: {}\n  reslora-middle+loraplus+fold: {}\n"
        "search: {learning_rate: [.inf], seeds: [0, 0]}\nfinal: {seeds: [-1, 5, 5], robustness: [3, 3]}\n"
        "controls: {lora: {of: lora, rank: 2}, ../../x: {of: lora, rank: 2}}\n"
    )
    with pytest.raises(PlanError) as error:
        read_plan(tmp_path / "plan.yaml")
    for part in (
        "task: got 5 evaluations",
        "speed: got 3",
        "num_previous: got 'x'",
        "num_previous: got 0",
        "loraplus_lr_ratio: got -4",
        "fold_at: got 7",
        "initial_p: got []",
        "learning_rate.0: got inf",
        "search.seeds: got 0 several times",
        "final.seeds.0: got -1",
        "robustness: got 3.0 several times",
        "'../../x'",
        "got +pissa",
        "are one method",
        "the name of a method",
    ):
        assert part in str(error.value), part


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"methods": {"lora": {}, "pissa+pissa": {}}}, "got +pissa"),
        ({"methods": {"lora": {}, "reslora-input+distill+distill": {}}}, "there twice"),
        ({"methods": {"lora": {}, "reslora-input+fold+rite": {}, "reslora-input+rite+fold": {}}}, "are one method"),
        ({"methods": {"lora": {}, "lora+restart": {"stages": [2, 9]}}}, "got 9 stages in 6 steps"),
        ({"controls": {"lora": {"of": "lora", "rank": 2}}}, "the name of a method"),
        ({"controls": {"same": {"of": "lora"}}}, "changes nothing"),
        ({"controls": {"none": {"of": "lora", "rank": 0.1}}}, "wanted 1 or more"),
    ],
)
def test_methods_and_controls_that_say_nothing_are_refused(changes, told) -> None:
    with pytest.raises(ValueError, match=re.escape(told)):
        plan(**changes)


@pytest.mark.parametrize("path", PLANS, ids=lambda p: p.stem)
def test_our_plans_are_sound(path) -> None:
    assert len(read_plan(path).final.seeds) >= 5


# ---------------------------------------------------------------------------------------------------------- search


def test_the_search_ends_with_an_interior_optimum() -> None:
    """From a grid that lies far from it, on a valley whose axes are not those of the lattice."""

    def loss(setting):
        u, v = math.log(setting["learning_rate"] / 3e-2), math.log(setting["alpha_over_rank"] / 20)
        return u * u + v * v + 1.2 * u * v + (0.5 if setting["num_previous"] == 4 else 0.0)

    options = {"num_previous": [4, 1]}
    grid = first_grid([1e-4, 4e-4], [1, 4], options)
    tried = []
    for _ in range(40):
        setting = next_setting(tried, grid, options)
        assert key(setting) not in {key(s) for s, _ in tried}
        tried.append((setting, loss(setting)))
    best = best_of(tried)
    assert best["num_previous"] == 1
    assert loss(best) < 0.3
    assert all(is_interior(tried).values())


def test_a_diverged_trial_is_never_the_best() -> None:
    options: dict = {}
    grid = first_grid([1e-3, 1e3], [1], options)
    assert best_of([(grid[0], 2.0), (grid[1], math.inf)]) == grid[0]


# ------------------------------------------------------------------------------------------------------- one run


@pytest.mark.parametrize(
    "word",
    ["lora", "rslora", "pissa", "dora", "reslora-block", "reslora-input", "lora+rite", "lora+pro", "lora+coto"]
    + ["reslora-block+rite+restart"],
)
def test_what_is_measured_is_the_exported_lora_of_the_rank(word) -> None:
    settings = TaskSettings(name="word_problems", steps=8, rank=2, warmup_steps=1)
    found = run(settings, parse_method(word), {"learning_rate": 3e-2, "alpha_over_rank": 2}, 0, "validation", Line())
    untrained = Line().measure(Line().base(), "validation", 0)["loss"]
    assert found["loss"] < untrained
    assert 0 < found["kept_energy"] <= 1 + 1e-9
    if word in ("lora", "rslora", "lora+rite", "lora+pro", "lora+coto"):
        assert found["loss"] == pytest.approx(found["loss_as_trained"], rel=1e-4)


def test_equal_runs_give_equal_results_and_divergence_is_one() -> None:
    settings = TaskSettings(name="word_problems", steps=6, rank=2, warmup_steps=1)
    setting = {"learning_rate": 1e-2, "alpha_over_rank": 1}
    one, other = (run(settings, parse_method("lora"), setting, 3, "test", Line()) for _ in range(2))
    assert {**one, "cpu_seconds": 0, "curve": 0} == {**other, "cpu_seconds": 0, "curve": 0}
    wild = run(settings, parse_method("lora"), {"learning_rate": 1e30, "alpha_over_rank": 1}, 3, "test", Line())
    assert wild["diverged"]
    assert wild["loss"] == math.inf


@pytest.mark.parametrize(
    ("word", "rate", "steps", "clip"),
    [("pissa", 1e25, 2, 1.0), ("lora+coto", 1e18, 2, None), ("lora+rite", 1e38, 2, 1.0)],
)
def test_a_decomposition_of_what_is_not_finite_is_a_result(word, rate, steps, clip, tmp_path) -> None:
    settings = TaskSettings(
        name="word_problems", steps=steps, rank=2, warmup_steps=0, evaluations=steps, max_grad_norm=clip
    )
    setting = {"learning_rate": rate, "alpha_over_rank": 1.0}
    found = run(settings, parse_method(word), setting, 1, "test", Line())
    assert found["diverged"]
    assert found["loss"] == math.inf
    results.write(tmp_path / "result.json", {}, found)


class Bounded(Line):
    """A line whose held-out loss is not a number while that of the training is one."""

    def measure(self, model, split: str, seed: int):
        return {"loss": math.nan}


def test_an_export_that_diverged_is_a_result_that_can_be_written(tmp_path) -> None:
    settings = TaskSettings(name="word_problems", steps=4, rank=2, warmup_steps=1, evaluations=2)
    found = run(settings, parse_method("lora"), {"learning_rate": 1e-2, "alpha_over_rank": 1}, 3, "test", Bounded())
    assert found["diverged"]
    results.write(tmp_path / "result.json", {}, found)


def test_slow_metrics_are_of_the_export_and_of_test_runs_alone() -> None:
    settings = TaskSettings(name="word_problems", steps=6, rank=2, warmup_steps=1, evaluations=3)
    setting, method = {"learning_rate": 3e-2, "alpha_over_rank": 1}, parse_method("lora")
    final = run(settings, method, setting, 3, "test", Line())
    assert final["seed"] == 3
    assert abs(final["weight"] - Line().base()[0].weight.sum().item()) > 1e-3
    assert not any("weight" in point for point in final["curve"])
    assert "weight" not in run(settings, method, setting, 3, "validation", Line())


def test_a_control_may_have_another_schedule_of_the_learning_rate() -> None:
    race = plan(controls={"constant": {"of": "lora", "lr_scheduler": "constant", "learning_rate": 0.5}})
    best = {"learning_rate": 2e-2, "alpha_over_rank": 1.0}
    jobs = [job for job in stages.final_jobs(race, {"lora": best}) if job[0] == "controls"]
    assert [setting for _, _, setting, _ in jobs] == 3 * [best | {"learning_rate": 1e-2, "lr_scheduler": "constant"}]
    constant, linear = (run(race.task, parse_method("lora"), s, 0, "test", Line()) for s in (jobs[0][2], best))
    assert constant["train_losses"][2:] != linear["train_losses"][2:]


def test_the_stickers_judge_counts_subjects_and_backgrounds() -> None:
    """The base paints every background that it is asked for, and never a subject that it has not seen."""
    task = TASKS["stickers"]()
    assert task.measure_once(task.base().eval(), 0) == {"subject": 0.0, "background": 1.0}


def test_lora_plus_is_lora_at_another_alpha() -> None:
    """Adam's steps do not depend on the scale of the gradient and B begins at zero: a ratio is a factor on alpha."""
    settings = TaskSettings(name="word_problems", steps=12, rank=2, warmup_steps=1, max_grad_norm=None)
    lora = {"learning_rate": 1e-2, "alpha_over_rank": 2.0}
    plus = {"learning_rate": 1e-2, "alpha_over_rank": 0.5, "loraplus_lr_ratio": 4}
    one = run(settings, parse_method("lora"), lora, 0, "test", Line())
    other = run(settings, parse_method("lora+loraplus"), plus, 0, "test", Line())
    assert one["train_losses"] == pytest.approx(other["train_losses"], rel=1e-5)
    assert abs(one["loss"] - Line().measure(Line().base(), "test", 0)["loss"]) > 1e-2
    without = run(settings, parse_method("lora"), plus | {"loraplus_lr_ratio": 1}, 0, "test", Line())
    assert without["train_losses"] != pytest.approx(other["train_losses"], rel=1e-3)


def test_the_export_is_the_nearest_of_its_rank_and_the_base_comes_back() -> None:
    base = Line().base()
    config = {"target_modules": ["first", "second"], "init_lora_weights": False, "shortcut": "block"}
    model = get_peft_model(Line().base(), ResLoraConfig(r=2, lora_alpha=4, **config))
    before = {name: p.clone() for name, p in base.named_parameters()}
    factors, energy = exported(model, base, 1)
    merged = dict(model.merge_and_unload().named_parameters())
    for name, (A, B) in factors.items():
        change = merged[name] - before[name]
        sigma = torch.linalg.svdvals(change)
        assert A.shape == (1, 6)
        assert B.shape == (6, 1)
        torch.testing.assert_close((change - B @ A).norm(), sigma[1:].norm(), rtol=1e-3, atol=1e-5)
    assert 0.3 < energy < 1
    with added(base, factors):
        assert not torch.equal(base.first.weight, before["first.weight"])
    assert all(torch.equal(p, before[name]) for name, p in base.named_parameters())


# ---------------------------------------------------------------------------------------------------- statistics


def test_comparisons_are_paired_and_agree_with_scipy() -> None:
    rng = random.Random(0)
    reference = {seed: rng.gauss(1, 0.5) for seed in range(8)}
    method = {seed: value - 0.1 + rng.gauss(0, 0.03) for seed, value in reference.items()}
    found = compare(method, reference)
    wanted = stats.ttest_rel([method[s] for s in range(8)], [reference[s] for s in range(8)])
    assert found.p == pytest.approx(wanted.pvalue)
    assert (found.low, found.high) == pytest.approx(tuple(wanted.confidence_interval()))
    assert verdict(found, found.p) == "better"
    assert stats.ttest_ind(list(method.values()), list(reference.values())).pvalue > 0.05  # unpaired, nothing is seen


def test_a_large_p_is_not_called_equality() -> None:
    found = compare({0: 1.0, 1: 2.0, 2: 3.0}, {0: 1.1, 1: 1.8, 2: 3.05})
    assert "no difference shown" in verdict(found, found.p)
    assert math.isnan(compare({0: 1.0}, {0: 2.0}).p)
    assert verdict(compare({0: 1.0}, {0: 2.0}), math.nan) == "not compared"


def test_the_smallest_difference_is_found_with_that_power() -> None:
    rng, n, sd = np.random.default_rng(0), 6, 1.0
    shift = smallest_difference(sd / math.sqrt(n), n - 1)
    draws = rng.normal(shift, sd, size=(20_000, n))
    assert np.mean(stats.ttest_1samp(draws, 0.0, axis=1).pvalue < 0.05) == pytest.approx(0.8, abs=0.02)


def test_holm_is_the_step_down_correction() -> None:
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": math.nan}) == pytest.approx(
        {"a": 0.03, "b": 0.06, "c": 0.06, "d": math.nan}, nan_ok=True
    )


# --------------------------------------------------------------------------------------------------------- stages


@pytest.fixture
def line(monkeypatch) -> Plan:
    monkeypatch.setitem(TASKS, "word_problems", Line)
    return plan()


def run_all(race: Plan, folder) -> None:
    """What `race` does, in this process."""
    for word in race.methods:
        stages.tuned(race, folder, word)
    best = {word: best_of(tried) for word, tried in stages.tuning_so_far(race, folder).items()}
    for job in stages.final_jobs(race, best):
        stages.done(race, folder, job)


def test_a_race_resumes_and_its_page_is_made_of_the_files(line: Plan, tmp_path, monkeypatch) -> None:
    run_all(line, tmp_path)
    files = sorted(tmp_path.rglob("*.json"))
    assert len(files) == 2 * 3 + 2 * 3 + 3 + 2 * 3  # trials, final seeds, the control, other learning rates
    stamps = [path.stat().st_mtime_ns for path in files]
    files[0].unlink()
    run_all(line, tmp_path)
    again = sorted(tmp_path.rglob("*.json"))
    assert again == files
    assert [p.stat().st_mtime_ns for p in again[1:]] == stamps[1:]
    found = analyse(line, tmp_path)
    assert list(found.entries) == ["lora", "reslora-block", "lora, alpha x 2"]
    assert found.entries["reslora-block"].comparison.seeds == 3
    page = document([analyse(line, tmp_path)])
    assert "| control: lora, alpha x 2 |" in page
    assert "3 trials for each of 2 methods" in page


def test_results_of_another_task_or_format_are_not_mixed_in(line: Plan, tmp_path) -> None:
    stages.tuned(line, tmp_path, "lora")
    other = plan(task={"name": "word_problems", "steps": 7, "rank": 2, "warmup_steps": 1})
    assert stages.tuning_so_far(other, tmp_path) == {}
    path = next(tmp_path.rglob("*.json"))
    path.write_text(path.read_text().replace('"format": 1', '"format": 0'))
    with pytest.raises(ValueError, match="format 0, wanted 1"):
        stages.tuning_so_far(line, tmp_path)


def test_every_file_that_cannot_be_used_is_named_before_anything_runs(line: Plan, tmp_path) -> None:
    stages.tuned(line, tmp_path, "lora")
    stages.tuned(line, tmp_path, "reslora-block")
    half, empty, list_of, copied, *_ = sorted(tmp_path.rglob("*.json"))
    half.write_text(half.read_text()[:90])
    empty.write_text("")
    list_of.write_text("[1]")
    copied.rename(copied.with_name("0123456789abcdef.json"))
    with pytest.raises(BadInput) as error:
        stages.race(line, tmp_path, workers=1)
    assert len(error.value.problems) == 4
    for path in (half, empty, list_of, "0123456789abcdef.json"):
        assert str(path) in str(error.value)


# Real processes of a race on the task above: the module is imported by each worker.
PROGRAM = """
import sys, time
import benchmarks.race.tasks as tasks
from test_benchmarks_race import Line, plan

class Slow(Line):
    def batch(self, seed, step, size):
        time.sleep(0.05)
        return super().batch(seed, step, size)

tasks.TASKS["word_problems"] = Slow
if __name__ == "__main__":
    from pathlib import Path
    from benchmarks.race.stages import race
    from reslora_diffusion.utils.problems import run_program
    raise SystemExit(run_program(lambda: print(race(plan(), Path(sys.argv[1]), workers=2))))
"""


def begun(folder) -> subprocess.Popen:
    """A race whose first results are there."""
    (folder / "program.py").write_text(PROGRAM)
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    process = subprocess.Popen(
        [sys.executable, str(folder / "program.py"), str(folder / "results")],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        # A shell starts what runs in its background with SIGINT ignored, and children inherit that.
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL) if os.name == "posix" else None,
    )
    deadline = time.monotonic() + 120
    while not list((folder / "results").rglob("*.json")):
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return process


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_ends_a_race_and_its_processes_at_once(tmp_path, number) -> None:
    process = begun(tmp_path)
    os.killpg(process.pid, signal.SIGINT) if number == signal.SIGINT else process.terminate()
    said = process.communicate(timeout=60)[0]
    assert process.returncode == 0
    assert said.rstrip().endswith("stopped the race; the same command goes on with it")
    assert "Traceback" not in said
    for path in (tmp_path / "results").rglob("*.json"):
        results.read(path)
    assert not list((tmp_path / "results").rglob(".*"))


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_processes_of_a_race_that_was_killed_end_with_it(tmp_path) -> None:
    process = begun(tmp_path)
    workers = psutil.Process(process.pid).children(recursive=True)
    assert len(workers) >= 2
    process.kill()
    process.wait()
    _, alive = psutil.wait_procs(workers, timeout=30)
    assert not alive


# ------------------------------------------------------------------------------------------------------ the page


def written(folder, race: Plan, stage: str, method: str, setting: dict, seed: int, **result) -> None:
    """A result file as a run would have left it."""
    curve = [{"step": step, "training_cpu_seconds": step * 0.5, "loss": 3 - step / 6} for step in (3, 6)]
    facts = results.facts_of(race, stage, method, setting, seed)
    made = {"diverged": False, "loss_as_trained": 2.0, "kept_energy": 1.0, "cpu_seconds": 4.0, "curve": curve}
    made |= {"train_losses": [1.0]} | result
    made["diverged"] = made["loss"] == math.inf
    results.write(results.path_of(folder, facts), facts, made)


@pytest.fixture
def raced(tmp_path):
    """A race whose files are made up: the block shortcut is worse by 0.5, twice the alpha by 0.01 at most."""
    race = plan()
    for number, rate in enumerate((1e-2, 1e-1, 3e-2)):
        for method in race.methods:
            written(tmp_path, race, "tune", method, settings(method, rate), 0, loss=2.0 - (number == 1))
    for seed in race.final.seeds:
        for method, more in {"lora": 0.0, "reslora-block": 0.5 + seed / 1000}.items():
            written(tmp_path, race, "final", method, settings(method, 1e-1), seed, loss=1 + seed / 100 + more)
            other = settings(method, 1e-1) | {"learning_rate": 1e-1 * 3}
            written(tmp_path, race, "robustness", method, other, seed, loss=math.inf if seed == 10 else 2.0)
        twice = settings("lora", 1e-1) | {"alpha_over_rank": 2.0}
        written(tmp_path, race, "controls", "lora, alpha x 2", twice, seed, loss=1 + seed / 100 + 0.01 * (seed % 2))
    return race, tmp_path


def settings(method: str, rate: float) -> dict:
    own = {"num_previous": 1} if method == "reslora-block" else {}
    return {"learning_rate": rate, "alpha_over_rank": 1.0, **own}


def test_the_page_is_complete_or_says_that_it_is_not(raced) -> None:
    race, folder = raced
    page = document([analyse(race, folder)])
    assert "Complete: 6 of 6 trials, 15 of 15 final runs." in page
    assert "the other method was not shown to be better than tuned LoRA, and 1 was shown to be worse" in page
    assert "+0.511 (+0.509 to +0.513)" in page  # 0.5 + the mean of 10, 11, 12 thousandths
    assert "| 0.019 | no difference shown |" in page
    assert "+0.885 ± 0.0071, 1 of 3 diverged" in page  # 2 minus 1.11 and 1.12, the losses of the same seeds
    assert "| `lora` | 0.1 | 1 |" in page
    next((folder / "controls").rglob("*.json")).unlink()
    assert "**This race is not complete** (6 of 6 trials, 14 of 15 final runs)." in document([analyse(race, folder)])


def test_a_control_that_does_better_than_the_chosen_setting_is_named(raced) -> None:
    race, folder = raced
    assert "At other settings" not in document([analyse(race, folder)])
    twice = settings("lora", 1e-1) | {"alpha_over_rank": 2.0}
    for seed in race.final.seeds:
        written(folder, race, "controls", "lora, alpha x 2", twice, seed, loss=1 + seed / 100 - 0.02)
    page = document([analyse(race, folder)])
    assert "than at the one that 1 tuning seed chose: `lora, alpha x 2` (-0.02, better)" in page


def test_a_page_of_trials_alone_compares_nothing(raced, tmp_path) -> None:
    import shutil

    race, folder = raced
    shutil.rmtree(folder / "final")
    page = document([analyse(race, folder)])
    assert "There is no answer yet" in page
    assert "ranks nothing" in page
    assert "p (Holm)" not in page
    shutil.rmtree(folder / "tune")
    for stage in ("controls", "robustness"):
        shutil.rmtree(folder / stage)
    assert "**Not run yet** (0 of 6 trials, 0 of 15 final runs)." in document([analyse(race, folder)])


def test_measured_settings_are_of_methods_that_have_all_their_trials(raced) -> None:
    race, folder = raced
    table = guidance([analyse(race, folder)])
    assert "| `lora` | 0.1 | 1 |  | 0.1 |" in table  # the other rates are worse by 1
    assert "`reslora-block`" in table
    next((folder / "tune" / "reslora-block").rglob("*.json")).unlink()
    assert "`reslora-block`" not in guidance([analyse(race, folder)])
    assert near([(0.1, 1.5), (0.2, 1.01), (0.4, 1.0), (0.8, 1.02), (1.6, 1.03), (3.2, 1.0)]) == (0.2, 0.8)


def test_a_plan_of_ones_own_has_a_page_and_a_plot(raced) -> None:
    race, folder = raced
    (folder / "plan.yaml").write_text(yaml.safe_dump(race.model_dump(mode="json")))
    for path in (folder / "tune" / "reslora-block").rglob("*.json"):  # also where every trial of a method diverged
        written(folder, race, "tune", "reslora-block", json.loads(path.read_text())["setting"], 0, loss=math.inf)
    found = CliRunner().invoke(program, ["report", str(folder / "plan.yaml"), "--out", str(folder)])
    assert found.exit_code == 0
    page = (folder / "report.md").read_text()
    assert page.startswith("# line\n")
    assert "Complete: 6 of 6 trials" in page
    assert (folder / "images" / "race-line.png").stat().st_size > 5000
    assert "reslora-block" not in guidance([analyse(race, folder)])
    nothing = CliRunner().invoke(program, ["report", str(folder / "plan.yaml"), "--out", str(folder / "none")])
    assert nothing.exit_code == 2


def test_the_default_method_follows_from_the_races_or_the_page_says_that_it_does_not(raced) -> None:
    race, folder = raced
    page = document([analyse(race, folder)])
    assert "**So this default does not follow from the races: take `--method lora`.**" in page
    rate = f"{TrainingOptions.learning_rate:g}"
    assert f"| {rate}, alpha = 2 x rank, linear | arithmetic word problems (`line`) | 0.1, alpha = 1 x rank" in page
    for seed in race.final.seeds:
        written(folder, race, "final", "reslora-block", settings("reslora-block", 1e-1), seed, loss=1 + seed / 100)
    assert "no reason for it and none against it" in document([analyse(race, folder)])
    for seed in race.final.seeds[:2]:  # what is left cannot be compared
        for method in race.methods:
            facts = results.facts_of(race, "final", method, settings(method, 1e-1), seed)
            results.path_of(folder, facts).unlink()
    page = document([analyse(race, folder)])
    assert "nothing was compared with it yet" in page
    assert "Both trainers train `--method reslora` unless told otherwise." in page


def test_what_no_plan_has_is_said(raced) -> None:
    race, folder = raced
    page = document([analyse(race, folder)])
    assert "- `rslora`, `pissa`, `dora`, `reslora-input`, `reslora-middle`, `+rite`" in page


def test_the_paper_and_the_tuned_race_are_explained_together(raced, tmp_path_factory) -> None:
    race, folder = raced
    published = plan(name="published", search={"trials": 1, "learning_rate": [1e-4], "alpha_over_rank": [2]})
    other = tmp_path_factory.mktemp("published")
    for method, gain in {"lora": 0.0, "reslora-block": 0.7}.items():
        setting = settings(method, 1e-4) | {"alpha_over_rank": 2.0}
        written(other, published, "tune", method, setting, 0, loss=2.0)
        for seed in published.final.seeds:
            written(other, published, "final", method, setting, seed, loss=2 + seed / 100 - gain * (1 + seed / 1000))
    page = document([analyse(published, other), analyse(race, folder)])
    assert "`reslora-block` (-0.708) have a lower loss than LoRA, as the paper says" in page
    assert "LoRA's loss from 2.11 to 1.11, a gain of 1, where changing the method at the published setting" in page
    assert "the advantage does not outlast tuning" in page


def test_losses_at_equal_time_are_read_from_the_curves() -> None:
    curve = [{"training_cpu_seconds": t, "loss": loss} for t, loss in ((1.0, 4.0), (2.0, 3.0), (4.0, 1.0))]
    assert at_time(curve, 3.0) == pytest.approx(2.0)
    assert at_time(curve, 9.0) == 1.0
    assert math.isnan(at_time(curve, 0.5))


def test_results_are_taken_over_once_and_say_the_same(raced, tmp_path_factory) -> None:
    race, folder = raced
    target = tmp_path_factory.mktemp("target")
    assert results.take_over(folder, target, race) == 21
    assert results.take_over(folder, target, race) == 0
    assert document([analyse(race, target)]) == document([analyse(race, folder)])


def test_tuned_trainings_are_compared_case_by_case(raced, tmp_path_factory) -> None:
    race, folder = raced
    found = tmp_path_factory.mktemp("tuned")
    case = {"loss_base": 2.0, "options": {"learning_rate": 0.01}, "trials": 5, "share_spent": 0.29}
    case |= {"search_wall_seconds": 3.0, "training_wall_seconds": 9.0}
    cases = {f"seed {n}": case | {"loss_defaults": 1 + n, "loss_tuned": 0.5 + n + n / 100} for n in range(3)}
    (found / "tuned-line.json").write_text(json.dumps({"steps": 7, "results": cases}))
    page = document([analyse(race, folder)], found)
    assert "The gain is beyond the spread: -0.49 (-0.515 to -0.465)" in page
    assert "| seed 1 | 2 | 2 | 1.51 | -0.49 | learning_rate 0.01 | 5 | 29 % | 3 s, 9 s |" in page
    assert "**Not measured yet.**" in document([analyse(race, folder)], folder)
    (found / "tuned-line.json").write_text(json.dumps({"steps": 7, "results": {"seed 0": cases["seed 0"]}}))
    assert "With 1 case nothing is concluded yet; 3 are wanted." in document([analyse(race, folder)], found)
    same = {name: one | {"loss_tuned": one["loss_defaults"], "options": {}} for name, one in cases.items()}
    (found / "tuned-line.json").write_text(json.dumps({"steps": 7, "results": same}))
    assert "Nothing was changed in any case" in document([analyse(race, folder)], found)


def test_subjects_to_tune_on_are_those_that_are_there() -> None:
    from benchmarks.tuned import app

    found = CliRunner().invoke(app, ["stickers", "--subjects", "panda", "--subjects", "zebra"])
    assert found.exit_code == 2
    said = " ".join(found.output.replace("│", " ").split())  # typer draws a box around it
    assert "got zebra; wanted some of cactus, cake" in said
