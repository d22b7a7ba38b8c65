"""What an equation holds: each kind of call, one for one against JAX, and in every walk that goes through a model."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.custom_batching import custom_vmap

from mpq_jax import Bits, quantize
from mpq_jax.criteria.coupling import Pair, coupled_pairs
from mpq_jax.export import litert
from mpq_jax.export.graph import graph
from mpq_jax.jaxprs import bind, called, contains, loop, outputs_of

X = np.linspace(-1, 2, 12, dtype=np.float32).reshape(3, 4)


def with_jvp(function):
    call = jax.custom_jvp(function)
    call.defjvp(lambda primals, tangents: jax.jvp(function, primals, tangents))
    return call


def with_vjp(function):
    call = jax.custom_vjp(function)
    call.defvjp(lambda *args: (function(*args), args), lambda args, g: jax.vjp(function, *args)[1](g))
    return call


def with_vmap(function):
    call = custom_vmap(function)

    @call.def_vmap
    def rule(size, batched, *args):
        axes = tuple(0 if each else None for each in batched)
        outs = jax.vmap(function, axes, axis_size=size)(*args)
        return outs, jax.tree.map(lambda _: True, outs)

    return call


CALLS = {
    "jit": jax.jit,
    "checkpoint": jax.checkpoint,
    "custom_jvp": with_jvp,
    "custom_vjp": with_vjp,
    "custom_vmap": with_vmap,
    "composite": functools.partial(jax.lax.composite, name="test.composite"),
}
calls = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)


def run(closed, *arguments):
    """A jaxpr by `outputs_of`, into all calls and loops: nothing but single operations is left to JAX."""

    def equation(eqn, ins):
        if (body := called(eqn)) is not None:
            return run(body, *ins)
        if eqn.primitive.name == "scan":
            there = loop(eqn, ins)
            return there.unrolled(lambda _, operands: run(there.body, *operands), lambda x, i: x[i], jnp.stack)
        return bind(eqn, ins)

    return outputs_of(closed.jaxpr, [*closed.consts, *arguments], lambda literal: literal.val, equation)


@calls
def test_a_body_takes_the_operands_and_gives_the_outputs(call):
    """Two operands that are not alike, two outputs in another order, and a constant of the body's own."""
    function = call(lambda x, y: (y - 3 * x, jnp.sin(x) + np.arange(4, dtype=np.float32)))
    closed = jax.make_jaxpr(function)(X, 2 * X)
    assert [called(eqn) is not None for eqn in closed.eqns] == [True]
    np.testing.assert_allclose(run(closed, X, 2 * X), function(X, 2 * X), rtol=1e-6)


@pytest.mark.parametrize("reverse", [False, True])
def test_a_loop_written_out(reverse):
    """A constant, a carry that depends on the order, and two stacked outputs."""

    def function(x, factor):
        def step(carry, row):
            carry = factor * carry + row
            return carry, (carry.sum(), row - carry)

        carry, (sums, rows) = jax.lax.scan(step, jnp.zeros(4), x, reverse=reverse)
        return carry, sums, rows

    closed = jax.make_jaxpr(function)(X, 0.5)
    for mine, theirs in zip(run(closed, X, 0.5), function(X, 0.5), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-6)


def test_contains_looks_into_branches_and_loops():
    def function(x):
        return jax.lax.cond(x.sum() > 0, lambda x: jax.lax.fori_loop(0, 3, lambda _, x: jnp.sin(x), x), jnp.negative, x)

    closed = jax.make_jaxpr(function)(X)
    assert contains(closed, ["sin"]) and contains(closed, ["cos", "neg"]) and not contains(closed, ["cos"])


# ---- in the walks -------------------------------------------------------------------------------------------------


class Net(nn.Module):
    """Two layers; between them a call: of relu, or of an addition that joins what both make."""

    call: object

    @nn.compact
    def __call__(self, x):
        first = nn.Dense(4, name="first")(x)
        second = nn.Dense(4, name="second")(self.call(nn.relu)(first))
        return nn.Dense(3, name="head")(self.call(jnp.add)(first, second))


@calls
def test_signs_pass_through_every_call(call):
    """relu's output is never negative, whatever call it stands in: the layer behind it has a grid without a sign."""
    model = quantize(Net(call), X)
    assert [spec.signed for spec in model.specs.values()] == [True, False, True]


@calls
def test_parameters_and_tensors_keep_their_identity_in_every_call(call):
    """A call of a parameter and of data: the one is a weight behind it, the other still the tensor it was."""

    class Scaled(nn.Module):
        @nn.compact
        def __call__(self, x):
            kernel = self.param("kernel", nn.initializers.normal(), (4, 5))
            kernel, y = call(lambda kernel, x: (2 * kernel, x.reshape(3, 4)))(kernel, x)
            return y @ kernel, nn.Dense(2, name="dense")(x)

    model = quantize(Scaled(), X, ends=None)
    layers = {layer.path: layer for layer in model.layers}
    assert layers.keys() == {"kernel", "dense"}
    assert layers["kernel"].tied is not None and layers["kernel"].tied == layers["dense"].tied


@calls
def test_coupled_layers_through_every_call(call):
    """An addition joins what two layers make, in whatever call it stands."""

    class Joined(nn.Module):
        @nn.compact
        def __call__(self, x):
            first, second = (nn.Dense(4, name=name)(x) for name in ("first", "second"))
            return nn.Dense(3, name="head")(call(jnp.add)(first, second))

    model = quantize(Joined(), X)
    variables = jax.eval_shape(lambda: Joined().init(jax.random.key(0), X))
    assert set(coupled_pairs(model, variables, X)) == {
        Pair("first", "second", "residual"),
        Pair("first", "head", "neighbours"),
        Pair("second", "head", "neighbours"),
    }


@calls
def test_exports_write_every_call_out(call):
    """No call is left in the graph, nor in a program without loops, where one holds a loop."""
    net = Net(call)
    model = quantize(net, X)
    variables = jax.jit(lambda key: model.calibrate(net.init(key, X), X))(jax.random.key(0))
    nodes = graph(model, variables, {layer.path: layer.bits or Bits(4, 4) for layer in model.layers}, X).nodes
    assert [n.product.path for n in nodes if n.product] == ["first", "second", "head"]
    assert {n.name for n in nodes if not n.product} <= {"max", "add", "add_any"}

    closed = jax.make_jaxpr(call(lambda x: jax.lax.scan(lambda c, row: (c + row, c), jnp.zeros(4), x)[1]))(X)
    straight = jax.make_jaxpr(lambda x: litert.straight_line(closed, x))(X)
    assert contains(closed, ["scan"]) and not contains(straight, ["scan"])
    np.testing.assert_allclose(litert.straight_line(closed, X), np.cumsum(X, 0) - X, atol=1e-6)
