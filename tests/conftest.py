"""Every test runs offline and on one thread, and processes that tests start inherit that.

One thread: several may divide a sum differently from run to run, and some tests compare runs bit for bit.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from hub import hub, waits  # noqa: E402, F401, fixtures for every test
