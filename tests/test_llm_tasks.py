"""The five reasoning tasks on rows written in each data set's format, and reading answers out of generated text."""

import pytest

from reslora_diffusion.llm.options import LlmOptions
from reslora_diffusion.llm.reading import option_problems
from reslora_diffusion.llm.tasks import (
    TASKS,
    needs_rows,
    normalized,
    read_choice,
    read_number,
    read_short,
    read_text,
    usable,
)
from reslora_diffusion.llm.values import canonical, same
from reslora_diffusion.utils.problems import BadInput

ROWS = {
    "gsm8k": [
        {
            "question": "Ben sold 48 clips in April, and half as many in May. How many did he sell altogether?",
            "answer": "He sold 48/2 = <<48/2=24>>24 clips in May.\nThat is 48+24 = <<48+24=72>>72 clips.\n#### 72",
        },
        {"question": "What does a car of $1,200 cost twice?", "answer": "2*1200=<<2*1200=2400>>2,400\n#### 2,400"},
        {"question": "Colder by 5 than 2?", "answer": "2-5=<<2-5=-3>>-3\n#### -3"},
    ],
    "svamp": [
        {
            "ID": "chal-1",
            "Body": "Each pack of discs costs 76 dollars.",
            "Question": "How much is one with 25 dollars off?",
            "Equation": "( 76.0 - 25.0 )",
            "Answer": "51.0",
            "Type": "Subtraction",
        },
        {
            "ID": "chal-2",
            "Body": "Dan had $ 3 left",
            "Question": "after a $ 2.5 bar. How much had he?",
            "Equation": "( 3.0 + 2.5 )",
            "Answer": "5.5",
            "Type": "Addition",
        },
    ],
    "mathqa": [
        {
            "Problem": "the banker's gain of a sum due 3 years hence at 10 % per annum is rs . 36 . its discount is",
            "Rationale": '"explanation : t = 3 years , r = 10 % , td = ( bg x 100 ) / tr = 12 x 10 = rs . 120"',
            "options": "a ) rs . 400 , b ) rs . 300 , c ) rs . 500 , d ) rs . 120 , e ) none of these",
            "correct": "d",
            "annotated_formula": "divide(multiply(const_100, 36), multiply(3, 10))",
            "linear_formula": "multiply(n2,const_100)|multiply(n0,n1)|divide(#0,#1)|",
            "category": "gain",
        }
    ],
    "metamathqa": [
        {
            "query": "Gracie and Joe choose numbers 1+2i and -1+i. How far apart are they?",
            "response": "The distance is $\\sqrt{(2)^2+(1)^2}=\\sqrt{5}$.\nThe answer is: \\sqrt{5}",
            "type": "MATH_AnsAug",
            "original_question": "...",
        },
        {
            "query": "What is 10 cartons of 11?",
            "response": "It is 10*11 = 110.\n#### 110\nThe answer is: 110",
            "type": "GSM_AnsAug",
            "original_question": "...",
        },
        {
            "query": "Solve.",
            "response": "So x = 5 + 3i.\nThe answer is: 5 + 3i",
            "type": "MATH_SV",
            "original_question": "",
        },
    ],
    "hellaswag": [
        {
            "ind": 24,
            "activity_label": "Roof shingle removal",
            "ctx_a": "A man is sitting on a roof.",
            "ctx_b": "he",
            "ctx": "A man is sitting on a roof. he",
            "endings": ["is using wrap.", "is ripping level tiles off.", "is holding a cube.", "starts pulling up."],
            "source_id": "activitynet~v_-JhWjGDPHMY",
            "split": "val",
            "split_type": "indomain",
            "label": "3",
        }
    ],
    "answers": [
        {"question": "Spell this word backward (example: sun -> nus): bird", "answer": "drib", "metadata": {}},
        {"question": "1 / 4 =", "answer": 0.25},
    ],
}
ANSWERS = {
    "gsm8k": ["72", "2400", "-3"],
    "svamp": ["51", "5.5"],
    "mathqa": ["d"],
    "metamathqa": ["\\sqrt{5}", "110", "5 + 3i"],
    "hellaswag": ["3"],
    "answers": ["drib", "0.25"],
}


