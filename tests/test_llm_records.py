"""Reading data: JSON lines with all their faults, the forms a conversation comes in, splits set apart."""

import json

import pytest

from reslora_diffusion.llm.records import carve, choose, conversations, read_json_lines, read_rows
from reslora_diffusion.problems import BadInput

TALK = [{"role": "user", "content": "1 + 1"}, {"role": "assistant", "content": "2"}]


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


@pytest.mark.parametrize(
    "row",
    [
        {"messages": TALK},
        {"prompt": "1 + 1", "response": "2"},
        {"prompt": "1 + 1", "completion": "2", "messages_of": "others"},
        {"prompt": TALK[:1], "completion": TALK[1:]},
    ],
)
def test_forms_of_a_conversation(row):
    assert conversations([row]) == [TALK]


def test_columns_by_name():
    rows = [{"q": "1 + 1", "a": "2", "messages": "not these"}]
    assert conversations(rows, "q", "a") == [TALK]


def test_faults_of_rows_are_listed_with_their_numbers():
    rows = [
        {"prompt": "a", "response": "b"},
        {"prompt": "a", "response": " "},
        {"prompt": "a", "response": None},
        {"prompt": [{"role": "robot", "content": "a"}], "response": "b"},
        {"prompt": [{"text": "a"}], "response": "b"},
    ]
    with pytest.raises(BadInput) as caught:
        conversations(rows, where="train")
    shown = "\n".join(caught.value.problems)
    assert len(caught.value.problems) == 4
    for part in (
        "row 2: the assistant's text is ' '",
        "row 3: the assistant's text is 'None'",
        "row 4: got role 'robot'",
    ):
        assert part in shown
    with pytest.raises(BadInput, match="does not end with the assistant's turn"):
        conversations([{"messages": TALK[:1]}])
    with pytest.raises(BadInput, match="row 1: the conversation begins with the assistant's turn"):
        conversations([{"messages": [TALK[1], *TALK]}])
    with pytest.raises(BadInput, match="no rows"):
        conversations([])


def test_missing_columns_name_those_that_are_there():
    with pytest.raises(BadInput, match="no 'response' in row 1, 2; row 1 has question, answer") as caught:
        conversations([{"question": "a", "answer": "b"}] * 2)
    assert len(caught.value.problems) == 2


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
