"""Published settings by name: they fill in what is not given, say where they are from, and are listed in the docs."""

from pathlib import Path

import pytest

from reslora_diffusion.diffusion.models.families import FAMILIES
from reslora_diffusion.diffusion.options import parse
from reslora_diffusion.diffusion.options.recipes import RECIPES

DOCS = Path(__file__).parent.parent / "docs" / "recipes.md"


@pytest.mark.parametrize(("name", "kind"), [(name, kind) for name, by in RECIPES.items() for kind in by])
def test_a_recipe_fills_in_what_is_not_given(name, kind):
    options, recipe = parse(["--preset", name]), RECIPES[name][kind]
    options.take_defaults(FAMILIES[kind])
    assert {option: getattr(options, option) for option in recipe.values} == dict(recipe.values)
    assert options.problems == [*options.value_problems()] == []
    assert not FAMILIES[kind].not_here.keys() & recipe.values.keys()
    (note,) = options.notes
    assert recipe.source in note
    options.take_defaults(FAMILIES[kind])
    assert len(options.notes) == 1
    given = parse(["--preset", name, "--learning_rate", "0.5", "--num_train_epochs", "3"])
    given.take_defaults(FAMILIES[kind])
    assert (given.learning_rate, given.num_train_epochs, given.max_train_steps) == (0.5, 3, None)


def test_a_family_without_a_recipe_is_refused():
    options = parse(["--preset", "person"])
    options.take_defaults(FAMILIES["QwenImagePipeline"])
    assert options.problems == [
        "--preset person: no recipe for Qwen-Image is known; wanted other options, or another model"
    ]


def test_the_docs_list_every_recipe():
    text = DOCS.read_text(encoding="utf-8")
    for name, by in RECIPES.items():
        for recipe in by.values():
            (row,) = [line for line in text.splitlines() if recipe.source in line and line.startswith(f"| {name} |")]
            for option, value in recipe.values.items():
                assert f"`--{option}`" in row or f"`--{option} {value}`" in row
