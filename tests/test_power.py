"""A power cut at any moment leaves every checkpoint that was reported as written, and none that only looks whole."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from power import Disk
from reslora_diffusion.diffusion.train.checkpoints import find_checkpoint, write_checkpoint
from reslora_diffusion.llm.options import LlmOptions
from reslora_diffusion.llm.resuming import checkpoint_of, remove_oldest, write_checksums
from reslora_diffusion.llm.training_options import TrainingOptions
from reslora_diffusion.utils.files import fresh_folder, replace_files, unfinished, write_text
from reslora_diffusion.utils.output_folder import alone_in
from reslora_diffusion.utils.state_files import write_facts

STEPS = (1, 2, 3, 4)


def diffusion_checkpoint(output, step):
    def write(folder):
        (folder / "state").mkdir()
        save_file({"a": torch.full((500,), float(step))}, folder / "state" / "state.safetensors")
        write_facts(folder / "state", {"step": step, "options": {}})

    write_checkpoint(output, step, write, limit=2)


def diffusion_latest(output):
    found = find_checkpoint(output, "latest")
    return found and load_file(found / "state" / "state.safetensors")["a"][-1].item()


ADAPTER = {"peft_type": "RESLORA", "r": 8, "lora_alpha": 16, "use_rslora": False}


def language_checkpoint(output, step):
    """`ExportedTrainer` lets `transformers.Trainer` write it, which flushes nothing."""
    folder = output / f"checkpoint-{step}"
    with unfinished(folder):
        save_file({"a": torch.full((500,), float(step))}, folder / "adapter_model.safetensors")
        (folder / "adapter_config.json").write_text(json.dumps(ADAPTER))
        (folder / "trainer_state.json").write_text(json.dumps({"global_step": step}))
        write_checksums(folder)
    remove_oldest(folder, 1, None)


def language_latest(output):
    given = TrainingOptions(
        resume_from_checkpoint="latest", output_dir=str(output), max_steps=-1, metric_for_best_model=""
    )
    found = checkpoint_of(given, LlmOptions(lora_alpha=16, rank=8))
    return found and load_file(f"{found}/adapter_model.safetensors")["a"][-1].item()


@pytest.mark.parametrize(
    ("write", "latest"),
    [(diffusion_checkpoint, diffusion_latest), (language_checkpoint, language_latest)],
    ids=["diffusion", "language model"],
)
@pytest.mark.parametrize("names", [False, True], ids=["nothing but what was flushed", "names without contents"])
def test_a_power_cut_takes_no_checkpoint_that_was_written(tmp_path, capsys, write, latest, names):
    root, place, reported, looks = tmp_path / "disk", tmp_path / "left", [0], []
    root.mkdir()
    output = root / "runs" / "mine"

    def look():
        found = latest(disk.left(place, names) / "runs" / "mine") or 0
        assert found in (reported[-1], reported[-1] + 1), f"{reported[-1]} was reported as written, {found} is left"
        looks.append(found)

    with Disk(root, look) as disk, alone_in(output):
        for step in STEPS:
            write(output, step)
            reported.append(step)
        disk.see()
    assert looks[-1] == STEPS[-1]
    assert len(looks) > 100


@pytest.mark.parametrize("names", [False, True], ids=["nothing but what was flushed", "names without contents"])
def test_a_power_cut_leaves_the_older_file_or_the_newer_one(tmp_path, names):
    root, place, seen = tmp_path / "disk", tmp_path / "left", set()
    (root / "out").mkdir(parents=True)

    def look():
        left = disk.left(place, names) / "out"
        for name in ("a.json", "b.safetensors"):
            content = (left / name).read_text() if (left / name).exists() else None
            assert content in (None, "older", "newer"), f"{name} holds {content!r}"
            assert content is not None or "newer" not in seen
            seen.add(content)

    with Disk(root, look) as disk:
        for content in ("older", "newer"):
            write_text(root / "out" / "a.json", content)
            with fresh_folder(root / "out") as fresh:
                (fresh / "b.safetensors").write_text(content)
                replace_files(fresh, root / "out", ["b.safetensors"])
    assert {(disk.left(place, names) / "out" / name).read_text() for name in ("a.json", "b.safetensors")} == {"newer"}


def test_the_disk_notices_what_is_not_flushed(tmp_path):
    """The test itself: a rename without a flush loses the contents, one without the folder's loses the name."""
    root, place = tmp_path / "disk", tmp_path / "left"
    root.mkdir()
    with Disk(root, lambda: None) as disk:
        (root / "fresh").write_text("new")
        (root / "fresh").replace(root / "file")
        assert [path.name for path in disk.left(place).iterdir()] == []
        assert (disk.left(place, names=True) / "file").read_text() == ""
