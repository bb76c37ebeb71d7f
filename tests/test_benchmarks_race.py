"""The race: plans, search, one run's export, statistics, and the page that is made of results."""

import math
import random
from collections import OrderedDict

import numpy as np
import pytest
import torch
from peft import get_peft_model
from scipy import stats
from torch import nn

from benchmarks.race import results, stages
from benchmarks.race.methods import parse_method
from benchmarks.race.plan import Plan, PlanError, TaskSettings, read_plan
from benchmarks.race.report import document, rows_of
from benchmarks.race.run import added, exported, run
from benchmarks.race.search import best_of, first_grid, is_interior, key, next_setting
from benchmarks.race.statistics import compare, holm, smallest_difference, verdict
from benchmarks.race.tasks import TASKS
from reslora_diffusion import ResLoraConfig

PLANS = [
    path for path in (results.__file__ and __import__("pathlib").Path(results.__file__).parent / "plans").glob("*.yaml")
]


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


@pytest.mark.parametrize("text", ["name: x\ntask: {name: word_problems}\nmethods: {lora: {}}\nspeed: 3", "a: [", "3"])
def test_unknown_keys_and_broken_files_are_refused(tmp_path, text) -> None:
    (tmp_path / "plan.yaml").write_text(text)
    with pytest.raises(PlanError):
        read_plan(tmp_path / "plan.yaml")


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
    rows, compared = rows_of(line, tmp_path)
    assert [row[0] for row in rows] == ["lora", "reslora-block", "lora, alpha x 2"]
    assert compared["reslora-block"].seeds == 3
    page = document({line: tmp_path})
    assert "| lora, alpha x 2 |" in page
    assert "3 trials a method" in page


def test_results_of_another_task_or_format_are_not_mixed_in(line: Plan, tmp_path) -> None:
    stages.tuned(line, tmp_path, "lora")
    other = plan(task={"name": "word_problems", "steps": 7, "rank": 2, "warmup_steps": 1})
    assert stages.tuning_so_far(other, tmp_path) == {}
    path = next(tmp_path.rglob("*.json"))
    path.write_text(path.read_text().replace('"format": 1', '"format": 0'))
    with pytest.raises(ValueError, match="format 0, wanted 1"):
        stages.tuning_so_far(line, tmp_path)
