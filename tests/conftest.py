"""Fixtures that several test files share."""

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
