"""`reslora tune`: space, search, budget and storage on a made-up training; then the image trainer on the tiny pipeline.

The language-model trainer is tuned in test_tuning_llm.py.
"""

import gc
import json
import os
import subprocess
import sys
import weakref

import numpy as np
import pytest
import yaml
from scipy import stats

from dreambooth import ROOT, SUBJECTS, environment, words
from reslora_diffusion.tuning.command import parse, tune
from reslora_diffusion.tuning.outcome import conclude, gain_of
from reslora_diffusion.tuning.settings import EVALUATIONS, Settings
from reslora_diffusion.tuning.space import Space
from reslora_diffusion.tuning.study import DONE, Spent, open_study, search
from reslora_diffusion.utils.problems import BadInput, Stopped
from valley import START, Valley, study_of

# ---------------------------------------------------------------------------------------------------------- search


def test_the_search_stays_in_its_share_and_finds_the_valley(tmp_path):
    trainee = Valley()
    settings, study = study_of(tmp_path, trainee, share=0.9)
    search(trainee, settings, study)
    trials = study.get_trials(states=DONE)
    spent = sum(trial.user_attrs["seconds"] for trial in trials)
    assert 0.7 * 900 < spent <= 900
    assert any(trial.state.name == "PRUNED" for trial in trials)
    assert trials[0].params == {"learning_rate": 1e-3, "lora_alpha": 1.0}
    assert trials[0].state.name == "COMPLETE", "the command as given is measured to the end"
    found = conclude(trainee, settings, study, tmp_path, "train")
    assert found.gain.is_shown
    assert found.gain.loss_after < found.gain.loss_before - 1
    written = yaml.safe_load((tmp_path / "run.yaml").read_text())
    assert written == {"rank": 4, "output_dir": "out", **found.best, "keep_best": True}
    assert json.loads((tmp_path / "tune.json").read_text())["gain"]["is_shown"]
    assert (tmp_path / "tune.png").stat().st_size > 1000


def test_a_search_that_is_cut_off_goes_on_where_it_stopped(tmp_path):
    class Cut(Valley):
        def train(self, *args):
            if len(self.seen) == 2:
                raise KeyboardInterrupt
            return super().train(*args)

    first = Cut()
    settings, study = study_of(tmp_path, first, share=0.9)
    with pytest.raises(KeyboardInterrupt):
        search(first, settings, study)
    again = Valley()
    settings, study = study_of(tmp_path, again, share=0.9)
    assert len(study.get_trials(states=DONE)) == 2
    search(again, settings, study)
    trials = study.get_trials(states=DONE)
    assert len(trials) > 4
    tried = [trial.params for trial in trials]
    assert {"learning_rate": 2.5e-4, "lora_alpha": 1.0} in tried, "the trial that was cut off is made again"
    assert sum(trial.user_attrs["seconds"] for trial in trials) <= 900


SECOND = """
import sys, time
from pathlib import Path
from reslora_diffusion.tuning.study import search
from valley import Valley, study_of
class Slow(Valley):
    def train(self, *args):
        time.sleep(0.3)
        return super().train(*args)
settings, study = study_of(Path(sys.argv[1]), Slow(), share=0.9, storage=sys.argv[2])
search(Slow(), settings, study)
"""


