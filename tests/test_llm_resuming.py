"""Which checkpoint a run continues from: the newest whole one, and only one that belongs to it."""

import json
import os
import shutil
import time

import pytest
import torch
from safetensors.torch import save_file

from reslora_diffusion.llm.options import LlmOptions
from reslora_diffusion.llm.resuming import CHECKSUMS, checkpoint_of, fault_of, remove_oldest, write_checksums
from reslora_diffusion.llm.training_options import TrainingOptions
from reslora_diffusion.utils.files import UNFINISHED, unfinished
from reslora_diffusion.utils.output_folder import alone_in
from reslora_diffusion.utils.problems import BadInput

ADAPTER = {"peft_type": "RESLORA", "r": 4, "lora_alpha": 8, "use_rslora": False, "target_modules": ["q_proj", "v_proj"]}


def checkpoint(folder, step: int, *, checksums: bool, metric: float = 0.5):
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    save_file({"a": torch.arange(64.0)}, path / "adapter_model.safetensors")
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        torch.save({"value": torch.arange(64.0)}, path / name)
    (path / "adapter_config.json").write_text(json.dumps(ADAPTER | {"shortcut": "input", "num_previous": 1}))
    row = {"step": step, "eval_loss": 1.25, "eval_exact_match": 0.5}
    state = {"global_step": step, "best_metric": metric, "best_global_step": step, "log_history": [row]}
    (path / "trainer_state.json").write_text(json.dumps(state))
    if checksums:
        write_checksums(path)
    return path


def chosen(folder, wanted="latest", **options) -> str | None:
    given = TrainingOptions(
        resume_from_checkpoint=str(wanted), output_dir=str(folder), max_steps=-1, metric_for_best_model="exact_match"
    )
    return checkpoint_of(given, LlmOptions(**options))


def cut_off(path):
    path.write_bytes(path.read_bytes()[:-7])


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[-9] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("checksums", [True, False], ids=["checksums", "formats alone"])
@pytest.mark.parametrize("harm", [cut_off, flip_a_bit, lambda path: path.unlink()], ids=["cut off", "flipped", "gone"])
@pytest.mark.parametrize("name", ["adapter_model.safetensors", "optimizer.pt", "trainer_state.json"])
def test_latest_is_the_newest_whole_checkpoint(tmp_path, capsys, name, harm, checksums):
    if not checksums and harm is not cut_off:
        pytest.skip("only checksums tell")
    for step in (2, 10):
        checkpoint(tmp_path, step, checksums=checksums)
    assert chosen(tmp_path).endswith("checkpoint-10")
    assert capsys.readouterr().out == ""
    harm(tmp_path / "checkpoint-10" / name)
    assert chosen(tmp_path).endswith("checkpoint-2")
    assert name in capsys.readouterr().out
    with pytest.raises(BadInput, match=name):
        chosen(tmp_path, tmp_path / "checkpoint-10")
    harm(tmp_path / "checkpoint-2" / name)
    assert chosen(tmp_path) is None
    assert "starting afresh" in capsys.readouterr().out


def test_what_a_killed_run_has_not_finished_is_swept_and_no_checkpoint(tmp_path):
    """However complete it looks: the parts that are not there yet are not known."""
    checkpoint(tmp_path, 2, checksums=True)
    path = checkpoint(tmp_path, 4, checksums=False)
    (path / UNFINISHED).touch()
    assert "was not finished" in fault_of(path)
    assert chosen(tmp_path).endswith("checkpoint-2")
    with alone_in(tmp_path):
        assert not path.exists()
    with unfinished(path):
        (path / "x").touch()
        assert "was not finished" in fault_of(path)
    assert [left.name for left in path.iterdir()] == ["x"]


def test_checkpoints_are_removed_in_the_order_in_which_they_were_written(tmp_path):
    """One of more steps may be damaged, or of an attempt that was given up: what was just written has to stay."""
    for step, age in ((2, 30), (10, 20), (4, 10), (3, 0)):
        os.utime(checkpoint(tmp_path, step, checksums=True), (time.time() - age,) * 2)
    remove_oldest(tmp_path / "checkpoint-3", 3, str(tmp_path / "checkpoint-2"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-2", "checkpoint-3", "checkpoint-4"]
    remove_oldest(tmp_path / "checkpoint-3", 1, None)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-3"]


def test_states_that_hold_something_else_are_one_message(tmp_path):
    path = checkpoint(tmp_path, 2, checksums=False)
    for state in ({"log_history": 5}, {"log_history": [5], "best_metric": 1}, {"best_metric": [], "log_history": "x"}):
        (path / "trainer_state.json").write_text(json.dumps({"global_step": 2} | state))
        with pytest.raises(BadInput, match="cannot be continued from"):
            chosen(tmp_path)
    (path / "trainer_state.json").write_text("[" * 100_000)
    assert chosen(tmp_path) is None


def test_a_checkpoint_without_its_state_is_not_whole(tmp_path):
    path = checkpoint(tmp_path, 4, checksums=False)
    assert fault_of(path) is None
    (path / "trainer_state.json").unlink()
    assert "trainer_state.json is missing" in fault_of(path)
    shutil.rmtree(path)
    assert "trainer_state.json is missing" in fault_of(path)
    assert not (path / CHECKSUMS).exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 8, "lora_alpha": 8}, "with r 4, got 8"),
        ({"lora_alpha": 4}, "with lora_alpha 8, got 4"),
        ({"use_rslora": True}, "with use_rslora False, got True"),
        ({"shortcut": "block"}, "with shortcut 'input', got 'block'"),
        ({"target_modules": ["q_proj", "o_proj"]}, "with target_modules q_proj, v_proj, got q_proj, o_proj"),
        ({"method": "lora"}, "with peft_type 'RESLORA', got 'LORA'"),
    ],
)
def test_a_checkpoint_of_another_adapter_is_refused(tmp_path, options, message):
    checkpoint(tmp_path, 2, checksums=True)
    assert chosen(tmp_path, target_modules=["v_proj", "q_proj"])
    with pytest.raises(BadInput, match=message):
        chosen(tmp_path, **options)


def test_a_best_step_by_another_metric_is_not_compared_with(tmp_path):
    """Older versions chose it by the loss, which no share of right answers exceeds."""
    checkpoint(tmp_path, 2, checksums=True, metric=1.25)
    with pytest.raises(BadInput, match="chose its best step by loss, this run by exact_match"):
        chosen(tmp_path)
