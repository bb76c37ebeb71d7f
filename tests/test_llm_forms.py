"""The formats of a conversation: each is recognised, none is mixed with another, nothing that has a meaning is lost."""

import pytest

from reslora_diffusion.llm.forms import conversations, form_of, tools_of, unread_columns
from reslora_diffusion.utils.problems import BadInput

TALK = [{"role": "user", "content": "1 + 1"}, {"role": "assistant", "content": "2"}]
INSTRUCTION, INPUT = {"prompt": "instruction", "response": "output"}, {"prompt": "input", "response": "output"}
ADD = {"type": "function", "function": {"name": "add", "parameters": {}}}


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


ALPACA = {"instruction": "Add.", "input": "1 and 1", "output": "2", "text": "Below is an instruction ..."}
ADDED = [{"role": "user", "content": "Add.\n\n1 and 1"}, {"role": "assistant", "content": "2"}]


def test_the_input_of_an_instruction_belongs_to_the_prompt():
    assert conversations([ALPACA]) == conversations([ALPACA], INSTRUCTION) == [ADDED]
    dolly = {"instruction": "Add.", "context": "1 and 1", "response": "2", "category": "sums"}
    assert (
        conversations([dolly]) == conversations([dolly], {"prompt": "instruction", "response": "response"}) == [ADDED]
    )
    for empty in ("", " ", None):
        found = conversations([ALPACA, ALPACA | {"input": empty}])
        assert [talk[0]["content"] for talk in found] == ["Add.\n\n1 and 1", "Add."]
    assert conversations([{"prompt": "a", "input": "b", "response": "c"}])[0][0]["content"] == "a"
    assert conversations([ALPACA], INPUT)[0][0]["content"] == "1 and 1"
    assert unread_columns([ALPACA], form_of([ALPACA])) == ["text"]
    assert unread_columns([ALPACA], form_of([ALPACA], INPUT)) == ["instruction", "text"]


def test_a_system_column_is_the_turn_before_the_prompt():
    system = {"role": "system", "content": "Be brief."}
    for name in ("system", "system_prompt"):
        row = {"question": "1 + 1", "response": "2", name: "Be brief."}
        assert conversations([row, row | {name: ""}], {"prompt": "question"}) == [[system, *TALK], TALK]


@pytest.mark.parametrize(
    "row", [{"messages": TALK, "history": [["a", "b"]]}, {"text": "a", "tools": [{"name": "add"}]}]
)
def test_columns_that_would_change_the_conversation_are_not_passed_over(row):
    with pytest.raises(BadInput, match="row 2: got '(tools|history)', which is not read"):
        conversations([row | {name: [] for name in ("tools", "history") if name in row}, row])


def test_columns_by_name():
    rows = [{"q": "1 + 1", "a": "2", "messages": "not these"}]
    assert conversations(rows, {"prompt": "q", "response": "a"}) == [TALK]


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


# ------------------------------------------------------------------------------------------------ the other formats

SHAREGPT = {
    "conversations": [
        {"from": "system", "value": "Be brief."},
        {"from": "human", "value": "1 + 1"},
        {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1, "b": 1}}'},
        {"from": "observation", "value": "2"},
        {"from": "gpt", "value": "2"},
    ],
    "tools": '[{"type": "function", "function": {"name": "add", "parameters": {}}}]',
}


def test_sharegpt_is_messages_in_other_words():
    found = conversations([SHAREGPT])[0]
    assert [turn["role"] for turn in found] == ["system", "user", "assistant", "tool", "assistant"]
    assert found[2]["tool_calls"][0]["function"] == {"name": "add", "arguments": {"a": 1, "b": 1}}
    assert tools_of(found) == tools_of(found[:2]) == [ADD]
    assert form_of([SHAREGPT]).kind == "sharegpt"
    plain = [{"from": "human", "value": "1 + 1"}, {"from": "gpt", "value": "2"}]
    assert conversations([{"dialog": plain, "persona": "Be brief."}], {"conversations": "dialog", "system": "persona"})[
        0
    ] == [{"role": "system", "content": "Be brief."}, *TALK]


@pytest.mark.parametrize("name", ["tools", "functions"])
def test_tools_stay_with_their_conversation(name):
    assert tools_of(conversations([{"messages": TALK, name: [ADD]}])[0]) == [ADD]
    assert tools_of(conversations([{"messages": TALK, name: None}])[0]) is None
    with pytest.raises(BadInput, match="row 1: got tools 'add', which is no JSON"):
        conversations([{"messages": TALK, name: "add"}])


def test_the_history_of_an_instruction_is_turns_before_it():
    found = conversations([ALPACA | {"history": [["a", "b"]]}])[0]
    assert found == [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, *ADDED]
    with pytest.raises(BadInput, match="wanted pairs of question and answer"):
        conversations([ALPACA | {"history": ["a"]}])


def test_a_preference_has_two_conversations():
    for row in (
        {"prompt": "1 + 1", "chosen": "2", "rejected": "3"},
        {"prompt": TALK[:1], "chosen": TALK[1:], "rejected": [{"role": "assistant", "content": "3"}]},
        {"chosen": TALK, "rejected": [*TALK[:1], {"role": "assistant", "content": "3"}]},
    ):
        form = form_of([row])
        assert form.kind == "preference"
        assert conversations([row]) == [TALK]
        assert form.messages(row, rejected=True)[1]["content"] == "3"
        with pytest.raises(BadInput, match="row 1: "):
            conversations([row | {"rejected": " "}])


def test_a_text_is_one_turn_without_a_role():
    assert conversations([{"text": "a b"}]) == [[{"role": "text", "content": "a b"}]]
    assert conversations([{"story": "a b"}], {"text": "story"}) == [[{"role": "text", "content": "a b"}]]
    assert form_of([{"text": "a", "prompt": "b", "response": "c"}]).kind == "response"
    with pytest.raises(BadInput, match="the text's text is ' '"):
        conversations([{"text": " "}])


def test_rows_of_several_formats_are_shown():
    rows = [{"messages": TALK}] * 2 + [{"prompt": "a", "response": "b"}] * 2 + [ALPACA]
    everything = dict.fromkeys(name for row in rows for name in row)
    for given in (rows, [everything | row for row in rows]):  # as lines of JSON, and as `datasets` fills them up
        with pytest.raises(BadInput) as caught:
            conversations(given, where="train")
        first, second = caught.value.problems
        assert first.startswith("train: rows of several formats: row 1 is messages, row 3, 4 response: row 3 is {")
        assert '"prompt": "a"' in first
        assert "row 5 instruction" in second


def test_parts_of_text_are_one_text_and_pictures_are_refused():
    parts = [{"type": "text", "text": "1 + "}, {"type": "text", "text": "1"}]
    assert conversations([{"messages": [{"role": "user", "content": parts}, TALK[1]]}]) == [TALK]
    picture = [{"role": "user", "content": [{"type": "image"}]}, TALK[1]]
    with pytest.raises(BadInput, match="wanted some text"):
        conversations([{"messages": picture}])


def test_a_row_of_which_nothing_is_learned_is_refused():
    with pytest.raises(BadInput, match="no turn of the assistant is to be learned"):
        conversations([{"messages": [TALK[0], TALK[1] | {"weight": 0}]}])


def test_turns_of_another_type_are_refused():
    with pytest.raises(BadInput, match="row 1: got messages 'hello', wanted a list of turns"):
        conversations([{"messages": "hello"}])
