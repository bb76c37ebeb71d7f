"""Files are complete or not there: after errors, blocked places, kills and power cuts."""

import os

import pytest

from reslora_diffusion.utils.files import (
    atomic_write,
    fresh_folder,
    replace_files,
    replace_folder,
    sweep,
    write_bytes,
    write_text,
)


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.rglob("*"))


def test_an_error_leaves_the_older_file_and_nothing_beside_it(tmp_path):
    path = tmp_path / "a.txt"
    write_text(path, "older ü")
    assert path.read_text(encoding="utf-8") == "older ü"

    def interrupted():
        with atomic_write(path) as fresh:
            fresh.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_text(encoding="utf-8") == "older ü"
    assert names(tmp_path) == ["a.txt"]
    (tmp_path / "taken").mkdir()
    with pytest.raises(IsADirectoryError):
        write_bytes(tmp_path / "taken", b"blocked")
    assert names(tmp_path) == ["a.txt", "taken"]
    write_bytes(tmp_path / ("n" * 255), b"the longest name a file system takes")


def test_files_that_belong_together_are_moved_all_or_none(tmp_path):
    (tmp_path / "a").write_text("older")
    (tmp_path / "kohya").write_text("a file where a folder is to be")

    with fresh_folder(tmp_path) as fresh:
        (fresh / "a").write_text("newer")
        (fresh / "kohya").mkdir()
        (fresh / "kohya" / "b").write_text("newer")
        with pytest.raises(NotADirectoryError, match="kohya"):
            replace_files(fresh, tmp_path, ["a", "kohya/b"])
    assert (tmp_path / "a").read_text() == "older"
    assert names(tmp_path) == ["a", "kohya"]

    (tmp_path / "kohya").unlink()
    with fresh_folder(tmp_path / "new") as fresh:
        pass
    assert names(tmp_path) == ["a"]


def test_a_folder_is_replaced_as_a_whole(tmp_path):
    for name in ("fresh", "folder"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_text(name)
    replace_folder(tmp_path / "fresh", tmp_path / "folder")
    assert names(tmp_path) == ["folder", "fresh"]
    assert (tmp_path / "folder" / "fresh").is_file()


def test_nothing_is_renamed_that_is_not_on_the_disk(tmp_path, monkeypatch):
    """A power cut keeps what was flushed: whatever a rename makes visible has been, and the rename is afterwards."""
    flushed, renamed = [], []
    fsync, replace = os.fsync, os.replace

    def note(descriptor):
        flushed.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    def checked(source, target):
        files = [source] if os.path.isfile(source) else [os.path.join(r, n) for r, _, f in os.walk(source) for n in f]
        if not str(target).endswith(".replaced"):
            assert {os.path.realpath(path) for path in files} <= set(flushed), source
        renamed.append((target, len(flushed)))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", note)
    monkeypatch.setattr(os, "replace", checked)
    write_text(tmp_path / "a", "a")
    for _ in range(2):
        (tmp_path / "fresh" / "state").mkdir(parents=True)
        (tmp_path / "fresh" / "state" / "x").write_text("x")
        replace_folder(tmp_path / "fresh", tmp_path / "checkpoint-1")
    with fresh_folder(tmp_path / "out") as fresh:
        (fresh / "b").write_text("b")
        replace_files(fresh, tmp_path / "out", ["b"])
    assert len(renamed) == 5
    for target, count in renamed:
        assert os.path.realpath(os.path.dirname(target)) in flushed[count:], target


def test_leftovers_are_swept_and_nothing_else(tmp_path):
    for name in (".mine", ".venv.old", ".a.partial", "b.partial"):
        (tmp_path / name).mkdir()
    for name in (".x.0123abcd.partial", ".export-1", ".writable-2"):
        (tmp_path / name).write_text("rest")
    assert sorted(sweep(tmp_path)) == [".export-1", ".writable-2", ".x.0123abcd.partial"]
    assert names(tmp_path) == [".a.partial", ".mine", ".venv.old", "b.partial"]
