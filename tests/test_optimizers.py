"""Optimizers against loops in NumPy float64: step sizes in log space, kept positive, come to rest; weights as torch has it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from made_models import Dense

from mpq_jax import Refusal, flax_seam, optimizers
from mpq_jax.quantized_model import quantize
from mpq_jax.quantizers import lq_nets, lsq

# ---- step sizes -----------------------------------------------------------------------------------------------------


def test_log_space_is_gradient_descent_on_the_logarithm():
    """Against SGD on the variable log s itself."""
    optimizer = optimizers.log_space(optax.sgd(0.1, 0.9))
    s, log_s = jnp.array([0.01, 3.0]), jnp.log(jnp.array([0.01, 3.0]))
    plain = optax.sgd(0.1, 0.9)
    state, plain_state = optimizer.init(s), plain.init(log_s)

    def f(s):
        return jnp.square(jnp.log(s) + 1).sum() + s.sum()

    for _ in range(20):
        updates, state = optimizer.update(jax.grad(f)(s), state, s)
        s = optax.apply_updates(s, updates)
        updates, plain_state = plain.update(jax.grad(lambda z: f(jnp.exp(z)))(log_s), plain_state, log_s)
        log_s = optax.apply_updates(log_s, updates)
    np.testing.assert_allclose(s, jnp.exp(log_s), rtol=1e-4)


def test_no_step_takes_more_than_half_away():
    """s + max(u, -s/2), whatever the optimizer asks for."""
    rng = np.random.default_rng(0)
    s, gradient = np.exp(rng.normal(size=200)), rng.normal(size=200)
    optimizer = optax.chain(optax.sgd(2.0), optimizers.keep_positive())
    update, _ = optimizer.update(jnp.asarray(gradient, jnp.float32), optimizer.init(jnp.zeros(200)), jnp.float32(s))
    expected = np.maximum(-2.0 * gradient, -s / 2)
    assert (expected == -s / 2).any() and (expected > -s / 2).any()
    np.testing.assert_allclose(update, expected, rtol=1e-5, atol=1e-7)


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


# ---- when they have come to rest ------------------------------------------------------------------------------------

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


# ---- weights --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("momentum, decay, clip", [(0.0, 0.0, 0.0), (0.9, 0.0, 0.0), (0.9, 0.1, 0.5), (0.0, 0.1, 0.5)])
def test_sgd_is_torchs(momentum, decay, clip):
    """v = m v + (clipped gradient + decay w), w = w - rate v: momentum plain, the rate outside of it."""
    rng = np.random.default_rng(1)
    gradients, w, v = rng.normal(size=(6, 5)), np.ones(5), np.zeros(5)
    optimizer = optimizers.sgd(0.3, momentum, decay, clip)
    params = jnp.ones(5)
    state = optimizer.init(params)
    for gradient in gradients:
        update, state = optimizer.update(jnp.asarray(gradient, jnp.float32), state, params)
        params = optax.apply_updates(params, update)
        v = momentum * v + (np.clip(gradient, -clip, clip) if clip else gradient) + decay * w
        w = w - 0.3 * v
    np.testing.assert_allclose(params, w, rtol=1e-5)


def test_adamw_is_adam_with_decay_beside_it():
    """Loshchilov and Hutter 2019, algorithm 2: the decay takes no part in the moments."""
    rng = np.random.default_rng(2)
    gradients, w, m, v = rng.normal(size=(5, 4)), np.ones(4), np.zeros(4), np.zeros(4)
    optimizer = optimizers.weights_optimizer("adamw", 0.1, 0.8, 0.2)
    params = jnp.ones(4)
    state = optimizer.init(params)
    for t, gradient in enumerate(gradients, start=1):
        update, state = optimizer.update(jnp.asarray(gradient, jnp.float32), state, params)
        params = optax.apply_updates(params, update)
        m, v = 0.8 * m + 0.2 * gradient, 0.999 * v + 0.001 * gradient**2
        w = w - 0.1 * (m / (1 - 0.8**t) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8) + 0.2 * w)
    np.testing.assert_allclose(params, w, rtol=1e-4)
    with pytest.raises(Refusal, match=r"'adam' is not known; choose \"sgd\" or \"adamw\""):
        optimizers.weights_optimizer("adam", 0.1, 0.9, 0.0)


@pytest.mark.parametrize("warmup, end", [(0, 0.0), (0, 0.02), (4, 0.0), (4, 0.02)])
def test_rates_rise_in_a_line_and_fall_by_a_cosine(warmup, end):
    rate = optimizers.schedule(0.5, 20, warmup=warmup, end=end)
    for step in range(25):
        done = min(1.0, (step - warmup) / (20 - warmup))
        falling = end + (0.5 - end) * (1 + np.cos(np.pi * done)) / 2
        expected = 0.5 * step / warmup if step < warmup else falling
        np.testing.assert_allclose(rate(step), expected, rtol=1e-5, atol=1e-7)


# ---- which leaf has which -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quantizer", [lsq(), lq_nets()])
def test_every_leaf_is_moved_by_its_own(quantizer):
    """Gradients of 1 everywhere: weights move by 1, trained leaves by 1000 (cut at half of them), state leaves not at all;
    so do rows' own affine copies, as weights."""
    x = jnp.zeros((2, 6))
    quantized = quantize(Dense(3), x, quantizer=quantizer, bit_widths=(2, 3), ends=None)
    shapes = jax.eval_shape(lambda: quantized.calibrate(Dense(3).init(jax.random.key(0), x), x))
    params = jax.tree.map(lambda leaf: jnp.full(leaf.shape, 8.0), shapes["params"])
    affine = {"norm0/scale": jnp.full((3, 12), 8.0)}
    halved = optax.chain(optax.sgd(1e3), optimizers.keep_positive())
    optimizer = optimizers.partition(quantized, optax.sgd(1.0), halved)
    ones = jax.tree.map(jnp.ones_like, (params, affine))
    update, _ = optimizer.update(ones, optimizer.init((params, affine)), (params, affine))
    found = {path: set(np.unique(leaf)) for path, leaf in flax_seam.flatten(update[0]).items()}
    expected = {}
    for path in found:
        name = path.rpartition("/")[2]
        expected[path] = {-4.0} if name.endswith("step_size") else {0.0} if name.endswith("basis") else {-1.0}
    assert found == expected
    assert (update[1]["norm0/scale"] == -1).all()
    kept = [path for path in found if path.endswith(("step_size", "basis"))]
    assert len(kept) == 4  # two layers, weights and activations
