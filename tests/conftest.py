"""Fixtures that several test files share."""

import os
from pathlib import Path

# As the Makefile has it: commands that tests call keep their programs here, not in the user's home.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).resolve().parent.parent / ".jax_cache"))

import jax
import pytest


@pytest.fixture(scope="module")
def quick_compilation():
    """For files that compile much and run little: XLA's programs as ever, their machine code not optimized.

    A file takes it with `pytestmark = pytest.mark.usefixtures("quick_compilation")`. Not for files about speed, or about
    equality to the last bit of what is run in different ways.
    """
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
