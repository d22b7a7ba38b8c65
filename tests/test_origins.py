"""Where values come from: signs that are claimed hold on random inputs, and leaves are those that a change reaches."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax import lax

from mpq_jax.origins import Origin, constant, propagate

ANY, UP = "any sign", ">= 0"


def origins_of(function, *origins, shapes=((2, 3),)):
    """The origins of a function's outputs, for inputs with the origins given."""
    counter = itertools.count(100)
    shapes = [jnp.zeros(shape) for shape in (list(shapes) * len(origins))[: len(origins)]]
    closed = jax.make_jaxpr(function)(*shapes)
    env = dict(zip(closed.jaxpr.invars, origins, strict=True))
    fresh = counter.__next__
    env |= {v: constant(fresh, c) for v, c in zip(closed.jaxpr.constvars, closed.consts, strict=True)}

    def read(atom):
        return env[atom] if not hasattr(atom, "val") else constant(fresh, atom.val)

    for eqn in closed.jaxpr.eqns:
        env.update(zip(eqn.outvars, propagate(fresh, eqn, [read(a) for a in eqn.invars]), strict=True))
    return [read(atom) for atom in closed.jaxpr.outvars]


def data(tensor=0, nonnegative=False):
    return Origin((), True, tensor, nonnegative)


def parameter(leaf, tensor=0):
    return Origin((leaf,), False, tensor, False)


# ---- signs ----------------------------------------------------------------------------------------------------------

# name -> (function of x [2, 3], the sign of x, the sign that must be found)
SIGNS = {
    "relu": (jax.nn.relu, ANY, UP),
    "flax relu": (nn.relu, ANY, UP),
    "relu6": (jax.nn.relu6, ANY, UP),
    "sigmoid": (jax.nn.sigmoid, ANY, UP),
    "softmax": (jax.nn.softmax, ANY, UP),
    "exp": (jnp.exp, ANY, UP),
    "square": (lambda x: x * x, ANY, UP),
    "integer power": (lambda x: x**4, ANY, UP),
    "odd power": (lambda x: x**3, ANY, ANY),
    "odd power of what is not negative": (lambda x: x**3, UP, UP),
    "absolute": (jnp.abs, ANY, UP),
    "max with 0": (lambda x: jnp.maximum(x, 0), ANY, UP),
    "max with -1": (lambda x: jnp.maximum(x, -1), ANY, ANY),
    "min with 0": (lambda x: jnp.minimum(x, 0), UP, UP),
    "min with -1": (lambda x: jnp.minimum(x, -1), UP, ANY),
    "clipped": (lambda x: lax.clamp(0.0, x, 6.0), ANY, UP),
    "clipped from below 0": (lambda x: lax.clamp(-1.0, x, 6.0), ANY, ANY),
    "sum": (lambda x: x + 1.0, UP, UP),
    "difference": (lambda x: x - 1.0, UP, ANY),
    "negative": (lambda x: -x, UP, ANY),
    "product with -1": (lambda x: x * -1.0, UP, ANY),
    "quotient": (lambda x: x / 3.0, UP, UP),
    "mean": (lambda x: x.mean(0), UP, UP),
    "mean of any": (lambda x: x.mean(0), ANY, ANY),
    "variance": (lambda x: jnp.square(x - x.mean(0)).mean(0), ANY, UP),
    "pooled": (lambda x: nn.max_pool(x[None, :, :, None], (2, 2)), UP, UP),
    "averaged": (lambda x: nn.avg_pool(x[None, :, :, None], (2, 2), padding="SAME"), UP, UP),
    "padded": (lambda x: jnp.pad(x, 1), UP, UP),
    "padded with -1": (lambda x: jnp.pad(x, 1, constant_values=-1), UP, ANY),
    "joined": (lambda x: jnp.concatenate([x, jnp.zeros_like(x)]), UP, UP),
    "joined with what may be negative": (lambda x: jnp.concatenate([jax.nn.relu(x), x]), ANY, ANY),
    "chosen": (lambda x: jnp.where(x > 1, x, 0.5), UP, UP),
    "chosen, one may be negative": (lambda x: jnp.where(x > 1, jax.nn.relu(x), x), ANY, ANY),
    "gathered": (lambda x: x[jnp.array([1, 0, 1])], UP, UP),
    "turned": (lambda x: x[::-1].T.reshape(-1), UP, UP),
    "rounded": (jnp.round, UP, UP),
    "tanh": (jnp.tanh, UP, UP),
    "gelu": (jax.nn.gelu, ANY, ANY),
    "silu": (jax.nn.silu, ANY, ANY),
    "leaky": (jax.nn.leaky_relu, ANY, ANY),
    "half floats": (lambda x: jax.nn.relu(x).astype(jnp.bfloat16), ANY, UP),
    "relu, remade": (jax.checkpoint(lambda x: jax.nn.relu(x)), ANY, UP),
    "logarithm": (lambda x: jnp.log(x + 1e-3), UP, ANY),
    "sines": (jnp.sin, UP, ANY),
}


