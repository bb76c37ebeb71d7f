"""Every test runs offline and on one thread, and processes that tests start inherit that.

One thread: several may divide a sum differently from run to run, and some tests compare runs bit for bit.
"""

import gc
import os
from pathlib import Path

import pytest

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from hub import hub, waits  # noqa: E402, F401, fixtures for every test

# Two processes share the files; the ones that take longest begin, so that neither process waits for the other's last.
LONGEST = (
    "test_app_browser test_train_dreambooth test_app_page test_diffusion_families test_llm_script "
    "test_diffusion_language_families test_app_wheel test_tuning test_core_distributed test_core_hazards "
    "test_train_dreambooth_processes test_train_new_tokens test_diffusion_checks test_fuzz"
).split()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(Path(item.path).stem, len(places)))


def pytest_collection_finish() -> None:
    """Imported libraries are half a million objects that stay: the collector need not look at them again."""
    gc.collect()
    gc.freeze()
