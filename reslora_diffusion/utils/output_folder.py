"""An output folder belongs to one run at a time.

with alone_in(output_dir):
    ...                        train, save, export

POSIX locks the folder itself. Windows locks no folders: there a file among the temporary ones stands for it.
"""

import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from .files import make_folder, sweep
from .problems import BadInput

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None  # type: ignore[assignment]  # asked for before each use


@contextmanager
def alone_in(output_dir: Path) -> Iterator[None]:
    """Inside, no other run may write to the folder: each would remove what the other has begun. What a killed run left
    unfinished is removed first. A folder that was made for this run, and that nothing was written to, is removed.

    Raises:
        BadInput: another one does.
    """
    if os.environ.get("RANK", "0") != "0":  # of several processes one holds it for all
        yield
        return
    made = not output_dir.exists()
    make_folder(output_dir)
    try:
        release = lock(output_dir)
    except BlockingIOError:
        raise BadInput([f"--output_dir: another run is writing to {output_dir}; wanted another folder"]) from None
    try:
        for place in (output_dir, output_dir / "kohya", *output_dir.glob("samples/step-*")):
            sweep(place)
        yield
    finally:
        if made and output_dir.is_dir() and not any(output_dir.iterdir()):
            output_dir.rmdir()
        release()


def lock(folder: Path) -> Callable[[], None]:
    """Hold a folder; returns what releases it.

    Raises:
        BlockingIOError: another process holds it.
    """
    if fcntl is None:
        from filelock import FileLock, Timeout  # torch needs it too

        name = hashlib.sha256(os.path.normcase(folder.resolve()).encode()).hexdigest()[:24]
        file = FileLock(Path(tempfile.gettempdir(), f"reslora-{name}.lock"))
        try:
            file.acquire(timeout=0)
        except Timeout as held:
            raise BlockingIOError(str(held)) from None
        return file.release
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise
    except OSError:  # a file system without locks
        pass
    return lambda: os.close(descriptor)
