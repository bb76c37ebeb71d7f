"""Arithmetic word problems, generated: what `assets/tiny-llm/` reads in pretraining, and the task it is tuned on.

A problem is a story with numbers a, b, c and a formula over them, written out the way SVAMP writes equations:

    story     Mia has 12 shells. Mia finds 7 more shells. How many shells does Mia have now?
    formula   ("+", "a", "b")  ->  "( 12 + 7 )"  ->  19
    answer    ( 12 + 7 ). The answer is 19.

Two sets that share no sentence:

    PRETRAINING   one story, one question; every number in it is needed
    HELD_OUT      after SVAMP: one story asked in several ways, with a number that is not needed, so that only reading
                  the question tells which numbers to combine and how
"""

import random
from typing import NamedTuple

Formula = tuple | str

NAMES = (
    "Mia Tom Anna Ben Lena Sam Nora Paul Ida Max Emma Leo Zoe Jack Ruby Finn Clara Hugo Rosa Karl Maya Owen Lucy Adam"
).split()
THINGS = (
    "apples shells books pens marbles stamps coins cards buttons stickers cookies balloons stones flowers toys eggs "
    "pears nuts beads rings cups hats keys lamps"
).split()
PLACES = "box bag basket shelf drawer jar crate tray bucket chest".split()


class Template(NamedTuple):
    """One way to tell a problem: text with {a}, {b}, {c}, {name}, {other}, {things} and {place}, and its formula."""

    text: str
    formula: Formula


ADD: Formula = ("+", "a", "b")
SUBTRACT: Formula = ("-", "a", "b")
MULTIPLY: Formula = ("*", "a", "b")
DIVIDE: Formula = ("/", "a", "b")

PRETRAINING = [
    Template("{name} has {a} {things}. {name} finds {b} more {things}. How many {things} does {name} have now?", ADD),
    Template("There are {a} {things} in a {place}. {name} puts in {b} more. How many {things} are there now?", ADD),
    Template("{name} has {a} {things} and {other} has {b} {things}. How many {things} do they have together?", ADD),
    Template("{name} bought {a} {things} on Monday and {b} on Tuesday. How many {things} did {name} buy in all?", ADD),
    Template("A shop sold {a} {things} in the morning and {b} in the evening. What is the total sold?", ADD),
    Template("{name} had {a} {things}. Then {other} gave {name} {b} {things}. How many does {name} have?", ADD),
    Template("What is the sum of {a} and {b}?", ADD),
    Template("Add {b} to {a}.", ADD),
    Template("{name} has {a} {things}. {name} loses {b} of them. How many {things} are left?", SUBTRACT),
    Template("There were {a} {things} in a {place}. {name} took out {b}. How many {things} are still there?", SUBTRACT),
    Template("{name} baked {a} {things} and ate {b}. How many {things} remain?", SUBTRACT),
    Template("{name} has {a} {things}. {other} has {b}. How many more {things} does {name} have?", SUBTRACT),
    Template("A shop had {a} {things} and sold {b} of them. How many {things} does it have left?", SUBTRACT),
    Template("{name} needs {a} {things} and has {b}. How many {things} are missing?", SUBTRACT),
    Template("What is the difference between {a} and {b}?", SUBTRACT),
    Template("Take {b} away from {a}.", SUBTRACT),
    Template("There are {a} rows of {b} {things}. How many {things} are there?", MULTIPLY),
    Template("{name} fills {a} bags with {b} {things} each. How many {things} is that?", MULTIPLY),
    Template("Each {place} holds {b} {things}. {name} has {a} of them. How many {things} are there in all?", MULTIPLY),
    Template("{name} reads {b} pages every day for {a} days. How many pages is that?", MULTIPLY),
    Template("What is {a} times {b}?", MULTIPLY),
    Template("Multiply {a} by {b}.", MULTIPLY),
    Template("{name} shares {a} {things} equally among {b} friends. How many {things} does each friend get?", DIVIDE),
    Template("{a} {things} are put into {b} bags, the same number in each. How many are in each bag?", DIVIDE),
    Template("{name} packs {a} {things} in groups of {b}. How many groups are there?", DIVIDE),
    Template("A rope of {a} meters is cut into {b} equal parts. How long is each part?", DIVIDE),
    Template("What is {a} divided by {b}?", DIVIDE),
    Template("Divide {a} by {b}.", DIVIDE),
    Template(
        "{name} has {a} {things}. {name} finds {b} more and then loses {c}. How many {things} are left?",
        ("-", ADD, "c"),
    ),
    Template(
        "{name} has {a} {things}, {other} has {b} and Kim has {c}. How many {things} do they have together?",
        ("+", ADD, "c"),
    ),
    Template(
        "{name} buys {a} bags of {b} {things} and finds {c} more. How many {things} does {name} have?",
        ("+", MULTIPLY, "c"),
    ),
]


