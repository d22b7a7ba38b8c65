"""Tensors at the edge of floats are quantized to numbers; what is not finite is neither started with nor saved."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "soak"))
import numerics


@pytest.mark.parametrize("learner", ["lsq", "pact", "qil", "lq_nets"])
@pytest.mark.parametrize("name", ["zeros", "one element", "float16"])
def test_tensors_at_the_edge(learner, name):
    """Start values, quantized values and gradients are finite: activations that can be negative, at all widths."""
    assert numerics.edge(learner, "activation", True, name) == []
