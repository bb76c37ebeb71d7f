"""`--quantization`: its kinds, where they run, and what stands in their way. No torch in here.

nf4        bitsandbytes, NormalFloat of 4 bits, its constants quantised again, as in QLoRA
int8       bitsandbytes, LLM.int8()
int8wo     torchao, weights in int8, a scale for each row
float8wo   torchao, weights in float8 (e4m3), a scale for each row
int4wo     torchao, weights in int4, a scale and a zero for each 128
"""

from collections.abc import Iterator
from typing import NamedTuple

from reslora_diffusion.export.single_file import is_single_file, read_single_file

from ...utils.environment import missing_packages
from ...utils.problems import BadInput
from . import DreamBoothOptions
from .launcher import shards


class Kind(NamedTuple):
    """One kind of quantisation: how it stores a weight and where it runs."""

    package: str
    bits: float  # of a weight, with the constants of its block
    per_row: int  # bytes for each row beside them
    devices: tuple[str, ...]  # on which diffusers and the package run


KINDS = {
    "nf4": Kind("bitsandbytes", 4 + 8 / 64 + 32 / (64 * 256), 0, ("cuda", "xpu", "mps")),
    "int8": Kind("bitsandbytes", 8, 4, ("cuda", "xpu")),
    "int8wo": Kind("torchao", 8, 4, ("cpu", "cuda", "xpu", "mps")),
    "float8wo": Kind("torchao", 8, 4, ("cpu", "cuda", "xpu")),
    "int4wo": Kind("torchao", 4 + 32 / 128, 0, ("cuda",)),
}


def quantisation_problems(options: DreamBoothOptions) -> Iterator[str]:
    """Problems that can be found before any weight is read."""
    if options.quantization not in KINDS:
        return
    kind, flag = KINDS[options.quantization], f"--quantization {options.quantization}"
    yield from missing_packages([(flag, kind.package, kind.package)])
    base = options.pretrained_model_name_or_path
    if base and is_whole_file(base):
        yield f"{flag}: diffusers quantises no pipeline of one file; wanted {base} as a folder, or a transformer's file"
    if shards():
        yield f"{flag}: FSDP shards no packed weights; wanted one or the other"


def is_whole_file(base: str) -> bool:
    """Return whether a base is one file with a whole pipeline in it; what is wrong with a file is said elsewhere."""
    try:
        return is_single_file(base) and read_single_file(base).whole
    except BadInput:
        return False


def device_problems(options: DreamBoothOptions, device: str) -> Iterator[str]:
    """Name the device that will be trained on, if the kind does not run on its type."""
    kind = KINDS.get(options.quantization or "")
    if kind and device not in kind.devices:
        others = [name for name, other in KINDS.items() if device in other.devices]
        yield (
            f"--quantization {options.quantization}: runs on {', '.join(kind.devices)}, and this run is on {device}; "
            f"wanted {' or '.join(others)}"
        )
