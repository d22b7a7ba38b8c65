"""When step sizes have come to rest: optimizers.settling against the same written as a loop in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mpq_jax import optimizers

WINDOW, TOLERANCE = 5, 0.02


def path(drift, steps, seed=0):
    """[steps, 3]: gradients of a walk that drifts until update `drift`, and only jitters from there on."""
    rng = np.random.default_rng(seed)
    still = np.arange(steps)[:, None] >= drift
    return np.where(still, 0.0, -0.05) + 0.01 * rng.choice([-1.0, 1.0], (steps, 3))


def in_numpy(gradients, steps, first):
    """(parameters after each update, the update that the cool-down starts with)"""
    x, where, old, begins = np.zeros(3), [], None, None
    window = []
    for t, gradient in enumerate(gradients):
        if begins is None and t >= steps - 2 * WINDOW:
            begins = t
        seen = begins
        if t >= first:
            window.append(x)
        if len(window) == WINDOW:
            mean, window = np.mean(window, 0), []
            if begins is None and old is not None and np.sqrt(np.mean((mean - old) ** 2)) < TOLERANCE:
                begins = t + 1
            old = mean
        rate = 1.0 if seen is None or t < seen else (1 + np.cos(np.pi * (t - seen + 1) / (2 * WINDOW + 1))) / 2
        x = x - rate * gradient
        where.append(x)
    return np.array(where), begins


@pytest.mark.parametrize("drift, steps, first", [(12, 60, 0), (12, 60, 7), (100, 40, 0)])
def test_against_a_loop(drift, steps, first):
    gradients = path(drift, steps)
    # Within a larger optimizer, beside others with counters of their own.
    optimizer = optax.partition(
        {
            "step_sizes": optimizers.settling(optax.sgd(1.0), TOLERANCE, WINDOW, steps, first),
            "weights": optax.adam(0.1),
        },
        {"a": "step_sizes", "b": "step_sizes", "w": "weights"},
    )

    @jax.jit
    def update(params, state, gradient):
        updates, state = optimizer.update({"a": gradient[:2], "b": gradient[2], "w": jnp.ones(())}, state, params)
        return optax.apply_updates(params, updates), state

    params = {"a": jnp.zeros(2), "b": jnp.zeros(()), "w": jnp.zeros(())}
    state, found, rests = optimizer.init(params), [], None
    for t in range(steps):
        if rests is None and optimizers.settled(state, WINDOW):
            rests = t
        params, state = update(params, state, jnp.asarray(gradients[t], jnp.float32))
        found.append([*params["a"], params["b"]])
    expected, begins = in_numpy(gradients, steps, first)
    end = begins + 2 * WINDOW
    np.testing.assert_allclose(found[:end], expected[:end], atol=2e-5)
    assert (rests if rests is not None else steps) == end
    if drift < steps:
        assert (begins - first) % WINDOW == 0 and drift < begins < steps - 2 * WINDOW
    else:
        assert end == steps  # it never came to rest: the cool-down ends with the last update all the same