@pytest.mark.parametrize("name", TASKS)
def test_responses_state_the_answer_that_is_read_back(name):
    task = TASKS[name]
    rows, unread = usable(task, ROWS[name], name)
    assert (rows, unread) == (ROWS[name], [])
    for row, answer in zip(rows, ANSWERS[name], strict=True):
        user, assistant = task.messages(row)
        assert (user["role"], assistant["role"]) == ("user", "assistant")
        assert assistant["content"].endswith(f"The answer is {answer}.")
        assert task.answer(row) == answer == task.read(assistant["content"])
        assert answer not in user["content"] or name in ("mathqa", "hellaswag")  # which offer their answers


def test_prompts_and_responses():
    def texts(name: str, row: int = 0) -> tuple[str, str]:
        return tuple(message["content"] for message in TASKS[name].messages(ROWS[name][row]))

    assert texts("gsm8k")[1] == "He sold 48/2 = 24 clips in May. That is 48+24 = 72 clips. The answer is 72."
    assert texts("svamp") == (
        "Each pack of discs costs 76 dollars. How much is one with 25 dollars off?",
        "( 76 - 25 ). The answer is 51.",
    )
    assert texts("svamp", 1)[1] == "( 3 + 2.5 ). The answer is 5.5."
    question, answer = texts("mathqa")
    assert "\nThere are 5 options: a ) rs . 400 , b ) rs . 300" in question
    assert question.endswith("\nPlease answer the correct option.")
    assert not answer.startswith('"')
    assert texts("metamathqa", 1)[1] == "It is 10*11 = 110.\nThe answer is 110."
    question, answer = texts("hellaswag")
    assert question.startswith('Here is a sentence to be continued: "')
    assert "There are 4 options as an ending:\n0: " in question
    assert "3: starts pulling up." in question
    assert answer == "The answer is 3."


def test_metamathqa_is_tested_on_gsm8k_and_hellaswag_on_its_labelled_split():
    assert TASKS["metamathqa"].test_task == "gsm8k"
    assert TASKS["hellaswag"].test_split == "validation"
    assert TASKS["mathqa"].validation_split == "validation"
    assert [name for name in TASKS if TASKS[name].validation_split] == ["mathqa"]


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("4 + 5 = 9. The answer is 9.", "9"),
        ("The answer is 3. No: the sum. The answer is 4", "4"),
        ("The answer is: $1,234.50.", "1234.5"),
        ("The answer is -7 degrees.", "-7"),
        ("The answer is 18.0", "18"),
        ("The answer is \N{MINUS SIGN}3.5 degrees", "-3.5"),
        ("The answer is **1,234,567**.", "1234567"),
        ("#### $5, he said", "5"),
        ("so it is so\n#### 2,400", "2400"),
        ("The answer is unknown.", None),
        ("she has 12 left", "12"),
        ("3 and then 4.", "4"),
        ("", None),
        ("The answer is", None),
        ("The answer is 007", "7"),
    ],
)
def test_numbers_in_generated_text(text, answer):
    assert read_number(text) == answer


@pytest.mark.parametrize(
    ("text", "choices", "answer"),
    [
        ("because. The answer is c.", "a-e", "c"),
        ("The answer is b ) 300", "a-e", "b"),
        ("The answer is (d).", "a-e", "d"),
        ("The answer is E.", "a-e", "e"),
        ("The answer is F.", "a-e", None),
        ("The answer is cat.", "a-e", None),
        ("I would say a.", "a-e", None),
        ("The answer is 2.", "0-3", "2"),
        ("The answer is 12.", "0-3", None),
    ],
)
def test_choices_in_generated_text(text, choices, answer):
    assert read_choice(text, choices) == answer


def test_other_answers_keep_their_text():
    assert read_text("x.\nThe answer is \\frac{1}{2}.") == "\\frac{1}{2}"
    assert read_text("The answer is 1,000.") == "1000"
    assert read_text("no answer") is None
    assert normalized("  5  +\n3i. ") == "5 + 3i"


