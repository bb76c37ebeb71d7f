"""Files and folders that are complete or not there at all, whatever ends the program that writes them.

    with atomic_write(path) as fresh:       write to the hidden name `fresh`, then flush it to the disk and rename it
        save_file(tensors, fresh)
    write_text(path, text)                  the same for a text
    replace_folder(fresh, folder)           puts a finished folder in the place of an older one
    with fresh_folder(folder) as fresh:     a hidden folder inside `folder` for several files that belong together
        ...
        replace_files(fresh, folder, names)

    with unfinished(folder):            a folder that another library fills in its place: it is marked until it is whole
        ...

A program that is killed leaves at most hidden entries behind, which `sweep` removes. Flushing before the rename is what
makes a file survive a power cut: without it, a file system may keep the new name and lose what it names.
"""

import errno
import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from . import processes

UNFINISHED = "unfinished"  # a file in a folder that is not whole yet
PARTIAL, STALE = ".partial", ".replaced"  # suffixes of hidden names
LEFTOVERS = (
    f".*.{'[0-9a-f]' * 8}{PARTIAL}",
    f".checkpoint-*{PARTIAL}",
    f".*{STALE}",
    ".checkpoint-*.old",
    ".export-*",
    ".writable-*",
)
RETRIES = (0.02, 0.08, 0.3, 0.6)  # seconds
LONGEST_STEM = 100  # characters: the hidden name must not be longer than a file system allows


def partial_name(path: Path) -> Path:
    """A hidden path beside `path` that no other process or thread uses."""
    return path.with_name(f".{path.name[:LONGEST_STEM]}.{os.urandom(4).hex()}{PARTIAL}")


def rename(fresh: str | os.PathLike, path: str | os.PathLike) -> None:
    """`os.replace`. Windows refuses it for as long as any program has the file open, such as a virus scanner that looks
    at what was just written: there it is tried again for a second."""
    for wait in RETRIES if processes.WINDOWS else ():
        with suppress(PermissionError):
            return os.replace(fresh, path)
        time.sleep(wait)
    os.replace(fresh, path)


def flush(path: Path) -> None:
    """Wait until the contents of a file or the entries of a folder are on the disk."""
    if path.is_dir() and os.name == "nt":  # Windows opens no folders
        return
    descriptor = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # a file system that cannot flush
            raise
    finally:
        os.close(descriptor)


def flush_tree(folder: Path) -> None:
    """Flush a folder with everything in it."""
    for root, _, names in os.walk(folder):
        for name in names:
            flush(Path(root, name))
        flush(Path(root))


def make_folder(folder: Path) -> None:
    """Make a folder with those that it lies in, each of them on the disk."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in reversed(missing):
        flush(path.parent)


@contextmanager
def atomic_write(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a hidden path to write to; it is renamed to `path` if nothing is raised, and removed otherwise.

    Raises:
        OSError: the file cannot be written; an older file of that name is unchanged.
    """
    path = Path(path)
    fresh = partial_name(path)
    try:
        yield fresh
        flush(fresh)
        rename(fresh, path)
    except BaseException:
        with suppress(OSError):
            fresh.unlink(missing_ok=True)
        raise
    flush(path.parent)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write a text as UTF-8, complete or not at all."""
    with atomic_write(path) as fresh:
        fresh.write_text(text, encoding="utf-8")


def write_bytes(path: str | os.PathLike, content: bytes) -> None:
    """Write bytes, complete or not at all."""
    with atomic_write(path) as fresh:
        fresh.write_bytes(content)


def replace_folder(fresh: str | os.PathLike, folder: str | os.PathLike) -> None:
    """Rename a finished folder to `folder`; an older one is removed only after that."""
    fresh, folder = Path(fresh), Path(folder)
    flush_tree(fresh)
    stale = folder.with_name(f".{folder.name}{STALE}")
    shutil.rmtree(stale, ignore_errors=True)
    if folder.exists():
        rename(folder, stale)
    try:
        rename(fresh, folder)
    except OSError:
        if stale.exists():
            rename(stale, folder)
        raise
    flush(folder.parent)
    shutil.rmtree(stale, ignore_errors=True)


@contextmanager
def fresh_folder(folder: str | os.PathLike) -> Iterator[Path]:
    """Yield a hidden folder inside `folder`; it is removed at the end, and so is `folder` if it is new and empty."""
    folder = Path(folder)
    existed = folder.exists()
    make_folder(folder)
    fresh = Path(tempfile.mkdtemp(prefix=".export-", dir=folder))
    try:
        yield fresh
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
        if not existed and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


@contextmanager
def unfinished(folder: str | os.PathLike) -> Iterator[None]:
    """Inside, a new folder is filled; until the end a file says that it is not whole, whatever ends the program.

    What has been there is removed first.
    """
    folder = Path(folder)
    shutil.rmtree(folder, ignore_errors=True)
    make_folder(folder)
    (folder / UNFINISHED).touch()
    flush_tree(folder)
    flush(folder.parent)
    try:
        yield
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)  # a full disk needs the room, and a part is of no use
        raise
    flush_tree(folder)
    (folder / UNFINISHED).unlink()
    flush(folder)


def remove_folder(folder: Path) -> None:
    """Remove a folder under a hidden name: half of it must not look like the whole."""
    hidden = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(hidden, ignore_errors=True)
    rename(folder, hidden)
    shutil.rmtree(hidden)


def replace_files(fresh: Path, folder: Path, names: Iterable[str | os.PathLike]) -> None:
    """Move files from `fresh` to the same places in `folder`, none of them if one is blocked.

    Raises:
        OSError: a folder stands where a file is to go, or a file where a folder is to go.
    """
    places = [Path(name) for name in names]
    for name in places:
        target = folder / name
        if target.is_dir():
            raise IsADirectoryError(errno.EISDIR, "a folder stands where a file is to be written", str(target))
        for parent in name.parents:
            if (folder / parent).exists() and not (folder / parent).is_dir():
                message = "a file stands where a folder is to be made"
                raise NotADirectoryError(errno.ENOTDIR, message, str(folder / parent))
        flush(fresh / name)
    for name in places:
        make_folder((folder / name).parent)
        rename(fresh / name, folder / name)
    for parent in {(folder / name).parent for name in places} | {folder}:
        flush(parent)


def sweep(folder: str | os.PathLike, older_than: float = 0.0) -> list[str]:
    """Remove what a killed program left in `folder`, and return the names.

    The caller holds the folder's lock, or leaves alone what has changed within `older_than` seconds.
    A folder that `replace_folder` has renamed, and whose place is still empty, gets its name back.
    """
    folder, removed = Path(folder), []
    for mark in folder.glob(f"checkpoint-*/{UNFINISHED}"):
        if not older_than or time.time() - mark.lstat().st_mtime >= older_than:
            shutil.rmtree(mark.parent, ignore_errors=True)
            removed.append(mark.parent.name)
    for pattern in LEFTOVERS:
        for path in folder.glob(pattern):
            if older_than and time.time() - path.lstat().st_mtime < older_than:
                continue
            if path.name.endswith(STALE) and path.is_dir():
                place = path.with_name(path.name.removeprefix(".").removesuffix(STALE))
                if not place.exists():
                    rename(path, place)
                    continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                with suppress(OSError):
                    path.unlink()
            removed.append(path.name)
    return removed
