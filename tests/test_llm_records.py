"""Reading data: JSON lines with all their faults, splits set apart."""

import json

import pytest

from reslora_diffusion.llm.forms import conversations
from reslora_diffusion.llm.records import carve, choose, read_json_lines, read_rows
from reslora_diffusion.utils.problems import BadInput


def write(path, *lines: str):
    path.write_text("\n".join(lines) + "\n")
    return path


def test_lines_are_read_in_order_with_or_without_a_byte_order_mark(tmp_path):
    rows = [{"prompt": "ä", "response": "1"}, {"prompt": "b", "response": "2"}]
    file = write(tmp_path / "data.jsonl", *(json.dumps(row, ensure_ascii=False) for row in rows))
    assert read_json_lines(file) == rows
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert read_json_lines(file) == rows
    assert read_rows(str(file)) == rows
    assert read_rows(str(file), "test") is None


def test_every_bad_line_is_shown_with_its_number(tmp_path):
    file = write(tmp_path / "data.jsonl", '{"prompt": "a"}', "", '{"prompt": "b"', "[1, 2]", '{"prompt": "c"}', "nope")
    with pytest.raises(BadInput) as caught:
        read_json_lines(file)
    assert len(caught.value.problems) == 4
    for number, text in ((2, "empty"), (3, "column 15"), (4, "got list, wanted an object"), (6, "nope")):
        assert any(f"line {number}:" in problem and text in problem for problem in caught.value.problems)


def test_only_a_line_feed_ends_a_line(tmp_path):
    rows = [{"prompt": f"a{mark}b", "response": "c"} for mark in "\u2028\u2029\x85"]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    file = tmp_path / "data.jsonl"
    for end in ("\n", "\r\n"):
        file.write_text(end.join(lines) + end, encoding="utf-8", newline="")
        assert read_json_lines(file) == rows
    file.write_text("\n".join(lines) + "\n\n  \n", encoding="utf-8")
    assert read_json_lines(file) == rows


def test_lines_that_json_itself_gives_up_on(tmp_path):
    file = write(tmp_path / "data.jsonl", '{"a": ' + "9" * 5000 + "}", '{"a": ' + "[" * 100_000)
    with pytest.raises(BadInput) as caught:
        read_json_lines(file)
    assert ["digits" in caught.value.problems[0], "nested too deeply" in caught.value.problems[1]] == [True, True]
    with pytest.raises(BadInput, match="row 1: the user's text has half of a surrogate pair"):
        conversations([json.loads('{"prompt": "\\ud800", "response": "b"}')])


def test_a_list_of_rows_is_read_too(tmp_path):
    rows = [{"instruction": "a", "output": "b"}, {"instruction": "c", "output": "d"}]
    file = tmp_path / "rows.json"
    file.write_text(json.dumps(rows, indent=2))
    assert read_rows(str(file)) == rows
    for content, message in (
        ('{"a": 1}', "got dict, wanted a list"),
        ("[1]", "row 1: wanted an object"),
        ("[", "JSON"),
    ):
        file.write_text(content)
        with pytest.raises(BadInput, match=message):
            read_rows(str(file))


def test_many_bad_lines_are_counted(tmp_path):
    with pytest.raises(BadInput, match="15 more lines like these"):
        read_json_lines(write(tmp_path / "data.jsonl", *["{"] * 25))


def test_empty_missing_and_binary_files(tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe\x00")
    for name, message in (("empty", "is empty"), ("binary", "utf-8"), ("missing", "No such file")):
        with pytest.raises(BadInput, match=message):
            read_json_lines(tmp_path / f"{name}.jsonl")


def test_a_folder_holds_one_file_per_split(tmp_path):
    write(tmp_path / "train.jsonl", '{"a": 1}')
    write(tmp_path / "test.jsonl", '{"a": 2}')
    assert read_rows(str(tmp_path), "test") == [{"a": 2}]
    assert read_rows(str(tmp_path), "validation") is None


def test_what_datasets_knows_is_read_by_its_name(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list([{"prompt": "a", "response": "b"}]).to_parquet(tmp_path / "train.parquet")
    rows = read_rows(str(tmp_path), "train")
    assert list(rows) == [{"prompt": "a", "response": "b"}]
    assert read_rows(str(tmp_path), "test") is None


def test_a_path_that_is_not_there_is_not_looked_for_elsewhere(tmp_path):
    for source in ("data.jsonl", "./data", str(tmp_path / "data")):
        with pytest.raises(BadInput, match="no such file"):
            read_rows(source)


def test_a_share_is_set_apart_the_same_for_equal_seeds():
    rows = [{"i": i} for i in range(100)]
    rest, validation = carve(rows, 0.1, seed=3)
    assert (len(rest), len(validation)) == (90, 10)
    assert sorted(row["i"] for row in rest + validation) == list(range(100))
    assert carve(rows, 0.1, seed=3) == (rest, validation)
    assert carve(rows, 0.1, seed=4) != (rest, validation)
    assert len(carve(rows, 0.1, 3, at_most=2)[1]) == 2
    assert choose(rows, None, 0) is rows
    assert choose(rows, 5, 0) == choose(rows, 5, 0)
    assert len(choose(rows, 5, 0)) == 5
