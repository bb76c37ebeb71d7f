"""Every test runs offline and on one thread, and processes that tests start inherit that.

One thread: several may divide a sum differently from run to run, and some tests compare runs bit for bit.
"""

import gc
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

gc.disable()  # until everything is imported

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


frozen_modules = 0  # how many were imported at the last freeze


def freeze() -> None:
    """Imported libraries are half a million objects that stay: the collector need not look at them again. accelerate
    and transformers collect at each training, so what a test has imported is frozen after it."""
    global frozen_modules
    gc.collect()
    gc.freeze()
    frozen_modules = len(sys.modules)


def pytest_collection_finish() -> None:
    freeze()
    gc.set_threshold(20_000, 20, 20)
    gc.enable()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> Iterator[None]:
    yield
    if len(sys.modules) > frozen_modules + 20 or nextitem is None or nextitem.path != item.path:
        freeze()