def test_an_unlabelled_split_is_refused_and_a_stray_row_is_left_out():
    unlabelled = [ROWS["hellaswag"][0] | {"label": ""}] * 3
    with pytest.raises(BadInput, match="3 of 3 rows have no readable answer"):
        usable(TASKS["hellaswag"], unlabelled, "test")
    rows = ROWS["gsm8k"] * 40
    rows[7] = {"question": "?", "answer": "it was cut"}
    good, bad = usable(TASKS["gsm8k"], rows, "train")
    assert (len(good), bad) == (len(rows) - 1, [8])


@pytest.mark.parametrize(
    ("answer", "wanted"), [("1,234,567", "1234567"), ("-3", "-3"), ("0.50", "0.5"), ("$5", "5"), (" 12 ", "12")]
)
def test_gsm8k_s_answers_come_back_in_one_spelling(answer, wanted):
    row = {"question": "?", "answer": f"so\n#### {answer}"}
    task = TASKS["gsm8k"]
    assert task.answer(row) == wanted == task.read(task.respond(row))


@pytest.mark.parametrize(("answer", "wanted"), [("145.0", "145"), (-4.0, "-4"), ("0.5", "0.5"), (1e6, "1000000")])
def test_svamp_s_answers_are_numbers_or_their_text(answer, wanted):
    row = ROWS["svamp"][0] | {"Answer": answer}
    task = TASKS["svamp"]
    assert task.answer(row) == wanted == task.read(task.respond(row))


def test_a_worked_solution_without_its_last_sentence_has_no_answer():
    rows = ROWS["metamathqa"] * 40
    rows[5] = rows[5] | {"response": "So it goes."}
    assert usable(TASKS["metamathqa"], rows, "train")[1] == [6]


def test_foreign_columns_are_named():
    with pytest.raises(BadInput, match="no 'Body' in row 1, 2, 3; row 1 has question, answer"):
        usable(TASKS["svamp"], ROWS["gsm8k"], "train")


# ------------------------------------------------------------------------------------------------------- by value


@pytest.mark.parametrize(
    ("answer", "wanted"),
    [
        (r"\frac{1}{2}", "0.5"),
        (r"\dfrac12", "1/2"),
        ("-2/4", r"-\frac{1}{2}"),
        (r"3\frac{1}{2}", "3.5"),
        ("1,000", "1000"),
        ("50\\%", "50"),
        ("x = 5", "5"),
        ("$5$", "5.0"),
        (r"\boxed{12}", "12"),
        (r"\left( 3, \frac{\pi}{2} \right)", r"(3,\frac{\pi}{2})"),
        (r"( 3 , \dfrac{1}{2} )", "(3, 0.5)"),
        (r"2 \sqrt{3}", r"2\sqrt{3}"),
        ("5 + 3i", "5+3i"),
        (r"12\text{ inches}", "12"),
        ("90^\\circ", "90"),
        (r"\text{even}", "even"),
    ],
)
def test_answers_are_compared_by_value(answer, wanted):
    assert same(answer, wanted), (canonical(answer), canonical(wanted))
    assert same(wanted, answer)


@pytest.mark.parametrize(
    ("answer", "wanted"),
    [
        (None, "1"),
        ("1/3", "0.333"),
        ("(1,2)", "(2,1)"),
        ("(1,2)", "[1,2]"),
        ("1,2", "12"),
        (r"\frac{1}{0}", "0"),
        ("even", "odd"),
        ("-5", "5"),
        ("x", "y"),
        ("a", "b"),
        ("1234", "1,2,34"),
        ("9" * 500, "9" * 499 + "8"),
    ],
)
def test_other_answers_are_not_taken_for_equal(answer, wanted):
    assert not same(answer, wanted)


def test_rows_of_your_own_have_no_data_set_to_fall_back_on():
    assert read_short('The word "bird" is "drib".') == "drib"
    assert read_short("The answer is 0.50.") == "0.5"
    assert read_short("...") is None
    assert needs_rows("answers")
    assert not needs_rows("svamp")
    assert not needs_rows("nothing")
    problems = option_problems(LlmOptions(task="answers"))
    assert problems == ["--dataset_name: got nothing, wanted a .jsonl file, a folder with train.jsonl, or a data set"]
    assert not option_problems(LlmOptions(task="svamp"))
