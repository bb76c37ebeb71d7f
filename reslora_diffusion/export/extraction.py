"""Take a LoRA out of a fine-tuned model: delta_weight = W_tuned - W_base, cut to rank N.

The cut keeps the N largest singular values, which makes it the nearest LoRA of that rank (Eckart and Young). What
fine-tuning changed elsewhere, in norms, biases and layers that were not asked for, is measured and reported.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..utils.problems import listing
from .base import check_base_name, is_transposed
from .factors import Components, Loss, from_matrix
from .hollow import model_class, pipeline_index, transformers_config
from .keys import CLIP_COMPONENTS, COMPONENTS, DENOISERS, Dialect, classic_path
from .peft_folder import MODEL
from .progress import progress
from .report import ExportReport
from .tools import save_lora

# What kohya's trainer adapts of a UNet, and of a transformer its blocks.
TRANSFORMER_PARTS = (".transformer_blocks.", ".single_transformer_blocks.", ".attentions.")
CLIP_PARTS = (".self_attn.", ".mlp.")


@dataclass(frozen=True)
class ExtractReport:
    """An extracted LoRA: what of the change it holds, and where the rest of the change is."""

    exports: list[ExportReport]
    losses: dict[tuple[str, str], Loss]
    energy_kept: float
    energy_elsewhere: float
    elsewhere: list[str]

    def __str__(self) -> str:
        worst = sorted(self.losses.items(), key=lambda item: item[1].energy_kept)[:5]
        lines = [
            f"{self.energy_kept:.1%} of the change of {len(self.losses)} modules is in the LoRA; least of "
            + ", ".join(f"{c}.{path} ({loss.energy_kept:.1%})" for (c, path), loss in worst)
        ]
        if self.energy_elsewhere:
            lines.append(
                f"{self.energy_elsewhere:.1%} of the whole change is in {len(self.elsewhere)} tensors that a LoRA of "
                f"these modules cannot hold: {listing(self.elsewhere)}"
            )
        return "\n".join([*lines, *map(str, self.exports)])


def extract(
    tuned: str,
    base: str,
    output: str | Path,
    rank: int,
    *,
    modules: str = "transformer",
    dtype: torch.dtype = torch.float16,
    variant: str | None = None,
) -> ExtractReport:
    """Write the LoRA that comes nearest to what fine-tuning changed.

    Args:
        tuned, base: folders or hub names of two models of one architecture.
        output: a folder, or a kohya file that ends in `.safetensors`.
        rank: of every module.
        modules: "transformer": attention and feed-forward layers; "all": every linear and convolution.
        dtype: precision of the file.
        variant: of the models' weight files, such as "fp16".

    >>> print(extract("my-dreambooth-model", "stable-diffusion-v1-5/stable-diffusion-v1-5", "out", 16))

    Raises:
        ValueError: the models are not alike, or equal.
    """
    problems = [*check_base_name(tuned), *check_base_name(base)]
    if rank < 1:
        problems.append(f"rank: got {rank}, wanted 1 or more")
    if modules not in ("transformer", "all"):
        problems.append(f"modules: got {modules!r}, wanted 'transformer' or 'all'")
    if problems:
        raise ValueError("\n".join(["nothing can be extracted:", *(f"  - {p}" for p in problems)]))
    found: Components = {}
    losses: dict[tuple[str, str], Loss] = {}
    energy = {"module": 0.0, "kept": 0.0, "elsewhere": 0.0}
    elsewhere = []
    for component in common_components(tuned, base):
        models = [load_component(name, component, variant) for name in (tuned, base)]
        for path, layer, name, delta in changes(component, *models):
            size = delta.double().square().sum().item()
            if layer is None or not wanted_layer(component, path, layer, modules):
                energy["elsewhere"] += size
                elsewhere.append(f"{component}.{name}")
                continue
            matrix = delta.T if is_transposed(layer) else delta
            factors, loss = from_matrix(matrix, rank)
            found.setdefault(component, {})[classic_path(component, path)] = factors
            losses[component, path] = loss
            energy["module"] += size
            energy["kept"] += size * loss.energy_kept
    if not found:
        where = f"; what differs is {listing(elsewhere)}" if elsewhere else ""
        raise ValueError(f"nothing can be extracted: {tuned} and {base} are equal in all such modules{where}")
    kept = energy["kept"] / energy["module"]
    facts = {"extracted_from": Path(tuned).name, "extracted_energy": f"{kept:.4f}", "base_model": Path(base).name}
    if not Path(base).is_dir():
        facts["base_model"] = base
    exports = save_lora(output, found, Dialect.KOHYA, dtype=dtype, facts=facts)
    rest = energy["elsewhere"] / (energy["elsewhere"] + energy["module"])
    return ExtractReport(exports, losses, kept, rest, elsewhere)


def common_components(tuned: str, base: str) -> list[str]:
    """The models that both have and a LoRA can be for: of text encoders, those of CLIP.

    Raises:
        ValueError: there are none.
    """
    indices = [index for name in (tuned, base) if (index := pipeline_index(name))]
    if not indices:
        return [MODEL]
    if len(indices) == 1:
        raise ValueError(f"one of {tuned} and {base} is a pipeline and the other is not")
    names = [c for c in COMPONENTS if all((index.get(c) or [None])[0] for index in indices)]
    kinds = {name: [tuple(index[name]) for index in indices] for name in names}
    names = [c for c in names if c in DENOISERS or kinds[c][1][1].startswith("CLIP")]
    unlike = [f"{name}: {a[1]} and {b[1]}" for name, (a, b) in kinds.items() if a != b]
    if unlike or not names:
        raise ValueError(f"{tuned} and {base} are not alike: {listing(unlike) or 'they share no model'}")
    return names


def load_component(name: str, component: str, variant: str | None) -> nn.Module:
    """One model of a pipeline, or a whole language model, with its weights."""
    if component == MODEL:
        config = transformers_config(name)
        return model_class(name, "transformers", (config.architectures or [""])[0]).from_pretrained(name)
    index = pipeline_index(name)
    assert index is not None, "`common_components` found the component in it"
    library, kind = index[component]
    return model_class(name, library, kind).from_pretrained(name, subfolder=component, variant=variant)


def changes(component: str, tuned: nn.Module, base: nn.Module) -> Iterator[tuple[str, nn.Module | None, str, Tensor]]:
    """(module path, module if the tensor is its weight, tensor's name, difference) of every parameter that differs.

    Raises:
        ValueError: the models do not have the same parameters.
    """
    before = dict(base.named_parameters())
    after = dict(tuned.named_parameters())
    unlike = sorted(before.keys() ^ after.keys())
    unlike += [f"{n} {list(p.shape)} and {list(after[n].shape)}" for n, p in before.items()
               if n in after and after[n].shape != p.shape]  # fmt: skip
    if unlike:
        raise ValueError(f"the two models of {component} are not alike: {listing(unlike)}")
    layers = dict(tuned.named_modules())
    for name, parameter in progress(list(after.items()), f"extracting {component}"):
        delta = parameter.detach().float() - before[name].detach().float()
        if delta.any():
            path, _, kind = name.rpartition(".")
            yield path, layers[path] if kind == "weight" else None, name, delta


def wanted_layer(component: str, path: str, layer: nn.Module, modules: str) -> bool:
    """Return whether a LoRA of this layer is wanted."""
    if not (isinstance(layer, (nn.Linear, nn.Conv2d)) or is_transposed(layer)):
        return False
    if component == MODEL:
        return path.rpartition(".")[2] not in ("lm_head", "embed_out")
    if modules == "all":
        return True
    return any(part in f".{path}" for part in (CLIP_PARTS if component in CLIP_COMPONENTS else TRANSFORMER_PARTS))
