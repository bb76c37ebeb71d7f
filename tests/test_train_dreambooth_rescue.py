"""Nothing that was trained is lost: errors in a step, at a validation, and at the end of a run."""

import pytest
import torch
from safetensors.torch import load_file

from dreambooth import PROMPT, train, train_without_export
from reslora_diffusion.diffusion.objective.loss import Denoiser
from reslora_diffusion.diffusion.train.checkpoints import checkpoints_in
from reslora_diffusion.diffusion.train.history import History
from reslora_diffusion.diffusion.train.validation import ValidationImages
from reslora_diffusion.utils.problems import BadInput, Stopped, is_out_of_memory
from tiny import tiny_pipeline

WEIGHTS = "pytorch_lora_weights.safetensors"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of three steps that nothing disturbs."""
    return train(tmp_path_factory.mktemp("rescue") / "run", checkpointing_steps=1)


def assert_same(first, second) -> None:
    first, second = load_file(first), load_file(second)
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


def state(folder, step: int):
    return folder / f"checkpoint-{step}" / "state" / "state.safetensors"


def fail_in_step(monkeypatch, step: int, fail) -> None:
    """Let the loss of a step call `fail`. `prepare` computes losses too, before the first step."""
    loss, calls = Denoiser.loss, []

    def counted(self, batch, size):
        calls.append(size)
        if calls.count(2) == step:  # the preflight asks with size 1
            fail()
        return loss(self, batch, size)

    monkeypatch.setattr(Denoiser, "loss", counted)


def test_too_little_memory_in_a_step_keeps_the_last_one_and_says_what_needs_less(tmp_path, monkeypatch, whole):
    with monkeypatch.context() as patched:
        fail_in_step(patched, 3, lambda: torch.empty(1 << 50))
        with pytest.raises(Stopped) as raised:
            train(tmp_path / "run")
    said = str(raised.value)
    assert "out of memory in step 3" in said
    assert (
        "--train_batch_size 1 --gradient_accumulation_steps 2, --gradient_checkpointing, --mixed_precision bf16" in said
    )
    assert "Kept: checkpoint-2" in said
    assert_same(state(tmp_path / "run", 2), state(whole, 2))
    train(tmp_path / "run", resume_from_checkpoint="latest", checkpointing_steps=3)
    assert_same(state(tmp_path / "run", 3), state(whole, 3))


def test_an_error_in_the_middle_of_an_update_keeps_nothing_half_done(tmp_path, monkeypatch):
    calls, step = [], torch.optim.AdamW.step

    def half(self, *args, **options):
        calls.append(self)
        step(self, *args, **options)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(torch.optim.AdamW, "step", half)
    with pytest.raises(Stopped, match="out of memory in step 3") as raised:
        train(tmp_path / "run", checkpointing_steps=1)
    assert "half done and is not kept" in str(raised.value)
    assert [path.name for path in checkpoints_in(tmp_path / "run")] == ["checkpoint-1", "checkpoint-2"]


def test_too_little_memory_before_the_first_step_is_one_message(tmp_path, monkeypatch):
    monkeypatch.setattr(Denoiser, "losses", lambda *_: torch.empty(1 << 50))
    with pytest.raises(Stopped, match="out of memory before the first step .*these options need less"):
        train(tmp_path / "run")


@pytest.mark.parametrize(
    ("error", "is_memory"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), True),
        (RuntimeError("MPS backend out of memory"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_what_counts_as_too_little_memory(error, is_memory):
    assert is_out_of_memory(error) is is_memory


@pytest.mark.parametrize("blocked", ["kohya", "merge_report.json"])
def test_a_blocked_path_at_the_end_leaves_a_checkpoint_from_which_is_exported_later(tmp_path, blocked, whole):
    folder = tmp_path / "run"
    folder.mkdir()
    if blocked == "kohya":
        (folder / blocked).write_text("a file")
    else:
        (folder / blocked / "in it").mkdir(parents=True)
    with pytest.raises(Stopped) as raised:
        train(folder)
    said = str(raised.value)
    assert blocked in said
    assert f"Kept: checkpoint-3 in {folder} with all that was trained" in said
    assert "continue by --resume_from_checkpoint latest, which also exports it" in said
    assert_same(state(folder, 3), state(whole, 3))

    (folder / blocked).rename(tmp_path / "aside")
    train(folder, resume_from_checkpoint="latest")
    assert_same(folder / WEIGHTS, whole / WEIGHTS)


def test_an_error_while_generating_the_last_images_keeps_what_was_trained(tmp_path, monkeypatch, whole):
    generate, calls = ValidationImages.generate, []

    def fails(self, adapters):
        calls.append(self)
        if len(calls) == 2:
            raise KeyError("a fault of the program")
        return generate(self, adapters)

    monkeypatch.setattr(ValidationImages, "generate", fails)
    with pytest.raises(Stopped, match="training failed: KeyError: 'a fault of the program'") as raised:
        train(tmp_path / "run", validation_prompt=[PROMPT], num_validation_images=1, validation_steps=3)
    assert "Kept: checkpoint-3" in str(raised.value)
    assert "Traceback" in (tmp_path / "run" / "error.txt").read_text()
    assert_same(state(tmp_path / "run", 3), state(whole, 3))


def test_a_state_that_the_output_folder_does_not_take_is_written_elsewhere(tmp_path, monkeypatch, whole):
    from reslora_diffusion.diffusion.train import session as module

    def full(*args, **options):
        raise OSError(28, "No space left on device")

    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    monkeypatch.setattr(module, "write_checkpoint", full)
    with pytest.raises(
        Stopped, match="checkpoint-2 cannot be written: .*No space left on device; it is in .*"
    ) as raised:
        train(tmp_path / "run", checkpointing_steps=2)
    (found,) = (tmp_path / "temporary").glob("run-*/checkpoint-2")
    assert f"it is in {found} instead: move it into {tmp_path / 'run'} to continue from it" in str(raised.value)
    assert_same(found / "state" / "state.safetensors", state(whole, 2))


def test_metrics_that_cannot_be_written_stop_the_run_after_a_whole_step(tmp_path, monkeypatch, whole):
    write = History.write

    def full(self, rows):
        if any(row["step"] == 2 for row in rows):
            raise OSError(28, "No space left on device", str(self.path))
        write(self, rows)

    with monkeypatch.context() as patched:
        patched.setattr(History, "write", full)
        with pytest.raises(Stopped, match="No space left on device: .*metrics.jsonl.* Kept: checkpoint-2"):
            train(tmp_path / "run", use_ema=True)
    undisturbed = train_without_export(tmp_path / "ema", use_ema=True, checkpointing_steps=2)
    assert_same(state(tmp_path / "run", 2), state(undisturbed, 2))


def test_files_of_checkpoints_have_names_of_their_own(whole):
    found = sorted(path.name for path in whole.rglob("kohya/*"))
    assert found == ["run-000001.safetensors", "run-000002.safetensors", "run-000003.safetensors", "run.safetensors"]


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_a_base_that_is_not_finite_is_said_before_the_first_step(tmp_path, part):
    pipeline = tiny_pipeline(tmp_path / "base")
    name, parameter = list(getattr(pipeline, part).named_parameters())[-1]
    parameter.data.view(-1)[0] = float("nan")
    pipeline.save_pretrained(tmp_path / "base")
    with pytest.raises(BadInput, match=f"1 tensor of the {part} holds NaN or infinity: {name}"):
        train(tmp_path / "run", pretrained_model_name_or_path=tmp_path / "base")
    assert not (tmp_path / "run").exists()
