"""An output folder belongs to one run at a time.

with alone_in(output_dir):
    ...                        train, save, export
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .files import make_folder, sweep
from .problems import BadInput

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None  # type: ignore[assignment]  # asked for before each use


@contextmanager
def alone_in(output_dir: Path) -> Iterator[None]:
    """Inside, no other run may write to the folder: each would remove what the other has begun. What a killed run left
    unfinished is removed first. A folder that was made for this run, and that nothing was written to, is removed.

    Raises:
        BadInput: another one does.
    """
    if fcntl is None or os.environ.get("RANK", "0") != "0":  # of several processes one holds it for all
        yield
        return
    made = not output_dir.exists()
    make_folder(output_dir)
    held = os.open(output_dir, os.O_RDONLY)
    try:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BadInput([f"--output_dir: another run is writing to {output_dir}; wanted another folder"]) from None
        except OSError:  # a file system without locks
            pass
        for place in (output_dir, output_dir / "kohya", *output_dir.glob("samples/step-*")):
            sweep(place)
        yield
    finally:
        if made and output_dir.is_dir() and not any(output_dir.iterdir()):
            output_dir.rmdir()
        os.close(held)