class Story(NamedTuple):
    """A held-out story, a formula that must come out if it is to make sense, and the questions it can be asked:
    (question, formula, SVAMP's `Type`)."""

    body: str
    sense: Formula
    questions: list[tuple[str, Formula, str]]


SUM, DIFFERENCE, PRODUCT, QUOTIENT = "Addition", "Subtraction", "Multiplication", "Common-Division"
HELD_OUT = [
    Story(
        "A farmer keeps {a} hens and {b} ducks in {c} sheds.",
        ("-", "b", "c"),
        [
            ("How many birds does the farmer keep in total?", ADD, SUM),
            ("By how much does the number of hens exceed the number of ducks?", SUBTRACT, DIFFERENCE),
            ("If the hens are spread evenly, how many hens live in each shed?", ("/", "a", "c"), QUOTIENT),
        ],
    ),
    Story(
        "During the school trip {name} took {a} photos while {other} took {b} photos. They later printed {c} of them.",
        ("-", ADD, "c"),
        [
            ("How many photos were taken altogether?", ADD, SUM),
            ("How many fewer photos did {other} take than {name}?", SUBTRACT, DIFFERENCE),
            ("How many of the photos of {name} and {other} were not printed?", ("-", ADD, "c"), DIFFERENCE),
        ],
    ),
    Story(
        "A bus was carrying {a} passengers. At the next stop {b} passengers got off and {c} got on.",
        SUBTRACT,
        [
            ("How many passengers are on the bus now?", ("+", SUBTRACT, "c"), SUM),
            ("How many passengers stayed seated at that stop?", SUBTRACT, DIFFERENCE),
            ("How many passengers went through the doors at that stop?", ("+", "b", "c"), SUM),
        ],
    ),
    Story(
        "{name} ordered {c} pizzas, each cut into {a} slices, for {b} guests.",
        ("-", "b", "c"),
        [
            ("How many slices were served?", ("*", "c", "a"), PRODUCT),
            ("How many more slices are on one pizza than there are pizzas?", ("-", "a", "c"), DIFFERENCE),
            ("How many people ate, if {name} ate with the guests?", ("+", "b", "1"), SUM),
        ],
    ),
    Story(
        "The library lent {a} novels and {b} comics last week. This week it lent {c} novels.",
        ("-", "a", "c"),
        [
            ("How many items were lent last week?", ADD, SUM),
            ("How many more novels were lent last week than this week?", ("-", "a", "c"), DIFFERENCE),
            ("How many novels were lent over the two weeks?", ("+", "a", "c"), SUM),
        ],
    ),
    Story(
        "A ticket costs {c} dollars. {name} paid for {b} tickets with {a} dollars saved from last summer.",
        ("-", "a", "c"),
        [
            ("What was the price of the tickets altogether?", ("*", "c", "b"), PRODUCT),
            ("How many tickets could {name} afford with the savings?", ("/", "a", "c"), QUOTIENT),
            ("How many dollars would be left after paying for one ticket only?", ("-", "a", "c"), DIFFERENCE),
        ],
    ),
    Story(
        "{name} planted {a} tulips and {b} roses, of which {c} roses withered.",
        ("-", "b", "c"),
        [
            ("How many roses survived?", ("-", "b", "c"), DIFFERENCE),
            ("How many plants did {name} plant at first?", ADD, SUM),
            ("How many tulips and roses are alive?", ("-", ADD, "c"), DIFFERENCE),
        ],
    ),
    Story(
        "In a tournament {name} scored {a} points in {c} games, and {other} scored {b} points.",
        ("-", "a", "c"),
        [
            ("How many points per game did {name} score on average?", ("/", "a", "c"), QUOTIENT),
            ("By how many points did {name} beat {other}?", SUBTRACT, DIFFERENCE),
            ("What was their combined score?", ADD, SUM),
        ],
    ),
]
SPLITS = {"train": 700, "validation": 150, "test": 500}  # SVAMP has 700 and 300


