"""Seeds and grids: which runs there are, that the finished ones stay, and what the benchmarks read."""

import json
import os
import sys
from pathlib import Path

import pytest

from benchmarks.sweep import interval, main, read, table
from reslora_diffusion.llm.sweep import Sweep, run, sweep_of
from reslora_diffusion.utils.problems import BadInput

PROGRAM = """
import json, pathlib, sys
given = dict(word.removeprefix("--").split("=", 1) for word in sys.argv[1:])
folder = pathlib.Path(given["output_dir"])
assert (folder.parent / "sweep.json").is_file(), "a kill must not hide what the runs are of"
folder.mkdir(parents=True, exist_ok=True)
(folder / "words.json").write_text(json.dumps(given))
if given["seed"] == "1" and "resume_from_checkpoint" not in given:
    (folder / "checkpoint-2").mkdir()
    sys.exit(3)
score = float(given["learning_rate"]) + int(given["seed"]) / 10
results = {"method": "reslora", "shortcut": "block", "exact_match": {"as exported": score}, "best_metric": None}
(folder / "results.json").write_text(json.dumps(results))
(folder / "adapter_model.safetensors").write_bytes(b"")
"""


def test_a_command_line_without_either_flag_is_one_run():
    assert sweep_of(["--rank", "4", "--seed=3"], "out") is None


def test_every_setting_is_run_with_every_seed():
    words = ["--rank=4", "--seeds", "3", "--grid", "learning_rate=1e-4,3e-4", "lora-alpha=8", "--packing", "true"]
    sweep = sweep_of([*words, "--output-dir", "there"], "out")
    assert sweep == Sweep(
        {"learning_rate": ["1e-4", "3e-4"], "lora_alpha": ["8"]}, [0, 1, 2], sweep.words, Path("there")
    )
    assert sweep.words == ["--rank=4", "--packing", "true"]
    assert len(sweep.runs()) == 6
    assert sweep.folder(*sweep.runs()[-1]) == Path("there", "learning_rate-3e-4_lora_alpha-8_seed-2")
    assert sweep_of(["--seeds=4,9"], "out").seeds == [4, 9]
    assert sweep_of(["--grid", "rank=2,4"], "out").seeds == [0]


def test_the_folder_of_a_configuration_file_holds_the_runs(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("output_dir: there\nlora_r: 8\nbase_model: b\nadapter: lora\n")  # axolotl's names
    assert sweep_of(["--seeds=2", "--config", str(path)], "out").output == Path("there")
    assert sweep_of(["--seeds=2", f"--config={path}", "--output_dir", "here"], "out").output == Path("here")
    path.write_text("rank: 8\n")
    assert sweep_of(["--seeds=2", f"--config={path}"], "out").output == Path("out")
    with pytest.raises(BadInput, match="gone.yaml"):
        sweep_of(["--seeds=2", "--config=gone.yaml"], "out")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--seeds", "many"], "got many, wanted how many"),
        (["--seeds"], "got nothing, wanted how many"),
        (["--seeds", "0"], "got 0, wanted 1 or more"),
        (["--grid", "learning_rate"], "got 'learning_rate', wanted an option and its values"),
        (["--grid", "seed=1,2"], "got 'seed=1,2', wanted an option"),
        (["--grid"], "--grid: got nothing"),
        (["--seeds", "2", "--seed", "4"], "set them for each run"),
    ],
)
def test_what_is_no_sweep_is_refused(words, message):
    with pytest.raises(BadInput, match=message):
        sweep_of(words, "out")


def test_a_stopped_sweep_goes_on_where_it_was_and_benchmarks_read_it(tmp_path, capsys):
    program = [sys.executable, "-c", PROGRAM]
    sweep = Sweep({"learning_rate": ["1", "2"]}, [0, 1, 2], ["--rank=4"], tmp_path)
    assert run(sweep, program) == 3
    assert [one["seed"] for one in read([tmp_path])] == [0]
    assert run(sweep, program) == 3  # the first of the second setting's
    first = tmp_path / "learning_rate-1_seed-0" / "words.json"
    assert json.loads((tmp_path / "learning_rate-1_seed-1" / "words.json").read_text())["resume_from_checkpoint"]
    kept = first.stat().st_mtime_ns
    assert run(sweep, program) == 0
    assert first.stat().st_mtime_ns == kept
    assert "learning_rate-1_seed-0: is finished" in capsys.readouterr().out
    runs = read([tmp_path])
    assert [(one["setting"]["learning_rate"], one["seed"]) for one in runs] == [(x, s) for x in "12" for s in range(3)]
    main([str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split()[:5] == ["reslora", "block", "learning_rate", "1", "3"]
    assert "1.1 (0.8516 to 1.348)" in lines[1]
    with pytest.raises(ValueError, match="wanted one of exact_match.as exported"):
        table(runs, "nothing")
    assert interval([1.0]) is None


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_ctrl_c_in_the_last_step_of_a_run_ends_the_sweep(tmp_path):
    """The run finishes, as a trainer does there, and the next one must not begin."""
    program = tmp_path / "program.py"
    heard = "import os, signal, time\nsignal.signal(signal.SIGTERM, lambda *_: None)\n"
    program.write_text(f"{heard}os.kill(os.getppid(), signal.SIGINT)\ntime.sleep(0.5)\n{PROGRAM}")
    sweep = sweep_of(["--seeds=3,4", "--learning_rate=1", "--output_dir", str(tmp_path / "runs")], "out")
    assert run(sweep, [sys.executable, str(program)]) == 0
    assert [path.parent.name for path in (tmp_path / "runs").glob("*/results.json")] == ["seed-3"]


def test_finished_runs_of_other_options_do_not_pass_for_those_of_a_sweep(tmp_path):
    program = [sys.executable, "-c", PROGRAM]
    done = Sweep({"learning_rate": ["1"]}, [0], ["--rank=4"], tmp_path)
    assert run(done, program) == 0
    with pytest.raises(BadInput, match="is of a sweep with --rank=4; wanted another --output_dir"):
        run(Sweep({"learning_rate": ["1"]}, [0], ["--rank=8"], tmp_path), program)
    assert run(Sweep({"learning_rate": ["1"]}, [0, 2], ["--rank=4"], tmp_path), program) == 0, "more seeds are the same"


def test_options_may_be_mended_while_nothing_is_trained(tmp_path):
    assert run(Sweep({"learning_rate": ["1"]}, [0], ["--rnk=4"], tmp_path), [sys.executable, "-c", "exit(2)"]) == 2
    mended = Sweep({"learning_rate": ["1"]}, [0], ["--rank=4"], tmp_path)
    assert run(mended, [sys.executable, "-c", PROGRAM]) == 0


def test_a_run_that_leaves_a_pruned_model_is_finished(tmp_path, capsys):
    program = [sys.executable, "-c", PROGRAM.replace("adapter_model.safetensors", "pruning_report.json")]
    assert run(Sweep({"learning_rate": ["1"]}, [0, 2], ["--schedule=prune"], tmp_path), program) == 0
    assert len(read([tmp_path])) == 2
