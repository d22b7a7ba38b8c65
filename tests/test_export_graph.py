"""The model as a list of operations: its runs against `apply`, its codes against `encode` and `exact=True`."""

import jax
import numpy as np
import pytest
from export_nets import case

from mpq_jax import Bits, Refusal
from mpq_jax.export import replay
from mpq_jax.export.fold import fold
from mpq_jax.export.graph import Constant, graph

pytestmark = pytest.mark.usefixtures("quick_compilation")
CASES = [
    ("net", "lsq", False),
    ("net", "lsq", True),
    ("stack", "lsq", False),
    ("tied", "lsq", False),
    ("turned", "lsq", False),
    ("nnx", "lsq", False),
]
CASES += [("net", "channels", False)]
# What is particular to a quantizer shows in one convolution and one dense layer.
CASES += [("nnx", quantizer, False) for quantizer in ("pact", "qil", "lq_nets")]


@pytest.fixture(scope="module", params=CASES, ids=lambda c: f"{c[0]}-{c[1]}{'-by_channel' if c[2] else ''}")
def made(request):
    found = case(*request.param)
    return found, graph(found.model, found.variables, found.policy, found.images, **found.kwargs)


def test_fake_quantized_run_is_apply(made):
    found, network = made
    expected = jax.jit(lambda v, x: found.model.apply(v, found.policy, x, **found.kwargs))(
        found.variables, found.images
    )
    (out,) = replay.run(network, replay.fake_quantized, found.images)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)
    assert np.std(expected) > 1e-2


def test_every_layer_is_there_with_its_bits_and_codes_in_range(made):
    found, network = made
    products = {node.product.path: node.product for node in network.products}
    assert list(products) == [layer.path for layer in found.model.layers]
    for path, product in products.items():
        assert product.bits == found.policy[path]
        codes, bits = product.weight.codes, np.asarray(product.bits.w)
        if bits.ndim:
            own = np.moveaxis(codes, product.channel_axes, range(len(product.channel_axes)))
            codes, bits = own.reshape(len(bits), -1), bits[:, None]
        low = 0 if product.weight.decoding.table is not None else -(2 ** (bits - 1))
        assert (codes >= low).all() and (codes <= low + 2**bits - 1).all()


def test_only_layers_and_what_they_need_is_left(made):
    _, network = made
    names = [node.name for node in network.nodes if node.product is None]
    assert not {"scan", "pjit", "jit", "custom_jvp_call"} & set(names)
    weights = {f"params/{node.product.leaf}" for node in network.products}
    read = {leaf for n in network.nodes for i in n.inputs if isinstance(i, Constant) for leaf in i.leaves}
    assert weights & read == ({"params/embed/embedding"} if "params/embed/embedding" in weights else set())


def test_integers_are_exact(made):
    """int32 sums, float32 sums of codes, and `apply(exact=True)`: the same to the last bit."""
    found, network = made
    if any(node.product.weight.decoding.table is not None for node in network.products):
        with pytest.raises(Refusal, match="table"):
            replay.run(network, replay.integer, found.images)
        return
    (integers,) = replay.run(network, replay.integer, found.images)
    (exact,) = replay.run(network, replay.exact, found.images)
    np.testing.assert_array_equal(integers, exact)
    if any(len(node.product.position) for node in network.products):  # a loop is compiled as a whole
        run = jax.jit(lambda v, x: found.model.apply(v, found.policy, x, exact=True, **found.kwargs))
        np.testing.assert_allclose(integers, run(found.variables, found.images), rtol=1e-5, atol=1e-5)
        return
    with jax.disable_jit():
        applied = found.model.apply(found.variables, found.policy, found.images, exact=True, **found.kwargs)
    np.testing.assert_array_equal(integers, applied)


@pytest.mark.parametrize("net", ["net", "nnx"])
def test_folding_leaves_no_normalisation_and_the_same_function(net):
    found = case(net)
    network = graph(found.model, found.variables, found.policy, found.images, **found.kwargs)
    folded = fold(network)
    assert len(folded.nodes) < len(network.nodes)
    (a,), (b,) = (replay.run(each, replay.fake_quantized, found.images) for each in (network, folded))
    # A value on the edge between two codes may fall on the other side: nearly all outputs agree, and all are near.
    assert np.isclose(a, b, rtol=1e-4, atol=1e-4).mean() > 0.9
    assert np.abs(a - b).max() < 0.3 * np.std(a)


