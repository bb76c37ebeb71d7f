"""A trained adapter and the base that it is loaded onto: what is wrong with the pair, before weights are read.

    pair = Pair(base, adapter)
    refuse(pair.problems())             the files; torch is not loaded
    model, tokenizer = pair.load()      PEFT's model on the base, with the tokens that its answers end with

A folder of PEFT is taken, also one with the unmerged shortcuts of a checkpoint.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..utils.documents import parse_json
from ..utils.hub import looking_up
from ..utils.model_files import Files, Unknown, shapes_in
from ..utils.problems import BadInput, first_line, listing, refuse
from .model_checks import keeps_names, stored_layers
from .options import PRECISIONS

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
KINDS = ("LORA", "RESLORA")
PREFIX = "base_model.model."
SHOWN = 3


@dataclass(frozen=True)
class Pair:
    """A base and an adapter, by folder or hub name; `dtype` is the precision of the base, its own if None."""

    base: str
    adapter: str
    dtype: str | None = None

    def problems(self) -> Iterator[str]:
        """Everything that files on this machine tell."""
        if self.dtype is not None and self.dtype not in PRECISIONS:
            yield f"--dtype: got {self.dtype!r}, wanted {', '.join(PRECISIONS)}"
        base = Path(self.base)
        looks_local = base.is_absolute() or self.base.startswith(".") or len(base.parts) > 2
        if base.is_dir() and not (base / "config.json").is_file():
            yield f"{self.base}: has no config.json, wanted a transformers model"
        elif looks_local and not base.is_dir():
            yield f"{self.base}: there is no such folder"
        folder = Path(self.adapter)
        if not folder.is_dir():
            if folder.exists() or folder.is_absolute() or self.adapter.startswith(".") or len(folder.parts) > 2:
                yield f"{self.adapter}: is no folder, wanted one with {CONFIG} and {WEIGHTS}"
            return
        yield from (f"{self.adapter}: has no {name}" for name in (CONFIG, WEIGHTS) if not (folder / name).is_file())
        if not (folder / CONFIG).is_file():
            return
        try:
            config = parse_json((folder / CONFIG).read_text(encoding="utf-8"))
            kind = config["peft_type"]
        except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
            yield f"{folder / CONFIG}: cannot be read: {error}"
            return
        if kind not in KINDS:
            yield f"{self.adapter}: is of type {kind}, wanted {' or '.join(KINDS)}"
        if (folder / WEIGHTS).is_file():
            yield from self.misfits(folder, config)

    def misfits(self, folder: Path, config: dict[str, Any]) -> Iterator[str]:
        """Layers that the base lacks or has in another shape; nothing where files do not tell."""
        try:
            adapted = adapted_shapes(shapes_in(folder / WEIGHTS))
        except Unknown:
            yield f"{folder / WEIGHTS}: cannot be read"
            return
        files = Files(self.base, None)
        try:
            if "text_config" in (stored := files.json("config.json")) or not keeps_names(stored):
                return
            layers = stored_layers(files.shapes(""))
        except (Unknown, OSError, ValueError, LookupError, TypeError, AttributeError):
            return
        missing, unlike = [], []
        for path, shape in adapted.items():
            names = [name for name in layers if f".{path}".endswith(f".{name}") or f".{name}".endswith(f".{path}")]
            if not names:
                missing.append(path)
            elif not any(sorted(layers[name]) == sorted(shape) for name in names):  # Conv1D is stored transposed
                unlike.append(f"{path} is {shape}, of the base {layers[names[0]]}")
        made_for = config.get("base_model_name_or_path")
        told = f"; it was made for {made_for}" if made_for and made_for != self.base else ""
        if missing:
            yield f"{self.adapter} is for another base: {self.base} has no {listing(missing, SHOWN)}{told}"
        if unlike:
            yield f"{self.adapter} is for another base: {listing(unlike, SHOWN)}{told}"

    def load(self, device: str | None = None) -> "tuple[PeftModel, PreTrainedTokenizerBase]":
        """The model with its adapter, in evaluation mode, and the base's tokenizer.

        Raises:
            BadInput: the pair does not fit, or cannot be loaded.
        """
        refuse(self.problems())
        import torch
        from peft import PeftModel
        from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

        import reslora_diffusion.core.peft  # noqa: F401  # PEFT then knows unmerged shortcuts

        from .models import DTYPES, stop_at, stops_of

        with looking_up("BASE", self.base):
            tokenizer = AutoTokenizer.from_pretrained(self.base)
            base = AutoModelForCausalLM.from_pretrained(self.base, dtype=DTYPES[self.dtype] if self.dtype else "auto")
        try:
            stop_at(base, stops_of(GenerationConfig.from_pretrained(self.adapter)))
        except (OSError, ValueError):  # the folder says nothing of generation
            pass
        try:
            model = PeftModel.from_pretrained(base, self.adapter)
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            raise BadInput([f"{self.adapter} does not load onto {self.base}: {first_line(error)}"]) from error
        return model.eval().to(device or ("cuda" if torch.cuda.is_available() else "cpu")), tokenizer


def adapted_shapes(shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, int]]:
    """The shape (out, in) of each layer that has factors, by its path in the base."""
    found = {}
    for name, shape in shapes.items():
        path, factor, _ = name.partition(".lora_A.")
        other = shapes.get(f"{path}.lora_B.weight")
        if factor and other and len(shape) == len(other) == 2:
            found[path.removeprefix(PREFIX)] = (other[0], shape[1])
    return found
