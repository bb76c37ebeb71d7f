"""The server remembers each visitor apart from every other visitor.

Images are served as files with random names out of one folder per session, itself randomly named: an address says
nothing about what is behind it, and cannot be guessed.
"""

import secrets
import shutil
import threading
import time
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from .compare import Cell
from .foreign import shortened
from .images import read_image
from .measures import Measure
from .output import png
from .request import Adapter, CompareRequest, Limits
from .runs import RunFolder
from .saved import View
from .visits import Visit
from .votes import Ballot

MAX_LABEL = Limits().label_characters
MAX_SESSIONS = 64
MAX_THUMBNAILS = 600  # files kept of samples of runs
THUMBNAIL_SIDE = 384


@dataclass
class Session:
    folder: Path
    base: str | None = None  # label of the chosen base; None is the one that the page was started with
    adapters: dict[str, Adapter] = field(default_factory=dict)  # by label; what this visitor may choose from
    removed: set[str] = field(default_factory=set)  # digests of adapters that this visitor took away
    request: CompareRequest | None = None
    cells: list[Cell] = field(default_factory=list)
    view: View = field(default_factory=View)
    ballot: Ballot | None = None
    earlier: list[Ballot] = field(default_factory=list)  # rounds before it on the same comparison, with their votes
    references: list[Path] = field(default_factory=list)  # this visitor's own images to vote by
    measured: list[Measure] = field(default_factory=list)  # of the cells that are shown now
    measured_with: tuple | None = None  # values of the Measures tab's fields then; None after a reload
    addresses: dict[int, str] = field(default_factory=dict)  # id of a cell -> its file
    cancel: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)
    keeping: threading.Lock = field(default_factory=threading.Lock)  # held while values of the fields are stored
    turn: threading.Lock = field(default_factory=threading.Lock)  # held by events that change the session
    answered: dict[Hashable, float] = field(default_factory=dict)  # by output: the page's clock at its latest event
    shown: dict[Hashable, float] = field(default_factory=dict)  # by output: the same of the event that it is to show
    waits: bool = False  # a comparison was asked for, and has not begun
    generates: bool = False
    asked_at: float = 0.0  # the server's clock, when the last comparison was asked for
    drawn: dict[str, tuple[list[RunFolder], float]] = field(default_factory=dict)  # by tab: runs of curves, smoothing
    thumbnails: dict[tuple[Path, int], str] = field(default_factory=dict)  # address by file and time of its writing
    visit: Visit | None = None  # where it is kept beyond this session
    arrived: bool = False  # the fields are those of this visit, and changes of them are kept
    brought: list[tuple[str, str]] = field(default_factory=list)  # adapters that joined: a random mark, a name
    wanted: list[str] = field(default_factory=list)  # adapters that were chosen before a reload, here or not yet
    training: Path | None = None  # folder of the training that is looked at; None is the newest
    training_seen: tuple | None = None  # what the page last showed of it
    file: tuple[Path, str] | None = None  # the adapter whose card is shown, and its label

    def has_later(self, output: Hashable, when: float) -> bool:
        """Tell whether an output, by its id, shows the answer to an event that was triggered after `when`."""
        return self.answered.get(output, 0.0) > when

    def shows(self, output: Hashable, when: float, anyway: bool = False) -> bool:
        """Take in an answer to an event of `when`; it is shown unless there is one to a later event, or anyway."""
        with self.lock:
            if self.has_later(output, when) and not anyway:
                return False
            self.answered[output], self.shown[output] = max(when, self.answered.get(output, 0.0)), when
            return True

    def ask(self) -> None:
        """A comparison is asked for, and may have to wait for those of others: stop the one that runs."""
        self.abandon()
        self.waits, self.asked_at = True, time.monotonic()

    def abandon(self) -> None:
        """Stop the comparison that runs: another one is to be looked at."""
        self.cancel.set()
        self.cancel = threading.Event()

    def begin(self, request: CompareRequest) -> threading.Event:
        """Its turn has come: forget the last one's images. It may have been stopped while it waited."""
        if not self.waits:
            self.ask()
        self.waits = False
        self.show(request, [])
        return self.cancel

    def show(self, request: CompareRequest, cells: Sequence[Cell]) -> None:
        self.request, self.cells, self.addresses, self.measured = request, [], {}, []
        self.view = self.view.turned_to(request)
        for file in self.folder.glob("images/*.png"):
            file.unlink()
        for cell in cells:
            self.add(cell)

    def add(self, cell: Cell) -> None:
        self.measured = []
        self.cells.append(cell)
        self.addresses[id(cell)] = self.address(cell.image)

    def begin_round(self, ballot: Ballot) -> None:
        """The votes of the round before are kept, if they are on this comparison."""
        before = [*self.earlier, self.ballot] if self.ballot else []
        self.earlier = [old for old in before if old.votes and old.request is ballot.request]
        self.ballot = ballot

    def address(self, image: Image.Image, folder: str = "images") -> str:
        """A new file of the image, under a name that says nothing."""
        path = self.folder / folder / f"{secrets.token_hex(12)}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(png(image))
        return f"/gradio_api/file={path}"

    def thumbnail(self, path: Path, side: int = THUMBNAIL_SIDE) -> str | None:
        """A small copy of an image of a run; None while it cannot be read, such as half-way through its writing."""
        try:
            key = (path, path.stat().st_mtime_ns)
            if key not in self.thumbnails:
                small = read_image(path, side)
                if len(self.thumbnails) >= MAX_THUMBNAILS:
                    oldest = self.thumbnails.pop(next(iter(self.thumbnails)))
                    Path(oldest.partition("=")[2]).unlink(missing_ok=True)
                self.thumbnails[key] = self.address(small, "samples")
        except (OSError, ValueError):
            return None
        return self.thumbnails[key]

    def add_adapter(self, adapter: Adapter) -> Adapter:
        """Take a file in; one whose label is taken by another file gets a number."""
        label, number = adapter.label, 2
        while label in self.adapters and self.adapters[label].sha256 != adapter.sha256:
            label, number = f"{shortened(adapter.label, MAX_LABEL - 5)} {number}", number + 1
        self.adapters[label] = Adapter(label, adapter.path, adapter.sha256)
        self.removed.discard(adapter.sha256)
        return self.adapters[label]

    def arrange(self, adapters: Sequence[Adapter]) -> None:
        """Offer these, in this order; those of before that are not among them were taken away."""
        self.removed |= {adapter.sha256 for adapter in self.adapters.values()} - {a.sha256 for a in adapters}
        self.adapters = {adapter.label: adapter for adapter in adapters}
        self.store_list()

    def store_list(self) -> None:
        if self.visit:
            self.visit.write_list([*self.adapters.values()], self.removed)

    def restore_list(self, at_hand: Sequence[Adapter]) -> None:
        """Offer adapters as the visit left them; `at_hand` are files that may be among them. Adapters that the visit
        does not know come last."""
        pairs, removed = self.visit.listed()
        paths = {adapter.sha256: adapter.path for adapter in at_hand} | self.paths
        known = {digest for digest, _ in pairs} | removed
        others = [adapter for adapter in self.adapters.values() if adapter.sha256 not in known]
        self.adapters = {}
        for adapter in (*(Adapter(label, paths[d], d) for d, label in pairs if d in paths), *others):
            self.add_adapter(adapter)
        self.removed = removed

    @property
    def paths(self) -> dict[str, str]:
        return {adapter.sha256: adapter.path for adapter in self.adapters.values()}


class Sessions:
    """Visitors by the key their browser page came with."""

    def __init__(self, root: Path, adapters: Sequence[Adapter] = ()):
        self.root = root
        self.adapters = adapters
        self.open: dict[str, Session] = {}
        self.lock = threading.Lock()

    def of(self, key: str) -> Session:
        with self.lock:
            if key not in self.open:
                if len(self.open) >= MAX_SESSIONS:
                    self.drop(next(iter(self.open)))
                folder = self.root / secrets.token_hex(16)
                folder.mkdir(parents=True)
                self.open[key] = Session(folder)
                for adapter in self.adapters:
                    self.open[key].add_adapter(adapter)
            self.open[key] = self.open.pop(key)  # most recently seen last
            return self.open[key]

    def ahead(self, session: Session) -> int:
        """Comparisons of others that come before the one that a session waits for."""
        with self.lock:
            others = [other for other in self.open.values() if other is not session]
        return sum((other.generates or other.waits) and other.asked_at < session.asked_at for other in others)

    def close(self, key: str) -> None:
        with self.lock:
            if key in self.open:
                self.drop(key)

    def drop(self, key: str) -> None:
        session = self.open.pop(key)
        session.cancel.set()
        shutil.rmtree(session.folder)
