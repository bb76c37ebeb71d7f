"""What is kept of a visit comes back after the server was started again; what cannot be read is left out."""

import dataclasses
import json

import pytest
from PIL import Image

pytest.importorskip("gradio", reason="gradio is not installed: pip install '.[app]'")

from app.compare import Cell
from app.measures import measure
from app.output import png
from app.request import Adapter, CompareRequest
from app.saved import SETTINGS, View, open_saved, saved_cells, saved_view
from app.sessions import Session
from app.visits import CURRENT, FIELDS, LIST, MEASURES, MOST, MOST_COMPARISONS, VOTES, Visits
from app.votes import Choice, make_ballot

KEY = "0123456789abcdef" * 2
ADAPTER = Adapter("one", "/somewhere/file.safetensors", "d" * 64)
ASKED = CompareRequest(prompts=("a cat",), seeds=(0, 1, 2), adapters=(ADAPTER,))
TYPED = ["a {", "x = ", "0-", ["one"], "1", True, "", 25, 4.0, "as saved", "steps", "10, ", "nothing more", "", False]


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
    visit.write_rounds([ballot])
    [again] = visit.rounds(ASKED, cells)
    assert (again.votes, again.seen, again.current) == (ballot.votes, [1], ballot.current)
    assert [(p.row, p.first_is_left) for p in again.pairs] == [(p.row, p.first_is_left) for p in ballot.pairs]
    assert visit.rounds(ASKED, cells[:-1]) == [], "an image is missing"
    visit.show(ASKED, cells, "base", View())
    assert visit.rounds(ASKED, cells) == [], "it was on the comparison before"


def test_a_round_of_before_there_could_be_several_is_read(visit):
    cells = cells_of(ASKED)
    visit.show(ASKED, cells, "base", View())
    ballot = make_ballot(ASKED, cells, *ASKED.columns)
    ballot.vote(Choice.TIE)
    visit.write_rounds([ballot])
    [data] = visit.read(visit.current / VOTES)
    visit.write(visit.current / VOTES, data)
    assert [again.votes for again in visit.rounds(ASKED, cells)] == [ballot.votes]


def test_fields_and_files_are_kept(visit, tmp_path):
    (tmp_path / "file").write_bytes(b"weights")
    kept = visit.keep(Adapter("one", str(tmp_path / "file"), "d" * 64))
    (tmp_path / "file").unlink()
    assert visit.adapters() == [kept]
    assert open(kept.path, "rb").read() == b"weights"
    visit.write_fields(TYPED)
    assert visit.fields() == TYPED


def test_the_list_of_adapters_comes_back_as_it_was_left(tmp_path, visit):
    """Names, order, and that one was taken away; what a run has brought since then is there too."""
    one, two, three, four = (Adapter(name, f"/runs/{name}", name[0] * 64) for name in ("one", "two", "three", "four"))
    three = dataclasses.replace(three, sha256="3" * 64)

    def comes(*of_runs: Adapter) -> Session:
        session = Session(tmp_path, visit=Visits(tmp_path / "visits").of(KEY))
        for adapter in of_runs:
            session.add_adapter(adapter)
        session.restore_list([three])
        return session

    session = comes(one, two)
    session.arrange([session.add_adapter(three), dataclasses.replace(two, label="mine")])
    again = comes(one, two, four)
    assert [*again.adapters] == ["three", "mine", "four"]
    assert [adapter.path for adapter in again.adapters.values()] == [three.path, two.path, four.path]
    assert again.removed == {one.sha256}
    again.add_adapter(one)
    again.store_list()
    assert [*comes(one, two, four).adapters] == ["three", "mine", "four", "one"]


@pytest.mark.parametrize("content", ["", "[", "[" * 100_000, "{}", "[1]", json.dumps([*TYPED[:-1], "\ud800"]), "null"])
def test_what_cannot_be_read_is_left_out(visit, content):
    visit.show(ASKED, cells_of(ASKED), "base", View())
    of_comparison = (visit.current / name for name in (SETTINGS, VOTES, MEASURES))
    for name in (FIELDS, CURRENT, LIST, "adapters.json", *of_comparison):
        (visit.folder / name).write_text(content)
    assert visit.fields() is None
    assert visit.rounds(ASKED, cells_of(ASKED)) == []
    assert visit.adapters() == []
    assert visit.listed() == ([], set())
    assert visit.measures(ASKED) == []
    assert visit.history() == []


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


def test_earlier_comparisons_come_back_with_their_round_figures_and_view(visit, tmp_path):
    requests = [dataclasses.replace(ASKED, prompts=(f"cat {n}",)) for n in range(MOST_COMPARISONS + 2)]
    for asked in requests:
        cells = cells_of(asked)
        visit.show(asked, cells, "base", View())
        ballot = make_ballot(asked, cells, *asked.columns)
        ballot.vote(Choice.LEFT)
        visit.write_rounds([ballot])
        visit.write_measures(measure(asked, cells, [], ""), asked)
        visit.write_view(View("Slider", 1, 0, 1))
    visit = Visits(tmp_path / "visits").of(KEY)
    entries = visit.history()
    assert [entry.prompt for entry in entries] == [asked.prompts[0] for asked in requests[:1:-1]]
    assert [entry.current for entry in entries] == [True] + [False] * (MOST_COMPARISONS - 1)
    visit.choose(entries[-1].number)
    request, cells = reopened(visit)
    assert request == requests[2]
    assert len(cells) == 6
    assert [len(ballot.votes) for ballot in visit.rounds(request, cells)] == [1]
    again, fresh = visit.measures(request), measure(request, cells, [], "")
    assert [[str(m.figure(c)) for c in request.columns] for m in again] == [
        [str(m.figure(c)) for c in request.columns] for m in fresh
    ]
    assert str(again[3].paired(*request.columns)) == str(fresh[3].paired(*request.columns)) != "None"
    assert saved_view(open_saved(visit.comparison()).data, request) == View("Slider", 1, 0, 1)
    with pytest.raises(ValueError, match="not stored any more"):
        visit.choose(1)


def test_a_comparison_without_an_image_leaves_no_trace(visit):
    visit.show(ASKED, cells_of(ASKED), "base", View())
    visit.show(ASKED, [], "base", View())
    visit.show(ASKED, [], "base", View())
    assert len(visit.numbers) == 2
    assert len(visit.history()) == 1
