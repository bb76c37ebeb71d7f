"""Our DreamBooth script with a clock around its parts, for `benchmarks.run`.

    RESLORA_BENCHMARK_PHASES=FILE RESLORA_BENCHMARK_BEGAN=SECONDS python -m benchmarks.phases SCRIPT OPTION...

FILE gets the seconds of each part. Start-up is what is left of the time since BEGAN, by the monotonic clock of the one
who started the process: Python, imports and the checks before a model is loaded. Nothing is imported here that the
script would not import when it does.
"""

import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

FILE, BEGAN = "RESLORA_BENCHMARK_PHASES", "RESLORA_BENCHMARK_BEGAN"


def main() -> int:
    script, *argv = sys.argv[1:]
    spent: dict[str, float] = {}

    def clocked(function: Callable[..., Any], phase: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            start = time.monotonic()
            try:
                return function(*args, **kwargs)
            finally:
                spent[phase] = spent.get(phase, 0.0) + time.monotonic() - start

        return call

    spec = importlib.util.spec_from_file_location("script", script)
    module: Any = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
    spec.loader.exec_module(module)  # type: ignore[union-attr]
    prepare = module.prepare

    def prepare_clocked(*args: Any) -> Any:
        from reslora_diffusion.diffusion.models import load as models
        from reslora_diffusion.diffusion.train import finishing, setup

        models.load_pipeline = clocked(models.load_pipeline, "loading")  # type: ignore[assignment]
        setup.encode_examples = clocked(setup.encode_examples, "caching")  # type: ignore[attr-defined]
        finishing.finish = clocked(finishing.finish, "saving")  # type: ignore[assignment]
        before = sum(spent.values())
        start = time.monotonic()
        found = prepare(*args)
        spent["preparing"] = time.monotonic() - start - (sum(spent.values()) - before)
        return found

    module.prepare, module.train = prepare_clocked, clocked(module.train, "steps")

    def program() -> None:
        module.main(module.parse_args(argv))
        spent["start-up"] = time.monotonic() - float(os.environ[BEGAN]) - sum(spent.values())
        Path(os.environ[FILE]).write_text(json.dumps(spent), encoding="utf-8")

    return module.run_program(program)


if __name__ == "__main__":
    sys.exit(main())
