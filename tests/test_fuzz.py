"""Strangers' files at every door: a value, or one error of the product's own kind, soon and within little memory.

`make fuzz SECONDS=3600` looks for new ones; what it finds is put into `tests/corpus/` and stays there. Here a fixed
choice is tried, which no chance can change.
"""

import os
import time
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings

from fuzz_doors import doors
from fuzzing import SECONDS, Door, TooMuch, budget, pass_through

pytestmark = pytest.mark.filterwarnings("ignore")  # libraries warn of what is damaged
CORPUS = Path(__file__).parent / "corpus"
EXAMPLES = 40  # at each door; a tenth where one takes long
NAMES = (
    "read inspect verify verify-on-a-base convert-to-diffusers convert-to-kohya convert-to-peft merge resize "
    "embeddings-of-new-tokens options-of-the-image-trainer checked-options-of-the-image-trainer "
    "options-of-the-language-trainer "
    "options-of-other-programs concepts a-folder-of-images images-to-train-on a-dataset-of-images conversations "
    "glue-files word-problems a-run-as-the-page-shows-it a-checkpoint-of-the-image-trainer "
    "a-checkpoint-of-the-language-trainer a-run-to-export a-pipeline a-pipeline-to-check-against a-language-model "
    "a-saved-comparison an-image-on-the-page a-kept-visit fields-of-the-page a-training-from-the-page"
).split()
QUIET = settings(
    deadline=None, database=None, phases=[Phase.explicit, Phase.generate], suppress_health_check=list(HealthCheck)
)


@cache
def at() -> tuple[dict[str, Door], Path]:
    """Every door, and a folder for what they read."""
    root = Path(mkdtemp(prefix="fuzz-"))
    (root / "out").mkdir()
    return doors(root / "out"), root / "files"


def test_every_door_is_tried():
    assert [*at()[0]] == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_whatever_a_stranger_hands_in(name):
    found, folder = at()
    door, tried = found[name], []

    @seed(0)
    @settings(QUIET, max_examples=EXAMPLES // 10 if door.slow else EXAMPLES)
    @given(door.files)
    def one(files):
        tried.append(pass_through(door, files, folder))

    one()
    assert len(tried) > 1, "the door was never tried"


@pytest.mark.parametrize("case", sorted(path.relative_to(CORPUS).as_posix() for path in CORPUS.glob("*/*")))
def test_what_once_failed(case):
    found, folder = at()
    paths = [path for path in (CORPUS / case).rglob("*") if path.is_file()]
    files = {path.relative_to(CORPUS / case).as_posix(): path.read_bytes() for path in paths}
    assert pass_through(found[case.split("/")[0]], files, folder), "it was read, or refused with a message"


def busy() -> None:
    end = time.process_time() + 1.1 * SECONDS
    while time.process_time() < end:
        pass


@pytest.mark.parametrize(("cost", "unit"), [(busy, "seconds"), (lambda: os.urandom(1) * 3 * 10**8, "MiB")])
def test_the_budget_notices(cost, unit):
    with pytest.raises(TooMuch, match=unit), budget():
        cost()
