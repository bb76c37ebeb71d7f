"""Reading a LoRA of any dialect into one form, {component: {module path: LoraFactors}}.

Accepted: kohya files (SD 1.x, 2.x, SDXL; diffusers or Stability block names; FLUX.1), diffusers files of every age,
PEFT folders. `header` has looked at the file before its tensors are read.
"""

from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import torch

from reslora_diffusion.core.functional import LoraFactors

from .factors import Components
from .flux import split
from .header import DIFFUSERS_FILE, PEFT_CONFIG, PEFT_FILE, Header, locate, open_safetensors, read_headers, unusable
from .keys import Dialect, listing

__all__ = ["DIFFUSERS_FILE", "PEFT_CONFIG", "PEFT_FILE", "LoraFile", "locate", "read_lora"]


@dataclass(frozen=True)
class LoraFile:
    """A LoRA, read. `alphas` holds what the file states, per module; scaling is in the factors already."""

    path: Path
    dialect: Dialect
    components: Components
    metadata: dict[str, str]
    dtypes: Counter[str]
    alphas: dict[tuple[str, str], float] = field(default_factory=dict)


def read_lora(source: str | Path) -> LoraFile:
    """Read any LoRA file or folder.

    >>> lora = read_lora("my_lora.safetensors")
    >>> lora.dialect, lora.components["unet"]["mid_block.attentions.0.transformer_blocks.0.attn1.to_q"].lora_A.shape

    Raises:
        ValueError: one message with everything that is wrong with the file.
    """
    files = [read_tensors(header) for header in read_headers(source)]
    first, *rest = files
    for other in rest:
        for component, modules in other.components.items():
            first.components.setdefault(component, {}).update(modules)
        first.dtypes.update(other.dtypes)
        first.alphas.update(other.alphas)
    return first


def read_tensors(header: Header) -> LoraFile:
    """The tensors of a file whose structure is sound."""
    components: Components = defaultdict(dict)
    alphas, unlike = {}, []
    dtypes: Counter[str] = Counter()
    with open_safetensors(header.path) as file:
        modules = header.modules()
        for name, key in header.keys.items():  # both CLIP layouts may be there, if they agree
            first = modules[key.component, key.path][key.part]
            if first != name and not torch.equal(file.get_tensor(first), file.get_tensor(name)):
                unlike.append(f"{key.component}.{key.path}")
        for (component, path), names in modules.items():
            A, B = file.get_tensor(names["A"]), file.get_tensor(names["B"])
            alpha = file.get_tensor(names["alpha"]).item() if "alpha" in names else None
            scaling = header.scaling(component, path, A.shape[0], alpha)
            if alpha is not None or header.configs:
                alphas[component, path] = scaling * A.shape[0]
            components[component][path] = LoraFactors(A, B, scaling)
            dtypes.update(str(tensor.dtype).removeprefix("torch.") for tensor in (A, B))
    if unlike:
        unlike = sorted(set(unlike))
        problem = f"{len(unlike)} modules are given twice, with different values: {listing(unlike)}"
        raise unusable(header.path, [problem])
    if header.dialect is Dialect.KOHYA and "transformer" in components:
        components["transformer"] = split(components["transformer"])
    return LoraFile(header.path, header.dialect, dict(components), header.metadata, dtypes, alphas)
