"""A search, then the training with what it found, in one process: for programs that start trainings, as the page does.

    python -m reslora_diffusion.tuning.beforehand SCRIPT CONFIG [OPTION ...]

`CONFIG` is what `SCRIPT --config` takes; the options are the script's. A search that has ended is not made again.
"""

import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

from ..utils.option_parser import parse_file
from ..utils.problems import run_program
from .command import parse, tune
from .settings import FOLDER, RUN


def main(words: Sequence[str]) -> int:
    script, config, *more = words
    found = Path(parse_file("--config", Path(config))["output_dir"]) / FOLDER / RUN

    def search() -> None:
        settings, _, options = parse(["train", "--config", config])
        print(tune("train", options, settings), flush=True)

    code = 0 if found.is_file() else run_program(search)
    if code or not found.is_file():  # it failed, or was asked to stop
        return code
    sys.argv = [script, "--config", str(found), *more]
    runpy.run_path(script, run_name="__main__")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