def test_folded_pair_is_the_formula_of_batchnorm():
    found = case()
    network = fold(graph(found.model, found.variables, found.policy, found.images, **found.kwargs))
    product = next(node.product for node in network.products if node.product.path == "conv")
    p, s = found.variables["params"], found.variables["batch_stats"]["bn"]
    scale = np.asarray(p["bn"]["scale"], np.float64) / np.sqrt(np.asarray(s["var"], np.float64) + 1e-5)
    np.testing.assert_allclose(np.ravel(product.affine[0]), scale, rtol=1e-6)
    shift = (np.asarray(p["conv"]["bias"], np.float64) - s["mean"]) * scale + p["bn"]["bias"]
    np.testing.assert_allclose(np.ravel(product.affine[1]), shift, rtol=1e-5)


def test_symbolic_batch_gives_the_same_operations():
    found = case()
    (b,) = jax.export.symbolic_shape("b")
    shape = jax.ShapeDtypeStruct((b, *found.images.shape[1:]), np.float32)
    symbolic = graph(found.model, found.variables, found.policy, shape, **found.kwargs)
    fixed = graph(found.model, found.variables, found.policy, found.images, **found.kwargs)
    assert [node.name for node in symbolic.nodes] == [node.name for node in fixed.nodes]


def test_layers_whose_sums_float32_may_round_are_named():
    found = case()
    network = graph(found.model, found.variables, found.policy, found.images, **found.kwargs)
    assert replay.inexact(network) == []
    wide = []
    for node in network.nodes:
        if node.product is not None and node.product.path == "general":
            grown = node.product.weight._replace(codes=node.product.weight.codes * 2**23)
            node = node._replace(product=node.product._replace(weight=grown))
        wide.append(node)
    named = replay.inexact(network._replace(nodes=tuple(wide)))
    assert [each.path for each in named] == ["general"]
    largest = max(np.abs(grown.codes).sum(axis=0).ravel()) * (2 ** found.policy["general"].a - 1)
    assert named[0].largest == largest
    with pytest.raises(Refusal, match="int32"):
        beyond = [
            n._replace(product=n.product._replace(weight=n.product.weight._replace(codes=n.product.weight.codes << 29)))
            if n.product is not None and n.product.path == "general"
            else n
            for n in network.nodes
        ]
        replay.inexact(network._replace(nodes=tuple(beyond)))


def test_step_sizes_that_were_never_fitted_are_refused():
    found = case()
    a, params = found.policy["conv"].a, found.variables["params"]
    unfitted = {**params["conv"], "activation_step_size": params["conv"]["activation_step_size"] * np.nan}
    broken = {**found.variables, "params": {**params, "conv": unfitted}}
    with pytest.raises(Refusal, match=f"step_size of layer 'conv' at {a} bits is not positive and finite"):
        graph(found.model, broken, found.policy, found.images, **found.kwargs)


def test_policies_are_those_of_the_model():
    """What apply would not understand is refused; fixed layers may be left out, numbers may be NumPy's."""
    found = case()
    left_out = {path: bits for path, bits in found.policy.items() if path not in ("stem", "head")}
    numpys = {path: Bits(np.int64(bits.w), np.int64(bits.a)) for path, bits in left_out.items()}
    for own in (left_out, numpys):
        network = graph(found.model, found.variables, own, found.images, **found.kwargs)
        assert {node.product.path: node.product.bits for node in network.products} == dict(found.policy)
    wrong = [({"conv": Bits(9, 4)}, "9 weight bits"), ({"cnov": Bits(4, 4)}, "does not have .*'conv'")]
    wrong += [({"conv": Bits((2,) * 5, 4)}, "5 output channels"), ({"conv": Bits(32, 4)}, "32 weight bits")]
    for other, words in wrong:
        with pytest.raises(Refusal, match=words):
            graph(found.model, found.variables, {**found.policy, **other}, found.images, **found.kwargs)


def test_float_layers_stay_float():
    found = case(rules=(("conv", "float"),))
    assert found.policy["conv"] == Bits(32, 32)
    network = graph(found.model, found.variables, found.policy, found.images, **found.kwargs)
    product = next(node.product for node in network.products if node.product.path == "conv")
    assert product.weight is None and product.activation is None
    np.testing.assert_array_equal(product.operand, found.variables["params"]["conv"]["kernel"])