@pytest.mark.parametrize("name", SIGNS)
def test_signs(name):
    """What is called >= 0 is so for a thousand inputs; what is not is below 0 for some: nothing is claimed or lost."""
    function, given, expected = SIGNS[name]
    (origin,) = origins_of(function, data(nonnegative=given == UP))
    x = 3 * np.random.default_rng(0).standard_normal((1000, 2, 3)).astype(np.float32)
    out = np.asarray(jax.vmap(function)(np.abs(x) if given == UP else x), np.float32)
    assert origin.nonnegative == (expected == UP) == bool((out >= 0).all())


def test_products_and_sums_of_two():
    def both(function, a, b):
        return origins_of(function, data(0, a), data(1, b))[0].nonnegative

    for function in (jnp.add, jnp.multiply, lambda x, y: x @ y.T):
        found = {(a, b): both(function, a, b) for a, b in itertools.product((False, True), repeat=2)}
        assert found == {(False, False): False, (False, True): False, (True, False): False, (True, True): True}
    assert both(jnp.maximum, False, True) and not both(jnp.minimum, False, True) and not both(jnp.subtract, True, True)


def test_constants():
    signs = {repr(c): constant(int, c).nonnegative for c in (0.0, 2, -1.0, True, np.array([0, 3]), np.array([1, -3]))}
    assert list(signs.values()) == [True, True, False, True, True, False]
    assert not constant(int, jnp.ones(3)).nonnegative  # an array on a device is not read
    assert constant(int, 1.0).leaves == () and not constant(int, 1.0).data


# ---- where from -----------------------------------------------------------------------------------------------------

# functions of (x data, v parameter, w parameter), each [2, 3]
MIXTURES = {
    "a parameter, scaled": lambda x, v, w: 2 * w.T,
    "two parameters": lambda x, v, w: (v * w).sum(0),
    "two parameters, apart": lambda x, v, w: jnp.concatenate([w, v]),
    "data with a parameter": lambda x, v, w: x * w,
    "data alone": lambda x, v, w: jnp.tanh(x),
    "a constant": lambda x, v, w: jnp.ones(3) + 1,
    "within a call": lambda x, v, w: jax.jit(lambda a, b: a + b)(v, w),
    "the first of two, by way of a call": lambda x, v, w: jax.nn.relu(v),
}


@pytest.mark.parametrize("name", MIXTURES)
def test_leaves_are_those_that_reach_the_value(name):
    """Against derivatives: an input is named if and only if the output has a slope in it; with data in it none is."""
    function = MIXTURES[name]
    (origin,) = origins_of(function, data(0), parameter("v", 1), parameter("w", 2))
    arrays = np.random.default_rng(0).uniform(0.5, 1, (3, 2, 3)).astype(np.float32)
    slopes = [np.abs(slope).max() > 0 for slope in jax.jacrev(function, (0, 1, 2))(*arrays)]
    assert origin.data == slopes[0]
    expected = set() if slopes[0] else {leaf for leaf, reached in zip("vw", slopes[1:], strict=True) if reached}
    assert set(origin.leaves) == expected and origin.is_weight == bool(expected)


@pytest.mark.parametrize(
    "same, function",
    [
        (True, lambda x: x.reshape(-1)),
        (True, lambda x: x.T),
        (True, lambda x: x[None, :, None]),
        (True, lambda x: x.astype(jnp.bfloat16)),
        (True, lambda x: jnp.broadcast_to(x, (4, 2, 3))),
        (False, lambda x: 2 * x),
        (False, jax.nn.relu),
        (False, lambda x: x[:1]),
    ],
)
def test_which_tensors_are_one(same, function):
    """The same numbers in another shape, order or type are the same tensor; other numbers, or some of them, are not."""
    (origin,) = origins_of(function, data(7))
    assert (origin.tensor == 7) == same
    x = np.arange(1.0, 7, dtype=np.float32).reshape(2, 3)
    assert (set(np.unique(np.asarray(function(x), np.float32))) == set(x.ravel())) == same or function is jax.nn.relu


def test_stacks_stay_with_their_leaves():
    """A leaf that a scan slices is known as such behind further operations, and beside leaves that none slices."""
    sliced = Origin(("v",), False, 1, False, (0,))
    (origin,) = origins_of(lambda v, w: v * w, sliced, parameter("w", 2))
    assert origin.stack == (0,) and origin.leaves == ("v", "w")
    (origin,) = origins_of(lambda v, x: v * x, sliced, data(2))
    assert origin.stack == () and origin.data
