"""Rows of a data set, from local JSON lines or by a `datasets` name; `forms` finds the conversations in them.

    rows = read_rows("data/train.jsonl")               one file; "train.json" is one list of rows
    rows = read_rows("data", "train")                  data/train.jsonl
    rows = read_rows("openai/gsm8k", "train", "main")  anything `datasets.load_dataset` knows

Every bad line of a file is reported, by number and with its text, before anything is read by a model.
"""

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..utils.hub import unreachable
from ..utils.json_lines import lines_of, parse
from ..utils.problems import BadInput, listing, refuse

Row = Mapping[str, Any]
Number = int | str
Messages = list[dict[str, Any]]
SHOWN = 10


def read_json_lines(path: Path) -> list[Row]:
    """Objects of a JSON lines file.

    Raises:
        BadInput: lines that are empty or not JSON objects, each with number and text.
    """
    try:
        lines = lines_of(path.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput([f"{path}: {error}"]) from error
    rows: list[Row] = []
    problems = []
    for number, line in enumerate(lines, start=1):
        try:
            row = parse(line)
        except ValueError as error:
            problems.append(f"{path} line {number}: {error}: {line[:120]!r}")
            continue
        if isinstance(row, dict):
            rows.append(row)
        else:
            problems.append(f"{path} line {number}: got {type(row).__name__}, wanted an object: {line[:120]!r}")
    if not lines:
        problems.append(f"{path} is empty; wanted one JSON object per line")
    if problems:
        more = [f"{path}: {len(problems) - SHOWN} more lines like these"] if len(problems) > SHOWN else []
        raise BadInput(problems[:SHOWN] + more)
    return rows


def read_json_list(path: Path) -> list[Row]:
    """Objects of a file that is one list of them, as LLaMA-Factory and Alpaca have theirs.

    Raises:
        BadInput: it is no such list.
    """
    try:
        rows = parse(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise BadInput([f"{path}: {error}"]) from error
    if not isinstance(rows, list) or not rows:
        raise BadInput([f"{path}: got {type(rows).__name__}, wanted a list of rows; lines of JSON are called .jsonl"])
    bad = [number for number, row in enumerate(rows, 1) if not isinstance(row, dict)]
    if bad:
        raise BadInput(
            [f"{path} row {listing(bad)}: wanted an object, row {bad[0]} is {str(rows[bad[0] - 1])[:120]!r}"]
        )
    return rows


def names_of(source: str | Sequence[str] | None) -> list[str]:
    """The data sets that `--dataset_name` names."""
    return [source] if isinstance(source, str) else list(source or ())


def missing_files(source: str | Sequence[str] | None) -> Iterator[str]:
    """Data sets that could only be on this machine and are not."""
    for name in names_of(source):
        if is_json_lines(name) and not Path(name).exists():
            yield f"--dataset_name {name}: there is no such file, and no such folder with .jsonl files"


def is_json_lines(source: str) -> bool:
    """Return whether a name is JSON lines on this machine, or could be nothing else; `datasets` reads all others."""
    path = Path(source)
    if path.exists():
        return path.is_file() or any(path.glob("*.jsonl"))
    return path.suffix == ".jsonl" or path.is_absolute() or source.startswith(".") or len(path.parts) > 2


def read_rows(
    source: str, split: str = "train", subset: str | None = None, revision: str | None = None
) -> Sequence[Row] | None:
    """Rows of one split, or None if a local source or the data set has no such split.

    Raises:
        BadInput: the source cannot be read.
    """
    path = Path(source)
    if path.is_file():
        reader = read_json_list if path.suffix == ".json" else read_json_lines
        return reader(path) if split == "train" else None
    if path.is_dir() and any(path.glob("*.jsonl")):
        file = path / f"{split}.jsonl"
        return read_json_lines(file) if file.is_file() else None
    refuse(missing_files(source))
    why = None if path.exists() else unreachable()
    try:
        import datasets
    except ImportError as error:
        raise BadInput(
            [f"{source} is no file and no folder with .jsonl files; data sets by name need `pip install datasets`"]
        ) from error
    try:
        return datasets.load_dataset(source, subset, split=split, revision=revision)
    except ValueError as error:
        if f'Unknown split "{split}"' in str(error):
            return None
        raise BadInput([f"{source}: {why or error}"]) from error
    except (OSError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise BadInput([f"{source}: {f'it is not on this machine, and {why}' if why else error}"]) from error


class Numbered(list[Row]):
    """Rows of a split with what they are known by, so that what is wrong is shown where it stands: their number in it,
    behind the data set's name if there are several."""

    def __init__(self, rows: Iterable[Row], numbers: Sequence[Number]) -> None:
        super().__init__(rows)
        self.numbers = numbers


def numbers_of(rows: Sequence[Row]) -> Sequence[Number]:
    return rows.numbers if isinstance(rows, Numbered) else range(1, len(rows) + 1)


def part(rows: Sequence[Row], places: Sequence[int]) -> Numbered:
    """Some rows of a split."""
    numbers = numbers_of(rows)
    return Numbered((rows[i] for i in places), [numbers[i] for i in places])


def joined(parts: Sequence[tuple[str, Sequence[Row]]]) -> Sequence[Row]:
    """The rows of several data sets, one after the other; those of one as they are."""
    if len(parts) == 1:
        return parts[0][1]
    rows = [row for _, those in parts for row in those]
    return Numbered(rows, [f"{number} of {name}" for name, those in parts for number in numbers_of(those)])


def carve(rows: Sequence[Row], fraction: float, seed: int, at_most: int | None = None) -> tuple[Numbered, Numbered]:
    """`(rest, validation)`: a random share of the rows set apart, the same for equal seeds."""
    count = max(1, round(len(rows) * fraction))
    count = min(count, at_most) if at_most else count
    order = random.Random(f"validation {seed}").sample(range(len(rows)), len(rows))
    return part(rows, sorted(order[count:])), part(rows, sorted(order[:count]))


def choose(rows: Sequence[Row], at_most: int | None, seed: int) -> Sequence[Row]:
    """A random choice of the rows, in their order, if there are more than wanted."""
    if at_most is None or len(rows) <= at_most:
        return rows
    return part(rows, sorted(random.Random(f"choice {seed}").sample(range(len(rows)), at_most)))


def column_problems(rows: Sequence[Row], columns: Sequence[str], where: str) -> list[str]:
    """Rows without one of the columns."""
    numbered = list(zip(numbers_of(rows), rows, strict=True))
    problems = []
    for column in columns:
        if lacking := [(number, row) for number, row in numbered if column not in row]:
            number, row = lacking[0]
            rest = listing(n for n, _ in lacking)
            problems.append(f"{where}: no {column!r} in row {rest}; row {number} has {listing(row, 12)}")
    return problems
