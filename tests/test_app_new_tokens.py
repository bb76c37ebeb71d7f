"""The page reads the new tokens that lie beside an adapter, in the columns of that adapter alone."""

import numpy as np
import pytest
import torch

from app.compare import Comparer
from app.request import CompareRequest
from app_fixtures import make_lora_file, make_pipeline
from reslora_diffusion.export.embeddings import write_embeddings

STEPS = 2


def pixels(image):
    return np.asarray(image).astype(int)


@pytest.fixture
def files(tmp_path):
    """Two LoRAs, each with tokens of the same names and other rows beside it."""
    found = {}
    for seed, name in enumerate(("one", "two")):
        found[name] = make_lora_file(tmp_path / name, tmp_path / "base", seed, parts=("unet",))
        rows = torch.randn(2, 32, generator=torch.Generator().manual_seed(seed)) * 2
        write_embeddings(tmp_path / name / f"{name}_emb.safetensors", {"clip_l": rows}, {"TOK": ["<s0>", "<s1>"]}, {})
    return found


def by_hand(tmp_path, name, prompt, file=None):
    """The image of plain diffusers."""
    pipe = make_pipeline(tmp_path / "base")
    pipe.set_progress_bar_config(disable=True)
    if file:
        pipe.load_lora_weights(file.parent, weight_name=file.name)
        rows = torch.randn(2, 32, generator=torch.Generator().manual_seed(["one", "two"].index(name))) * 2
        pipe.load_textual_inversion(rows, token=["<s0>", "<s1>"])
    source = torch.Generator().manual_seed(3)
    settings = {"num_inference_steps": STEPS, "guidance_scale": CompareRequest(("a",), (0,)).guidance_scale}
    return pixels(pipe(prompt, negative_prompt="", generator=source, **settings).images[0])


def test_each_column_reads_the_tokens_of_its_adapter(files, tmp_path):
    comparer = Comparer(make_pipeline(tmp_path / "base"))
    cards = [comparer.shelf.card(path) for path in files.values()]
    assert all(card.fits for card in cards)
    prompts = ("a photo of TOK dog", "a <s0><s1> cat")
    asked = CompareRequest(prompts, (3,), tuple(card.adapter for card in cards), num_inference_steps=STEPS)
    cells = list(comparer.compare(asked))
    for cell in cells:
        name = cell.column.adapter.label if cell.column.adapter else None
        prompt = cell.row.prompt.replace("TOK", "<s0><s1>") if name else cell.row.prompt
        wanted = by_hand(tmp_path, name, prompt, files.get(name))
        assert np.abs(pixels(cell.image) - wanted).max() <= 1, (name, cell.row.prompt)
        if name:  # without its tokens it is another image
            assert np.abs(pixels(cell.image) - by_hand(tmp_path, name, "a photo of dog", files[name])).max() > 1
    again = list(comparer.compare(asked))
    assert all(np.array_equal(pixels(a.image), pixels(b.image)) for a, b in zip(cells, again, strict=True))


def test_tokens_of_another_base_are_said_on_the_card(files, tmp_path):
    folder = files["one"].parent
    write_embeddings(folder / "one_emb.safetensors", {"clip_l": torch.ones(1, 8)}, {"TOK": ["<s0>"]}, {})
    card = Comparer(make_pipeline(tmp_path / "base")).shelf.card(files["one"])
    assert card.mismatches == ["one_emb.safetensors: its clip_l is 8 wide, and the base has 32"]
