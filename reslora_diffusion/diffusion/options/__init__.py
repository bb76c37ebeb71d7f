"""The options of DreamBooth training: `DreamBoothOptions`, read from a command line and a file by `parse`.

    options = parse(["--config", "run.yaml", "--rank", "8"])

The command line wins over the file, and the file over the defaults. `options.problems` holds what was wrong with
either; `checks.check` raises it together with everything else that is wrong. Nothing here imports torch.
"""

from .dreambooth import BINDING, FACTS, IN_HEADER, DreamBoothOptions
from .parsing import known_flags, override, parse, stored_options

__all__ = [
    "BINDING",
    "FACTS",
    "IN_HEADER",
    "DreamBoothOptions",
    "known_flags",
    "override",
    "parse",
    "stored_options",
]
