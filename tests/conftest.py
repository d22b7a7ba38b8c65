"""Fixtures that several test files share, and the order of the files."""

import os
from pathlib import Path

# As the Makefile has it: commands that tests call keep their programs here, not in the user's home.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).resolve().parent.parent / ".jax_cache"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

import pytest
import quick

# Files that take longest, in seconds of one core: begun first, so that no worker is left alone with one at the end.
LONGEST = (
    "test_parallel.py",
    "test_examples.py",
    "test_kills.py",
    "test_own_model.py",
    "test_pipeline.py",
    "test_docs.py",
    "test_notebook.py",
    "test_search_methods.py",
    "test_package.py",
    "test_quantizer_training.py",
    "test_criteria_files.py",
)


def pytest_collection_modifyitems(items):
    order = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(Path(item.path).name, len(order)))


@pytest.fixture(scope="module")
def quick_compilation():
    """For files that compile much and run little (quick.py). Programs that they start compile so, too.

    A file takes it with `pytestmark = pytest.mark.usefixtures("quick_compilation")`. Not for files about speed, or about
    equality to the last bit of what is run in different ways.
    """
    with quick.compilation():
        yield
