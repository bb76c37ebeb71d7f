"""Windows, by its rules enforced here: what it cannot rename, lock, signal or print."""

import ast
import errno
import io
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from typer.testing import CliRunner

from dreambooth import train
from reslora_diffusion import interruption
from reslora_diffusion.cli import app
from reslora_diffusion.core.functional import LoraFactors
from reslora_diffusion.export import export_lora
from reslora_diffusion.utils import files, output_folder, processes
from reslora_diffusion.utils.files import write_text
from reslora_diffusion.utils.output_folder import alone_in
from reslora_diffusion.utils.problems import BadInput, run_program

ROOT = Path(__file__).resolve().parent.parent
SHARED = "The process cannot access the file because it is being used by another process"


def open_files() -> tuple[set[str], set[str]]:
    """Paths that this process has open, and those that it has mapped into its memory."""
    numbers = [name for name in os.listdir("/proc/self/fd") if os.path.lexists(f"/proc/self/fd/{name}")]
    lines = Path("/proc/self/maps").read_text().splitlines()
    return {os.readlink(f"/proc/self/fd/{n}") for n in numbers}, {x.split(maxsplit=5)[5] for x in lines if x.count("/")}


@pytest.fixture
def windows_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files that are open can be neither replaced nor renamed, no folder can that holds one of them, and nothing can be
    put in the place of a mapped file."""
    if sys.platform != "linux":
        pytest.skip("reads which files are open from /proc")
    replace = os.replace

    def guarded(source: str | os.PathLike, target: str | os.PathLike) -> None:
        (opened, mapped), old, new = open_files(), os.path.realpath(source), os.path.realpath(target)
        inside = any(name.startswith((f"{old}/", f"{new}/")) for name in opened)
        if inside or {old, new} & opened or new in mapped:
            raise PermissionError(errno.EACCES, SHARED, new)
        replace(source, target)

    monkeypatch.setattr(os, "replace", guarded)
    monkeypatch.setattr(processes, "WINDOWS", True)


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    path = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    factors = LoraFactors(torch.randn(2, 8), torch.randn(8, 2), 1.0)
    return export_lora(tmp_path / "lora", {"unet": {path: factors}}).files["diffusers"]


def test_the_rule_is_enforced(windows_files: None, tmp_path: Path) -> None:
    save_file({"x": torch.ones(2)}, tmp_path / "a.safetensors")
    with safe_open(tmp_path / "a.safetensors", "pt"), pytest.raises(PermissionError, match="being used"):
        write_text(tmp_path / "a.safetensors", "")
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_a_file_that_is_held_for_a_moment_is_replaced_after_it(
    windows_files: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_text(tmp_path / "a.txt", "old")
    held = (tmp_path / "a.txt").open(encoding="utf-8")
    waits: list[float] = []
    monkeypatch.setattr(
        files.time, "sleep", lambda seconds: waits.append(seconds) or (len(waits) == 2 and held.close())
    )
    write_text(tmp_path / "a.txt", "new")
    assert (tmp_path / "a.txt").read_text(encoding="utf-8") == "new"
    assert waits == list(files.RETRIES[:2])


def test_no_tool_writes_over_a_file_that_it_has_open(windows_files: None, adapter: Path) -> None:
    kohya, small = adapter.with_name("panda.safetensors"), adapter.with_name("small.safetensors")
    for words in (
        ["convert", adapter, "--to", "kohya", "--output", kohya],
        ["resize", kohya, "--rank", 1, "--allow_lossy", "--output", small],
    ):
        for _ in range(2):
            done = CliRunner().invoke(app, [str(word) for word in words])
            assert not done.exit_code, done.output


def test_a_run_goes_on_where_open_files_cannot_be_replaced(windows_files: None, tmp_path: Path) -> None:
    settings = {"checkpointing_steps": 1, "checkpoints_total_limit": 1, "shortcut": "input"}
    train(tmp_path / "out", max_train_steps=2, **settings)
    output = train(tmp_path / "out", max_train_steps=3, resume_from_checkpoint="latest", **settings)
    assert [path.name for path in output.glob("checkpoint-*")] == ["checkpoint-3"]


@pytest.mark.parametrize("fcntl", ["there", "absent"])
def test_a_folder_belongs_to_one_run(fcntl: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if fcntl == "absent":
        monkeypatch.setattr(output_folder, "fcntl", None)
    left = tmp_path / "out" / f".a.txt.{'0' * 8}.partial"
    left.parent.mkdir()
    left.touch()
    with alone_in(tmp_path / "out"):
        assert not left.exists()
        with pytest.raises(BadInput, match="another run is writing"), alone_in(tmp_path / "out"):
            pass
        with alone_in(tmp_path / "other"):
            pass
    assert not (tmp_path / "other").exists()
    with alone_in(tmp_path / "out"):
        pass


class Recorder:
    """A process that writes down what it is sent."""

    def __init__(self, *words: object, **settings: object) -> None:
        self.settings, self.sent = settings, []

    def send_signal(self, number: int) -> None:
        self.sent.append(number)


@pytest.mark.parametrize("windows", [False, True])
def test_a_program_is_asked_to_stop_by_what_its_platform_knows(windows: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "WINDOWS", windows)
    monkeypatch.setattr(subprocess, "Popen", Recorder)
    process = processes.start_apart(["x"])
    processes.ask_to_stop(process)
    assert process.settings == ({"creationflags": 0x200} if windows else {"start_new_session": True})
    assert process.sent == [1 if windows else signal.SIGTERM]  # 1 is CTRL_BREAK_EVENT


def test_ctrl_break_finishes_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signal, "SIGBREAK", signal.SIGUSR1, raising=False)
    before = signal.getsignal(signal.SIGUSR1)

    class OneProcess:
        num_processes = 1

    with interruption.Interruption(OneProcess()) as asked:  # type: ignore[arg-type]
        assert not asked.requested()
        signal.raise_signal(signal.SIGUSR1)
        assert asked.requested()
    assert signal.getsignal(signal.SIGUSR1) is before
    terminate = signal.getsignal(signal.SIGTERM)
    try:
        assert run_program(lambda: signal.raise_signal(signal.SIGUSR1)) == 130
    finally:
        signal.signal(signal.SIGUSR1, before)
        signal.signal(signal.SIGTERM, terminate)


def test_a_pipe_that_knows_few_characters_is_printed_to(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    monkeypatch.setattr(sys, "stdout", pipe)
    before = signal.getsignal(signal.SIGTERM)
    assert run_program(lambda: print("a photo of 犬")) == 0
    signal.signal(signal.SIGTERM, before)
    pipe.flush()
    assert pipe.buffer.getvalue() == b"a photo of \\u72ac\n"


def test_texts_are_read_and_written_as_utf8() -> None:
    """Windows takes them for its own code page otherwise."""
    for path in (
        path for folder in ("reslora_diffusion", "app", "train_scripts") for path in (ROOT / folder).rglob("*.py")
    ):
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            method = isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute)
            if method and call.func.attr in ("read_text", "write_text") and "/proc" not in ast.unparse(call):
                assert "utf-8" in ast.unparse(call), f"{path}: {ast.unparse(call)}"
