"""A disk that loses its power: what would be left of a folder if nothing but what was flushed had arrived.

    with Disk(root, look) as disk:      `look` is called before and after everything that is done to files
        ...
    disk.left(place, names)             rebuilds the folder as it would be found

A file holds what it held at its last fsync, and nothing if there was none. A folder has the entries of its last fsync;
with `names` it has those of now, since a file system may write names before contents.
"""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

WATCHED = ("fsync", "replace", "rename", "unlink", "rmdir", "mkdir")


class Disk:
    def __init__(self, root: Path, look: Callable[[], None]) -> None:
        self.root, self.look = root, look
        self.contents: dict[int, bytes] = {}
        self.entries: dict[int, dict[str, int]] = {}
        self.held: list[int] = []  # so that no number of a file is given to another
        self.looking = False

    def __enter__(self) -> Self:
        self.before = {name: getattr(os, name) for name in WATCHED}
        for name in WATCHED:
            setattr(os, name, self.watched(name))
        self.flushed(os.open(self.root, os.O_RDONLY))
        return self

    def __exit__(self, *error: object) -> None:
        for name, function in self.before.items():
            setattr(os, name, function)
        for descriptor in self.held:
            os.close(descriptor)

    def watched(self, name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.see()
            result = self.before[name](*args, **kwargs)
            if name == "fsync" and not self.looking:
                self.flushed(args[0])
            self.see()
            return result

        return call

    def see(self) -> None:
        if not self.looking:
            self.looking = True
            self.look()
            self.looking = False

    def flushed(self, descriptor: int) -> None:
        """A file or folder is on the disk as it is now."""
        path, number = Path(os.readlink(f"/proc/self/fd/{descriptor}")), os.fstat(descriptor).st_ino
        self.held.append(os.dup(descriptor))
        if path.is_dir():
            self.entries[number] = {entry.name: entry.inode() for entry in os.scandir(path)}
        else:
            self.contents[number] = path.read_bytes()

    def left(self, place: Path, names: bool = False) -> Path:
        """The folder as it would be found, at `place`."""
        shutil.rmtree(place, ignore_errors=True)
        self.rebuild(self.root.stat().st_ino, self.root if names else None, place)
        return place

    def rebuild(self, number: int, now: Path | None, place: Path) -> None:
        place.mkdir(parents=True)
        found = {e.name: e.inode() for e in os.scandir(now)} if now else self.entries.get(number, {})
        for name, inner in found.items():
            if (now / name).is_dir() if now else inner in self.entries:
                self.rebuild(inner, now / name if now else None, place / name)
            else:
                (place / name).write_bytes(self.contents.get(inner, b""))
