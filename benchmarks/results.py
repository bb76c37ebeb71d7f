"""Result files: JSON with what was measured, on what machine, with which versions. Written whole or not at all."""

import json
import os
import platform
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from reslora_diffusion.utils.files import write_text

LIBRARIES = ("torch", "diffusers", "transformers", "peft", "accelerate")
FOLDER = Path(__file__).parent / "results"


def processor() -> str:
    """The name of the CPU, where the system tells."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def machine() -> dict[str, Any]:
    """Return the facts on the machine of a measurement."""
    import torch

    found = {
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        **{name: version(name) for name in LIBRARIES},
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }
    if torch.cuda.is_available():
        found["device"] = torch.cuda.get_device_name()
        found["cuda"] = torch.version.cuda
    return found


def write_results(path: str | Path, kind: str, results: Any, *, quiet: bool = False, **facts: Any) -> None:
    """One result file; `kind` is the benchmark that made it, and unless `quiet` the path is printed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"kind": kind, "machine": machine(), "command": " ".join(sys.argv[1:]), **facts, "results": results}
    write_text(path, json.dumps(content, indent=1) + "\n")
    if not quiet:
        print(f"\nwritten: {path}")


def with_block(text: str, name: str, content: str) -> str:
    """A document with `content` between its lines `<!-- name -->` and `<!-- /name -->`; unchanged without these."""
    first, last = f"<!-- {name} -->", f"<!-- /{name} -->"
    if first not in text or last not in text:
        return text
    return f"{text.split(first)[0]}{first}\n{content}\n{last}{text.split(last)[1]}"
