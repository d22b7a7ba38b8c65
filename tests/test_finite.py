"""Step sizes stay positive and finite whatever the gradients; tensors at the edge of floats are quantized to numbers."""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mpq_jax import optimizers, stages
from mpq_jax.types import Refusal

sys.path.insert(0, str(Path(__file__).parent / "soak"))
import numerics

GRADIENTS = {
    "always down": lambda i, s: jnp.ones_like(s),
    "always up": lambda i, s: -jnp.ones_like(s),
    "huge and turning": lambda i, s: jnp.where(i % 7 < 3, 1e30, -1e30) * jnp.ones_like(s),
    "growing as it shrinks": lambda i, s: 1 / s,
}
OPTIMIZERS = {
    "log_adam": optimizers.log_space(optax.adam(1.0, b2=0.95)),  # ten times the default
    "sgd": optax.chain(optax.sgd(0.1, 0.9), optimizers.keep_positive()),  # ten times the paper's
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_ten_thousand_updates_leave_step_sizes_positive_and_finite(name):
    """All gradients at once, from step sizes of all sizes; the least and the largest of all steps are looked at."""
    optimizer, begin = OPTIMIZERS[name], jnp.tile(jnp.float32([1e-6, 1e-2, 1.0, 1e2]), (len(GRADIENTS), 1))

    def one(i, carry):
        s, state, least, largest = carry
        gradient = jnp.stack([each(i, row) for each, row in zip(GRADIENTS.values(), s, strict=True)])
        update, state = optimizer.update(gradient, state, s)
        s = optax.apply_updates(s, update)
        return s, state, jnp.minimum(least, s.min()), jnp.maximum(largest, s.max())

    @jax.jit
    def run():
        return jax.lax.fori_loop(0, 10_000, one, (begin, optimizer.init(begin), jnp.inf, 0.0))

    s, _, least, largest = run()
    assert np.isfinite(s).all() and least > 0.9 * optimizers.LEAST and largest < 1.1 * optimizers.MOST
    assert s[0].max() < 1e-9 and s[1].min() > 1e2  # they did move, all the way


def test_updates_inside_the_bounds_are_left_alone_and_none_goes_further_out():
    s = jnp.float32([0.5, 0.5, 1e-20, 1e-20, 1e20])
    update = jnp.float32([0.125, -1e6, 1e-3, -1e-21, 1e19])
    inside = jnp.array([0, 2])
    np.testing.assert_array_equal(optimizers.within(update, s)[inside], update[inside])
    np.testing.assert_allclose(s + optimizers.within(update, s), [0.625, 0.5 / 1024, 1e-3, 1e-20, 1e20], rtol=1e-4)
    twice = jnp.float32(2 * optimizers.LEAST)
    np.testing.assert_allclose(twice + optimizers.within(jnp.float32(-1.0), twice), optimizers.LEAST, rtol=1e-4)


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