@pytest.mark.parametrize("kind", ["journal", "sqlite"])
def test_two_processes_share_one_study_and_its_time(tmp_path, kind):
    """Started at the same time on the same storage; both make trials, and together they stay in the share."""
    storage = str(tmp_path / "study.jsonl") if kind == "journal" else f"sqlite:///{tmp_path}/study.db"
    command = [sys.executable, "-c", SECOND, str(tmp_path), storage]
    variables = environment(ROOT / "tests")
    both = [subprocess.Popen(command, env=variables, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    errors = [process.communicate()[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], errors
    settings, study = study_of(tmp_path, Valley(), share=0.9, storage=storage)
    trials = study.get_trials(states=DONE)
    assert len({trial.number for trial in trials}) == len(trials) > 2
    assert sum(trial.user_attrs["seconds"] for trial in trials) <= 900
    another = Valley()
    search(another, settings, study)
    assert another.seen == [], "nothing of the time is left"


@pytest.mark.parametrize("kind", ["waited for", "not waited for", "with this number"])
def test_a_trial_of_a_process_that_is_no_more_is_made_again(tmp_path, kind):
    import socket

    settings, study = study_of(tmp_path, Valley(), share=0.9)
    study.enqueue_trial({"learning_rate": 2e-3, "lora_alpha": 2.0})
    lost = study.ask()
    Space(START, settings.search).suggest(lost)
    gone = subprocess.Popen([sys.executable, "-c", ""])
    if kind == "waited for":
        gone.wait()
    elif os.name != "nt":
        os.waitid(os.P_PID, gone.pid, os.WEXITED | os.WNOWAIT)  # until it has ended, and leave it as it is
    number = os.getpid() if kind == "with this number" else gone.pid
    lost.set_user_attr("process", [socket.gethostname(), number])
    search(Valley(), settings, study)
    gone.wait()
    assert {"learning_rate": 2e-3, "lora_alpha": 2.0} in [t.params for t in study.get_trials(states=DONE)]


def test_a_point_that_diverges_is_never_the_best(tmp_path):
    trainee = Valley()
    settings, study = study_of(tmp_path, trainee, share=0.9, search=["learning_rate"])
    study.enqueue_trial({"learning_rate": 1e-3})
    study.enqueue_trial({"learning_rate": 1.5e-2})
    search(trainee, settings, study)
    assert any(options["learning_rate"] == 1.5e-2 for options in trainee.seen)
    assert conclude(trainee, settings, study, tmp_path, "train").best["learning_rate"] < 1e-2


def test_the_gain_is_over_the_command_whose_trial_was_cut_off(tmp_path):
    """It is made again after others, so the first finished trial is another."""

    class Cut(Valley):
        def train(self, *args):
            raise KeyboardInterrupt

    settings, study = study_of(tmp_path, Cut(), share=0.9, trials=2)
    with pytest.raises(KeyboardInterrupt):
        search(Cut(), settings, study)
    trainee = Valley()
    search(trainee, settings, study)
    trials = study.get_trials(states=DONE)
    command = next(t for t in trials if t.params == {"learning_rate": 1e-3, "lora_alpha": 1.0})
    assert command.number > trials[0].number
    assert command.state.name == "COMPLETE"
    found = conclude(trainee, settings, study, tmp_path, "train")
    assert found.gain.loss_before == pytest.approx(np.mean(command.user_attrs["losses"][1::2]))


def test_a_command_that_diverges_is_replaced_and_the_files_are_json(tmp_path):
    class Steep(Valley):
        start = START | {"learning_rate": 2e-2}

    def constant(name):
        raise AssertionError(f"{name} is not JSON")

    trainee = Steep()
    settings, study = study_of(tmp_path, trainee, share=0.9, trials=4, search=["learning_rate"])
    search(trainee, settings, study)
    found = conclude(trainee, settings, study, tmp_path, "train")
    assert "with the options as given it diverged" in str(found)
    assert "no gain is shown" not in str(found)
    assert yaml.safe_load((tmp_path / "run.yaml").read_text())["learning_rate"] == found.best["learning_rate"] < 1e-2
    facts = json.loads((tmp_path / "tune.json").read_text(), parse_constant=constant)
    assert facts["gain"]["loss_before"] is None
    assert facts["gain"]["is_shown"]


def test_without_a_finite_trial_the_program_stops_in_plain_words(tmp_path):
    class Cliff(Valley):
        start = START | {"learning_rate": 1.0}

    settings, study = study_of(tmp_path, Cliff(), share=0.9, trials=2, search=["learning_rate"])
    search(Cliff(), settings, study)
    with pytest.raises(Stopped, match="every trial diverged"):
        conclude(Cliff(), settings, study, tmp_path, "train")


def test_memory_of_a_trial_is_free_before_the_next(tmp_path):
    """Trainers are part of cycles, which no count of references frees."""

    class Model:
        pass

    class Cyclic(Valley):
        held = []

        def train(self, *args):
            assert not [model for model in self.held if model() is not None]
            model = Model()
            model.itself = model
            self.held.append(weakref.ref(model))
            return super().train(*args)

    settings, study = study_of(tmp_path, Cyclic(), share=0.9, trials=3)
    gc.disable()
    try:
        search(Cyclic(), settings, study)
    finally:
        gc.enable()
    assert len(Cyclic.held) == 3


def test_without_a_shown_gain_the_options_stay(tmp_path):
    class Flat(Valley):
        def train(self, options, steps, evaluate_at, report):
            for step in evaluate_at:
                noise = np.random.default_rng(len(self.seen)).normal(0, 1e-3, 16)
                if report(step, np.ones(16) + noise * (-1) ** np.arange(16)):
                    break
            self.seen.append(options)
            return Spent(1.0, float(step))

    trainee = Flat()
    settings, study = study_of(tmp_path, trainee, share=0.9)
    search(trainee, settings, study)
    found = conclude(trainee, settings, study, tmp_path, "train")
    assert not found.gain.is_shown
    assert "no gain is shown" in str(found)
    assert yaml.safe_load((tmp_path / "run.yaml").read_text()) == {"rank": 4, "output_dir": "out", "keep_best": True}


def test_the_gain_is_paired_over_draws_that_chose_nothing():
    rng = np.random.default_rng(0)
    before = rng.normal(1, 1, 32)
    after = before - 0.1 + rng.normal(0, 0.01, 32)
    after[::2] -= 100  # what the choice was made on
    found = gain_of(before, after)
    wanted = stats.ttest_rel(before[1::2], after[1::2]).confidence_interval()
    assert (found.low, found.high) == pytest.approx(tuple(wanted))
    assert found.draws == 16


def test_a_point_stands_for_options_of_the_trainers():
    space = Space(START | {"rank": 8}, ["learning_rate", "lora_alpha", "method"])
    found = space.options(
        START | {"rank": 8, "lora_alpha": 2.0, "learning_rate": 1.23456e-3, "method": "reslora-block"}
    )
    assert found == {"learning_rate": 1.23e-3, "lora_alpha": 16.0, "method": "reslora", "shortcut": "block"}
    assert Space(START, ["rank"]).options(START | {"rank": 16}) == {"rank": 16, "lora_alpha": 16.0}
    assert Space(START, ["rank"]).choices("rank") == [4, 2, 8, 16]


# ---------------------------------------------------------------------------------------------------------- refusals


def test_trials_of_another_length_are_not_compared(tmp_path):
    """A larger share of the time makes longer trials, unless their steps are given."""
    line = words(tmp_path / "out", max_train_steps=2000, method="lora")
    for share, trials in ((0.5, 2), (0.9, 3)):
        own = ["--share", str(share), "--trials", str(trials), "--trial_steps", "6"]
        settings, program, rest = parse([*own, "train", *line])
        assert tune(program, rest, settings, lambda facts: None).trials == trials
    settings, program, rest = parse(["--share", "0.9", "train", *line])
    with pytest.raises(BadInput, match="trial_steps was 6 and is 300"):
        tune(program, rest, settings, lambda facts: None)


def test_the_storage_of_another_command_is_refused(tmp_path):
    settings, study = study_of(tmp_path, Valley())
    other = Valley()
    other.identity = {"data": "another"}
    with pytest.raises(BadInput, match="holds the study of another command .data was 'valley' and is 'another'"):
        open_study(settings, tmp_path, other.identity)


@pytest.mark.parametrize("content", ["no json\n", '{"a": 1}\n', "[]\n"])
def test_a_file_that_is_no_storage_is_refused(tmp_path, content):
    (tmp_path / "study.jsonl").write_text(content)
    with pytest.raises(BadInput, match="cannot be used"):
        open_study(Settings(), tmp_path, {})
    assert (tmp_path / "study.jsonl").read_text() == content


def test_every_problem_is_named_at_once_and_before_a_model_is_loaded(tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "0.png").write_bytes((SUBJECTS / "octopus" / "0.png").read_bytes())
    line = words(tmp_path / "out", instance_data_dir=tmp_path / "one", rnak=3, dry_run=True)
    settings, program, rest = parse(["--share", "1.5", "--search", "learning_rat", "--speed", "9", "train", *line])
    with pytest.raises(BadInput) as error:
        tune(program, rest, settings)
    for part in (
        "--share: got 1.5, wanted a number above 0 and below 1",
        "--search: got 'learning_rat', wanted learning_rate, lora_alpha, rank, method, lr_scheduler",
        "unknown option --speed",
        "unknown option --rnak",
        "--dry_run: a search has no use for it",
        "wanted two different images or more",
    ):
        assert part in str(error.value), part
    assert not (tmp_path / "out").exists()


def test_a_command_without_a_training_is_refused():
    settings, program, _ = parse(["--share", "0.2", "glue", "--rank", "4"])
    assert program is None
    assert any("wanted train or train-llm" in problem for problem in settings.problems)


# ---------------------------------------------------------------------------------------------- the image trainer


def test_the_image_trainer_is_tuned_and_trained_with_what_was_found(tmp_path, capsys):
    options = {"max_train_steps": 2000, "method": "lora", "learning_rate": 1e-5, "num_inference_steps": None}
    line = words(tmp_path / "out", **options)
    settings, program, rest = parse(["--share", "0.5", "--trial_steps", "6", "--trials", "4", "train", *line])
    seen = []
    found = tune(program, rest, settings, seen.append)
    assert found.trials == 4
    assert seen[0]["options"] == {"learning_rate": 1e-5, "lora_alpha": 4.0}
    assert [facts["step"] for facts in seen[:EVALUATIONS]] == [2, 4, 6]
    assert found.gain.is_shown
    assert found.best["learning_rate"] == 4e-5 or found.best["lora_alpha"] == 32
    assert sorted(path.name for path in (tmp_path / "out").rglob("*")) == [
        "run.yaml",
        "study.jsonl",
        "tune",
        "tune.json",
        "tune.png",
    ]
    config = tmp_path / "out" / "tune" / "run.yaml"
    written = yaml.safe_load(config.read_text())
    assert written.items() >= found.best.items()
    assert not {"keep_best", "validation_split"} & set(written), "the training has all images"
    from dreambooth import script

    trained = script.main(script.parse_args(["--config", str(config), "--max_train_steps", "4"]))
    assert (trained / "pytorch_lora_weights.safetensors").is_file()


@pytest.mark.parametrize(
    "option", [{"keep_best": True}, {"validation_split": 0.4}], ids=lambda option: next(iter(option))
)
def test_a_command_that_holds_images_out_keeps_its_best_step(tmp_path, option):
    from reslora_diffusion.tuning.command import dreambooth

    trainee, _ = dreambooth(words(tmp_path / "out", max_train_steps=50, **option), Settings(), [])
    assert trainee.keeping_best == {"keep_best": True, "validation_steps": 5}
    assert trainee.given["validation_split"] == option.get("validation_split", 0.2)


def test_a_short_trial_goes_as_far_as_the_training(tmp_path):
    """Two steps that stand for sixteen have eight times the rate, of the text encoder too; schedules are shortened."""
    from reslora_diffusion.tuning.command import dreambooth

    found = {}
    rates = {"train_text_encoder": True, "text_encoder_lr": 0.002, "lr_scheduler": "linear", "lr_warmup_steps": 0}
    for steps, factor in ((16, 1), (2, 8)):
        own = rates | {"text_encoder_lr": rates["text_encoder_lr"] * factor, "max_train_steps": steps}
        trainee, _ = dreambooth(words(tmp_path / "out", **own), Settings(), [])
        losses = found[steps] = []
        trainee.train({"learning_rate": 0.001 * factor}, 2, [1, 2], lambda step, now, losses=losses: losses.append(now))
    assert np.array_equal(found[16], found[2])
    assert not np.array_equal(found[2][0], found[2][1])


def test_a_trial_that_exports_its_last_step_counts_with_it(tmp_path):
    class Overfitting(Valley):
        keeping_best = {}

        def train(self, options, steps, evaluate_at, report):
            rising = np.array([1.0, 2.0, 3.0]) if options["learning_rate"] == 1e-3 else np.array([2.0, 1.5, 1.6])
            for step, loss in zip(evaluate_at, rising, strict=True):
                if report(step, loss + np.arange(16) / 100):
                    return Spent(1.0, 1.0 * step)
            return Spent(1.0, 1.0 * steps)

    trainee = Overfitting()
    settings, study = study_of(tmp_path, trainee, share=0.9, trials=2)
    search(trainee, settings, study)
    found = conclude(trainee, settings, study, tmp_path, "train")
    assert found.best["learning_rate"] != 1e-3, "the first's least loss of 1 is of a step that is not exported"
    assert found.gain.gain == pytest.approx(1.4)
    assert "keep_best" not in yaml.safe_load((tmp_path / "run.yaml").read_text())


def test_trials_of_equal_options_are_equal_bit_for_bit(tmp_path):
    """A trial is a function of its options and the seed, whatever was tried before it."""
    from reslora_diffusion.tuning.command import dreambooth

    line = words(tmp_path / "out", max_train_steps=50, shortcut="input")
    trainee, _ = dreambooth(line, Settings(), [])
    found = []
    for rate in (1e-2, 3e-2, 1e-2):
        trainee.train({"learning_rate": rate}, 2, [1, 2], lambda step, losses: found.append(losses))
    assert np.array_equal(found[0], found[4])
    assert np.array_equal(found[1], found[5])
    assert not np.array_equal(found[1], found[3])
    assert all(len(losses) == 32 for losses in found)
