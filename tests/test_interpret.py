"""The walk of a jaxpr: what a handler puts in place of a product, against the same function written with it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from mpq_jax import ops
from mpq_jax.interpret import contraction_macs, interpret

RNG = np.random.default_rng(0)


def array(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


def walked(function, params, x, handler, values=None):
    """(outputs, taps, trace) of function(params, x); params: {path: array}, the same paths as leaves."""
    names, flat = list(params), [*params.values(), x]
    closed = jax.make_jaxpr(lambda flat: function(dict(zip(names, flat[:-1], strict=True)), flat[-1]))(flat)
    return interpret(closed, flat, [*names, None], values or {}, handler)


def times(call, lhs, rhs, value):
    """The product with its weight multiplied by the value; taps it."""
    operands = [lhs, rhs]
    operands[call.weight_side] = operands[call.weight_side] * (1.0 if value is None else value)
    return ops.contract(call.primitive, call.params, "plain")(*operands), value


def recorder(calls):
    def handler(call, lhs, rhs, value):
        calls.append(call)
        return ops.contract(call.primitive, call.params, "plain")(lhs, rhs), None

    return handler


# ---- the handler's place --------------------------------------------------------------------------------------------


def loop(params, x):
    """A stack of layers under a scan, within jit and remat, and a layer before it."""

    @jax.checkpoint
    def layer(x, w):
        return jnp.tanh(x @ w), x.sum()

    x, sums = jax.jit(lambda x, stack: lax.scan(layer, x, stack))(x @ params["first"], params["stack"])
    return x * sums.sum()


def test_values_of_a_layer_and_of_each_in_a_stack():
    """Weights times their values, in the function itself; the stack's values are sliced as its weights are."""
    params, x = {"first": array(4, 4), "stack": array(3, 4, 4)}, array(2, 4)
    values = {"first": jnp.float32(2.0), "stack": jnp.float32([1.5, -1.0, 0.5])}

    @jax.jit
    def run(params, values):
        return walked(loop, params, x, times, values)[:2]

    (out,), taps = run(params, values)
    changed = {"first": 2 * params["first"], "stack": params["stack"] * values["stack"][:, None, None]}
    np.testing.assert_allclose(out, loop(changed, x), rtol=1e-4, atol=1e-5)
    assert set(taps) == {("first", 0), ("stack", 0)}
    np.testing.assert_array_equal(taps["stack", 0], values["stack"])
    # And so are gradients, through remat and scan, of weights and of values.
    mine = jax.grad(lambda params, values: run(params, values)[0][0].sum(), (0, 1))(params, values)

    def by_hand(params, values):
        stack = params["stack"] * values["stack"][:, None, None]
        return loop({"first": values["first"] * params["first"], "stack": stack}, x).sum()

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
        mine,
        jax.grad(by_hand, (0, 1))(params, values),
    )


def shared(params, x):
    """One weight twice, the second time transposed and from the left."""
    return (params["w"].T @ jnp.tanh(x @ params["w"]).T).T


def test_a_value_for_one_call_alone():
    params, x = {"w": array(4, 4)}, array(2, 4)
    (out,), _, _ = walked(shared, params, x, times, {"w": 2.0, ("w", 1): 3.0})
    expected = 3.0 * jnp.tanh(x @ (2.0 * params["w"])) @ params["w"]
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-5)
    calls = []
    walked(shared, params, x, recorder(calls))
    assert [(call.leaf, call.number, call.weight_side, call.channel_axes) for call in calls] == [
        ("w", 0, 1, (1,)),
        ("w", 1, 0, (0,)),
    ]


def test_values_for_each_run_of_a_recurrent_layer():
    """A weight that a scan does not slice: one value for all runs, or values of the call, one a run."""

    def again(params, x):
        return lax.scan(lambda x, _: (jnp.tanh(x @ params["w"]), None), x, None, length=3)[0]

    params, x = {"w": array(4, 4)}, array(2, 4)
    own = jnp.float32([1.0, -0.5, 2.0])
    (out,), taps, _ = walked(again, params, x, times, {("w", 0): own})
    expected = x
    for value in own:
        expected = jnp.tanh(expected @ (value * params["w"]))
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(taps["w", 0], own)
    (out,), _, _ = walked(again, params, x, times, {"w": jnp.float32(2.0)})
    np.testing.assert_allclose(out, again({"w": 2.0 * params["w"]}, x), rtol=1e-4, atol=1e-5)


# ---- what counts as a layer -----------------------------------------------------------------------------------------


def test_weights_computed_from_parameters_are_weights():
    """Two parameters' product is a weight, named for the larger; two activations' product is none of ours."""

    def function(params, x):
        w = params["left"] @ params["right"]  # [4, 3]
        y = x @ w
        return y @ y.T

    calls, params = [], {"left": array(4, 5), "right": array(5, 3)}
    _, _, trace = walked(function, params, array(2, 4), recorder(calls))
    assert [(call.leaf, call.macs) for call in calls] == [("left", 2 * 4 * 3)]
    assert [macs for _, macs in trace.products] == [2 * 2 * 3] and trace.unreached == []


