"""Pipelines that visitors may choose from, and the one or two of them that are in memory.

    choices()    label -> where it is: the pipeline that the page was started with, pipelines and single-file
                 checkpoints below the folders of --bases, pipelines in the hub's local cache
    get(label)   its Comparer; the pipeline unused for longest leaves the memory for it

No path comes from the page: a visitor chooses a label. A base that cannot be loaded leaves the others as they were.
"""

import threading
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from huggingface_hub import scan_cache_dir
from huggingface_hub.errors import CacheNotFound

from reslora_diffusion.export.single_file import read_single_file
from reslora_diffusion.utils.problems import BadInput

from .compare import Comparer, load_pipeline
from .foreign import printable

MOST_LOADED = 2


class Bases:
    """The bases that the page offers, of which a few are loaded at a time.

    Args:
        name: label of the first base.
        source: where it is, a folder or a name of the hub.
        comparer: of it, loaded.
        folders: where others are looked for.
    """

    def __init__(
        self, name: str, source: str | Path, comparer: Comparer, folders: Sequence[Path] = (), device: str = "cpu"
    ) -> None:
        self.first, self.first_source, self.folders, self.device = name, source, tuple(folders), device
        self.loaded = {name: comparer}  # the most recently used last
        self.lock = threading.Lock()

    def choices(self) -> dict[str, str | Path]:
        found: dict[str, str | Path] = {self.first: self.first_source}
        for folder in self.folders:
            for path in sorted({index.parent for index in folder.rglob("model_index.json")} | checkpoints(folder)):
                label = printable(path.relative_to(folder).as_posix() if path != folder else folder.name)
                found.setdefault(label, path)
        for name in names_in_cache():
            found.setdefault(name, name)
        return found

    def get(self, label: str | None = None) -> Comparer:
        """
        Raises:
            ValueError: the label is unknown, or the pipeline cannot be loaded.
        """
        label = label or self.first
        with self.lock:
            if label not in self.loaded:
                self.loaded[label] = self.load(label)
                for oldest in list(self.loaded)[:-MOST_LOADED]:
                    del self.loaded[oldest]
            self.loaded[label] = self.loaded.pop(label)
            return self.loaded[label]

    def load(self, label: str) -> Comparer:
        source = self.source(label)
        try:
            comparer = Comparer(load_pipeline(source, self.device))
            comparer.warm_up()
        except Exception as error:  # a library's, of any kind: it is the file's fault, and the page goes on
            raise ValueError(f"The base {label} cannot be loaded: {printable(error).splitlines()[0]}") from None
        return comparer

    def source(self, label: str | None = None) -> str | Path:
        """Find where a base is.

        Raises:
            ValueError: the label is unknown.
        """
        choices = self.choices()
        if (label or self.first) not in choices:
            raise ValueError(f"There is no base {label} any more.")
        return choices[label or self.first]


def checkpoints(folder: Path) -> set[Path]:
    """Whole models in one file; a folder of a pipeline has parts of one."""
    files = (path for path in folder.rglob("*.safetensors") if not (path.parent.parent / "model_index.json").is_file())
    return {path for path in files if is_checkpoint(path, path.stat().st_mtime_ns)}


@lru_cache(maxsize=4096)
def is_checkpoint(path: Path, written: int) -> bool:
    """Read once for each time at which the file was written: a folder may hold hundreds."""
    try:
        read_single_file(path)
    except BadInput:
        return False
    return True


def names_in_cache() -> list[str]:
    """Pipelines that the hub's local cache holds."""
    try:
        repositories = scan_cache_dir().repos
    except (CacheNotFound, OSError):
        return []
    return sorted(
        repository.repo_id
        for repository in repositories
        if any(file.file_name == "model_index.json" for revision in repository.revisions for file in revision.files)
    )
