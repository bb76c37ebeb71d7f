"""What is kept of a visit comes back after the server was started again; what cannot be read is left out."""

import json

import pytest
from PIL import Image

pytest.importorskip("gradio", reason="gradio is not installed: pip install '.[app]'")

from app.compare import Cell
from app.output import png
from app.request import Adapter, CompareRequest
from app.saved import View, open_saved, saved_cells
from app.visits import FIELDS, MOST, VOTES, Visits
from app.votes import Choice, make_ballot

KEY = "0123456789abcdef" * 2
ADAPTER = Adapter("one", "/somewhere/file.safetensors", "d" * 64)
ASKED = CompareRequest(prompts=("a cat",), seeds=(0, 1, 2), adapters=(ADAPTER,))
TYPED = ["a {", "x = ", "0-", ["one"], "1", True, "", 25, 4.0, "as saved"]


def cells_of(request: CompareRequest) -> list[Cell]:
    return [
        Cell(row, column, Image.new("RGB", (8, 8), (row.seed, 90 * j, 0)), column.label, 0.5)
        for row in request.rows
        for j, column in enumerate(request.columns)
    ]


@pytest.fixture
def visit(tmp_path):
    return Visits(tmp_path / "visits").of(KEY)


def reopened(visit) -> tuple[CompareRequest, list[Cell]]:
    saved = open_saved(visit.comparison())
    request = CompareRequest.from_dict(saved.data, {ADAPTER.sha256: ADAPTER.path})
    return request, saved_cells(saved.data, request, saved.read)


def test_each_image_is_kept_as_it_is_made(visit, tmp_path):
    cells = cells_of(ASKED)
    visit.show(ASKED, [], "base", View())
    for count in range(len(cells) + 1):
        if count:
            visit.add(ASKED, cells[:count], "base", View())
        request, found = reopened(Visits(tmp_path / "visits").of(KEY))
        assert request == ASKED
        assert [png(cell.image) for cell in found] == [png(cell.image) for cell in cells[:count]]


def test_a_round_goes_on_where_it_was(visit):
    cells = cells_of(ASKED)
    visit.show(ASKED, cells, "base", View())
    ballot = make_ballot(ASKED, cells, *ASKED.columns)
    ballot.vote(Choice.LEFT)
    ballot.seen.append(1)
    visit.write_ballot(ballot)
    again = visit.ballot(ASKED, cells)
    assert (again.votes, again.seen, again.current) == (ballot.votes, [1], ballot.current)
    assert [(p.row, p.first_is_left) for p in again.pairs] == [(p.row, p.first_is_left) for p in ballot.pairs]
    assert visit.ballot(ASKED, cells[:-1]) is None, "an image is missing"
    visit.show(ASKED, cells, "base", View())
    assert visit.ballot(ASKED, cells) is None, "it was on the comparison before"


def test_fields_and_files_are_kept(visit, tmp_path):
    (tmp_path / "file").write_bytes(b"weights")
    kept = visit.keep(Adapter("one", str(tmp_path / "file"), "d" * 64))
    (tmp_path / "file").unlink()
    assert visit.adapters() == [kept]
    assert open(kept.path, "rb").read() == b"weights"
    visit.write_fields(TYPED)
    assert visit.fields() == TYPED


@pytest.mark.parametrize("content", ["", "[", "[" * 100_000, "{}", "[1]", json.dumps([*TYPED[:-1], "\ud800"]), "null"])
def test_what_cannot_be_read_is_left_out(visit, content):
    for name in (FIELDS, VOTES, "adapters.json"):
        (visit.folder / name).write_text(content)
    assert visit.fields() is None
    assert visit.ballot(ASKED, cells_of(ASKED)) is None
    assert visit.adapters() == []
    assert visit.comparison() == []


@pytest.mark.parametrize("key", ["", None, 3, "../" * 10 + "ab", KEY.upper(), KEY + "0", f"{KEY}\n"])
def test_only_a_key_opens_a_visit(tmp_path, key):
    assert Visits(tmp_path).of(key) is None
    assert list(tmp_path.iterdir()) == []


def test_visits_do_not_meet_and_the_oldest_go(tmp_path):
    visits = Visits(tmp_path)
    folders = [visits.of(f"{number:032x}").folder for number in range(MOST + 3)]
    assert len(set(folders)) == MOST + 3
    assert len(list(tmp_path.iterdir())) == MOST
    assert folders[-1].is_dir()
    assert KEY not in str(visits.of(KEY).folder), "the disk does not give a key away"
    assert Visits(None).of(KEY) is None