def test_what_cannot_be_reached_is_told_with_its_place():
    def function(params, x):
        with jax.named_scope("tower"):
            return lax.cond(x.sum() > 0, lambda x: x @ params["a"], lambda x: x @ params["b"], x)

    params, x = {"a": array(4, 4), "b": array(4, 4)}, array(2, 4)
    calls = []
    (out,), _, trace = walked(function, params, x, recorder(calls))
    np.testing.assert_allclose(out, function(params, x), rtol=1e-4, atol=1e-5)
    assert calls == []
    ((where, primitive, leaves),) = trace.unreached
    assert "tower" in where and primitive == "cond" and set(leaves) == {"a", "b"}


def test_products_inside_scans_count_every_run():
    def function(params, x):
        def step(x, _):
            return jnp.tanh(x @ x.T @ x @ params["w"]), None

        return lax.scan(step, x, None, length=5)[0]

    calls = []
    _, _, trace = walked(function, {"w": array(4, 4)}, array(2, 4), recorder(calls))
    assert [macs for _, macs in trace.products] == [5 * 2 * 2 * 4] * 2
    assert [(call.scans, call.stack, call.macs) for call in calls] == [((5,), (), 2 * 4 * 4)]


def test_nested_scans_are_counted_from_outside():
    def function(params, x):
        def outer(x, stack):
            return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, stack)[0], None

        return lax.scan(outer, x, params["w"])[0]

    calls, params, x = [], {"w": array(3, 2, 4, 4)}, array(5, 4)
    values = jnp.arange(1.0, 7).reshape(3, 2)
    (out,), taps, _ = walked(function, params, x, times, {"w": values})
    np.testing.assert_allclose(out, function({"w": params["w"] * values[..., None, None]}, x), rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(taps["w", 0], values)
    walked(function, params, x, recorder(calls))
    assert calls[-1].scans == (3, 2) and calls[-1].stack == (0, 1)


def test_what_a_loop_changes_is_no_longer_the_parameter():
    """A weight in the carry: handed on untouched it is the layer's, changed by a step it is not."""

    def function(params, x, changed):
        def step(carry, _):
            x, w = carry
            return (jnp.tanh(x @ w), w * 0.5 if changed else w), None

        return lax.scan(step, (x, params["w"]), None, length=3)[0][0]

    for changed in (False, True):
        calls, params, x = [], {"w": array(4, 4)}, array(2, 4)
        _, _, trace = walked(lambda p, x, c=changed: function(p, x, c), params, x, recorder(calls))
        assert [call.leaf for call in calls] == ([] if changed else ["w"])
        assert len(trace.products) == changed


# ---- multiply-accumulates -------------------------------------------------------------------------------------------


def macs_of(product, lhs, rhs):
    """contraction_macs of the one product in a function."""
    closed = jax.make_jaxpr(product)(jnp.ones(lhs), jnp.ones(rhs))
    (eqn,) = closed.jaxpr.eqns
    return contraction_macs(eqn.primitive.name, eqn.params, *(v.aval for v in (*eqn.invars, *eqn.outvars)))


@pytest.mark.parametrize(
    "text, lhs, rhs",
    [("ab,bc->ac", (2, 3), (3, 5)), ("abc,dbc->ad", (2, 3, 4), (5, 3, 4)), ("gab,gbc->gac", (6, 2, 3), (6, 3, 5))],
)
def test_macs_of_dot_products(text, lhs, rhs):
    """A product of ones counts its own multiplications."""
    found = macs_of(lambda a, b: lax.dot_general(a, b, _numbers(text)), lhs, rhs)
    assert found == np.einsum(text, np.ones(lhs), np.ones(rhs)).sum()


def _numbers(text):
    a, b, out = text.replace("->", ",").split(",")
    both = [c for c in a if c in b]
    sums, batch = [c for c in both if c not in out], [c for c in both if c in out]
    return tuple(tuple(tuple(side.index(c) for c in letters) for side in (a, b)) for letters in (sums, batch))


@pytest.mark.parametrize(
    "stride, pad, dilation, groups", [((1, 1), 1, 1, 1), ((2, 1), 0, 1, 2), ((1, 2), 2, 2, 4), ((3, 3), 1, 1, 1)]
)
def test_macs_of_convolutions(stride, pad, dilation, groups):
    """Of ones, padded with ones: what meets the padding is multiplied too."""

    def product(x, w, pad=pad):
        options = {"rhs_dilation": (dilation,) * 2, "feature_group_count": groups}
        return lax.conv_general_dilated(
            x, w, stride, [(pad, pad)] * 2, dimension_numbers=("NHWC", "HWIO", "NHWC"), **options
        )

    x, w = (2, 7, 9, 4), (3, 2, 4 // groups, 8)
    padded = jnp.ones((2, 7 + 2 * pad, 9 + 2 * pad, 4))
    assert macs_of(product, x, w) == float(product(padded, jnp.ones(w), pad=0).sum())


def test_macs_of_a_transposed_convolution():
    """Every sample meets every tap once; the zeros between samples are not counted."""

    def product(x, w):
        full = [(2, 2), (1, 1)]
        return lax.conv_general_dilated(
            x, w, (1, 1), full, lhs_dilation=(2, 3), dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    x, w = (2, 4, 3, 4), (3, 2, 4, 5)
    assert macs_of(product, x, w) == float(product(jnp.ones(x), jnp.ones(w)).sum())
