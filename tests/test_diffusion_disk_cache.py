"""Encodings kept from run to run: found by content, never paired wrongly, made again when they are broken."""

import json

import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import load_file
from transformers import CLIPTextModel

from dreambooth import SUBJECTS, train, train_without_export
from reslora_diffusion.diffusion.data.disk_cache import DiskCache, identity
from reslora_diffusion.utils.problems import BadInput
from tiny import tiny_vae

KEY = {"kind": "text", "prompt": "a dog"}
OPTIONS = {"random_flip": True, "alpha_mask": True, "max_train_steps": 2, "checkpointing_steps": 2}


def weights(folder) -> dict[str, torch.Tensor]:
    state = load_file(folder / "checkpoint-2" / "state" / "state.safetensors")
    return {name: value for name, value in state.items() if "lora_" in name}


def test_a_second_run_encodes_nothing_and_trains_the_same(tmp_path, monkeypatch):
    plain = train_without_export(tmp_path / "plain", **OPTIONS)
    first = train_without_export(tmp_path / "first", encoding_cache_dir=tmp_path / "kept", **OPTIONS)
    entries = sorted((tmp_path / "kept").rglob("*.safetensors"))
    assert len(entries) == 7  # five images, the prompt, and the empty prompt

    def refuse(*args, **kwargs):
        raise AssertionError("encoded again")

    monkeypatch.setattr(AutoencoderKL, "encode", refuse)
    monkeypatch.setattr(CLIPTextModel, "forward", refuse)
    second = train(tmp_path / "second", encoding_cache_dir=tmp_path / "kept", **OPTIONS)
    for run in (first, second):
        assert all(torch.equal(value, weights(run)[name]) for name, value in weights(plain).items())
    with pytest.raises(AssertionError, match="encoded again"):
        train_without_export(tmp_path / "other", encoding_cache_dir=tmp_path / "kept", resolution=72, **OPTIONS)


def test_runs_without_a_seed_find_their_crops_and_an_image_that_joins_is_the_one_encoded(tmp_path, capsys):
    folder = tmp_path / "wide"
    folder.mkdir()
    for number in range(2):
        Image.open(SUBJECTS / "cake" / f"{number}.png").resize((96, 60)).save(folder / f"{number}.png")
    options = {"seed": None, "encoding_cache_dir": tmp_path / "kept", "instance_data_dir": folder, "max_train_steps": 1}
    for run, added in (("first", 4), ("second", 0), ("third", 1)):
        if run == "third":
            Image.open(SUBJECTS / "cake" / "2.png").resize((96, 60)).save(folder / "00-joins.png")
        train_without_export(tmp_path / run, **options)
        assert f"kept: {added} images and prompts were added" in capsys.readouterr().out
    entries = [load_file(path) for path in (tmp_path / "kept").rglob("*.safetensors")]
    assert [len(entry["mean"]) for entry in entries if "mean" in entry] == [4, 4, 4]


def test_broken_and_exchanged_entries_are_encoded_anew(tmp_path):
    plain = train_without_export(tmp_path / "plain", encoding_cache_dir=tmp_path / "kept", **OPTIONS)
    first, second, third, *_, last = sorted((tmp_path / "kept").rglob("*.safetensors"))
    exchanged = first.read_bytes(), second.read_bytes()
    first.write_bytes(exchanged[1])
    second.write_bytes(exchanged[0])
    third.write_bytes(third.read_bytes()[:-40])
    content = bytearray(last.read_bytes())
    content[-3] ^= 64
    last.write_bytes(bytes(content))
    again = train_without_export(tmp_path / "again", encoding_cache_dir=tmp_path / "kept", **OPTIONS)
    for name, value in weights(plain).items():  # prompts that are encoded together or apart agree to rounding
        torch.testing.assert_close(weights(again)[name], value, rtol=1e-3, atol=1e-4)
    for path, content in zip((first, second), exchanged, strict=True):
        assert safetensors_key(path) == safetensors_key(content)
    assert not list((tmp_path / "kept").rglob(".*"))


def safetensors_key(source) -> str:
    content = source if isinstance(source, bytes) else source.read_bytes()
    return json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]["key"]


def test_an_entry_is_found_by_all_of_its_key(tmp_path):
    cache = DiskCache(tmp_path)
    cache.store(KEY, {"hidden": torch.arange(6.0).view(2, 3), "pooled": torch.ones(2, dtype=torch.bfloat16)})
    found = cache.load(dict(reversed(KEY.items())))
    assert torch.equal(found["hidden"], torch.arange(6.0).view(2, 3))
    assert found["pooled"].dtype is torch.bfloat16
    assert cache.load(KEY | {"prompt": "a cat"}) is None
    torch.manual_seed(0)
    vae = tiny_vae()
    before = identity(vae)
    assert identity(vae.bfloat16()) != before
    with torch.no_grad():
        next(vae.float().parameters()).add_(1e-3)
    assert identity(vae) != before


def test_a_file_in_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "kept").write_text("")
    with pytest.raises(BadInput, match="--encoding_cache_dir: .* is a file, wanted a folder"):
        train(tmp_path / "run", encoding_cache_dir=tmp_path / "kept")
