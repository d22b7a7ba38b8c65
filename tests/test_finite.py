"""Tensors at the edge of floats are quantized to numbers; what is not finite is neither started with nor saved."""

import sys
from pathlib import Path

import jax.numpy as jnp
import pytest

from mpq_jax import stages
from mpq_jax.types import Refusal

sys.path.insert(0, str(Path(__file__).parent / "soak"))
import numerics


@pytest.mark.parametrize("learner", ["lsq", "pact", "qil", "lq_nets"])
@pytest.mark.parametrize("name", ["zeros", "one element", "float16"])
def test_tensors_at_the_edge(learner, name):
    """Start values, quantized values and gradients are finite: activations that can be negative, at all widths."""
    assert numerics.edge(learner, "activation", True, name) == []


def test_what_cannot_be_started_or_saved_is_refused(tmp_path):
    """A gradient can overflow where no loss does: then no checkpoint holds what came of it."""
    good, bad = {"conv": {"kernel": jnp.ones(3)}}, {"conv": {"kernel": jnp.float32([1, jnp.nan, 1])}}
    stages._check_parameters(good, 7, "joint", tmp_path)
    with pytest.raises(
        Refusal, match=r"\['conv'\]\['kernel'\] is not finite after step 7 of joint; the last good checkpoint"
    ):
        stages._check_parameters(bad, 7, "joint", tmp_path)