def value(formula: Formula, numbers: dict[str, int]) -> int | None:
    """Return the formula's value, or None where the tiny model is not asked to follow: fractions, negative or large."""
    if isinstance(formula, str):
        return numbers[formula] if formula in numbers else int(formula)
    operator, left, right = formula[0], value(formula[1], numbers), value(formula[2], numbers)
    if left is None or right is None:
        return None
    if operator == "+":
        return left + right if left + right <= 120 else None
    if operator == "-":
        return left - right if left > right else None
    if operator == "*":
        return left * right if max(left, right) <= 12 else None
    return left // right if right > 1 and left % right == 0 and left // right <= 12 else None


def equation(formula: Formula, numbers: dict[str, int]) -> str:
    """The formula with its numbers, in SVAMP's spelling: `( ( 12 + 7 ) - 4 )`."""
    if isinstance(formula, str):
        return str(numbers.get(formula, formula))
    return f"( {equation(formula[1], numbers)} {formula[0]} {equation(formula[2], numbers)} )"


def leaves(formula: Formula) -> set[str]:
    return {formula} if isinstance(formula, str) else leaves(formula[1]) | leaves(formula[2])


def draw_numbers(formula: Formula, rng: random.Random, sense: Formula = "a") -> dict[str, int]:
    """Numbers that make both formulas whole numbers, small and large ones about equally often; those that are not
    needed look like the others."""
    while True:
        numbers = {name: rng.randint(2, rng.choice((12, 60, 99))) for name in ("a", "b", "c")}
        whole = value(formula, numbers) is not None and value(sense, numbers) is not None
        if whole and len(set(numbers.values())) == 3:
            return numbers


def words(rng: random.Random) -> dict[str, str]:
    name, other = rng.sample(NAMES, 2)
    return {"name": name, "other": other, "things": rng.choice(THINGS), "place": rng.choice(PLACES)}


def answer(formula: Formula, numbers: dict[str, int]) -> str:
    return f"{equation(formula, numbers)}. The answer is {value(formula, numbers)}."


def pretraining_problem(rng: random.Random) -> tuple[str, str]:
    """A random (question, answer) of the pretraining set."""
    template = rng.choice(PRETRAINING)
    numbers = draw_numbers(template.formula, rng)
    return template.text.format(**numbers, **words(rng)), answer(template.formula, numbers)


def bare_sum(rng: random.Random) -> tuple[str, str]:
    """A (question, answer) without a story: `12 + 7`."""
    formula = rng.choice((ADD, ADD, SUBTRACT, SUBTRACT, MULTIPLY, DIVIDE, ("-", ADD, "c"), ("+", SUBTRACT, "c")))
    numbers = draw_numbers(formula, rng)
    return equation(formula, numbers).removeprefix("( ").removesuffix(" )"), answer(formula, numbers)


def held_out_split(split: str, seed: int = 0) -> list[dict]:
    """Problems in SVAMP's columns; no two of the three splits share a problem."""
    rng = random.Random(f"held out {seed}")
    seen: set[str] = set()
    problems: list[dict] = []
    for name, count in SPLITS.items():
        problems = []
        while len(problems) < count:
            story = rng.choice(HELD_OUT)
            question, formula, kind = rng.choice(story.questions)
            numbers, chosen = draw_numbers(formula, rng, story.sense), words(rng)
            body = story.body.format(**numbers, **chosen)
            question = question.format(**numbers, **chosen)
            if (key := f"{body} {question}") in seen:
                continue
            seen.add(key)
            problems.append(
                {
                    "ID": f"{name}-{len(problems)}",
                    "Body": body,
                    "Question": question,
                    "Equation": equation(formula, numbers),
                    "Answer": str(value(formula, numbers)),
                    "Type": kind,
                }
            )
        if name == split:
            break
    return problems
