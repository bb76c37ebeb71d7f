"""Look for files that some door does not stand: python tests/fuzz.py SECONDS [SEED]

Goes round the doors of `fuzz_doors` with ever new files until the time is over. What fails is made as small as
hypothesis can, and written to `tests/corpus/<door>/<digest>/`, which `test_fuzz.py` tries from then on.
"""

import hashlib
import json
import os
import random
import sys
import time
import traceback
import warnings
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

from hypothesis import given, seed, settings  # noqa: E402

from fuzzing import Door, pass_through, put  # noqa: E402
from strangers import Files  # noqa: E402
from test_fuzz import CORPUS, QUIET, at  # noqa: E402

EXAMPLES = 100  # at a door before the next one has its turn


def attempt(door: Door, folder: Path, number: int, until: float) -> tuple[int, Files | None, str]:
    """Hand new files in at one door: how many, and of those that failed the smallest, with what was raised."""
    count, failed, raised = 0, None, ""

    @seed(number)
    @settings(QUIET, max_examples=EXAMPLES // 5 if door.slow else EXAMPLES, phases=settings.default.phases)
    @given(door.files)
    def one(files: Files) -> None:
        nonlocal count, failed, raised
        if time.monotonic() > until and failed is None:
            return
        count += 1
        try:
            pass_through(door, files, folder)
        except Exception:
            failed, raised = files, traceback.format_exc()
            raise

    try:
        one()
    except Exception as error:
        raised = raised or repr(error)
    return count, failed, raised


def main(seconds: float, first: int) -> int:
    """The number of doors that something went wrong at."""
    found, folder = at()
    warnings.simplefilter("ignore")
    begin, numbers = time.monotonic(), random.Random(first)
    counts, broken = dict.fromkeys(found, 0), set()
    while time.monotonic() < begin + seconds:
        for name, door in found.items():
            if name in broken:
                continue
            count, failed, raised = attempt(door, folder, numbers.randrange(2**32), begin + seconds)
            counts[name] += count
            if raised:
                broken.add(name)
                content = failed or {}
                digest = hashlib.sha256(b"".join(k.encode() + v for k, v in sorted(content.items()))).hexdigest()[:12]
                put(content, CORPUS / name / digest)
                print(f"{name}: {CORPUS / name / digest}\n{raised}", flush=True)
    print(json.dumps({"seed": first, "seconds": round(time.monotonic() - begin), "files": counts}, indent=1))
    print(f"{sum(counts.values()):,} files at {len(counts)} doors; {len(broken)} doors did not stand")
    return len(broken)


if __name__ == "__main__":
    given_seed = int(sys.argv[2]) if len(sys.argv) > 2 else int.from_bytes(os.urandom(4))
    sys.exit(min(1, main(float(sys.argv[1]), given_seed)))
