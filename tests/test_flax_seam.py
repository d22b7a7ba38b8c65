"""The seam: a model run through it is the model run by Flax itself, in both modes, Linen and NNX."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

from mpq_jax import Refusal, flax_seam

X = jnp.asarray(np.random.default_rng(0).normal(size=(6, 3)), jnp.float32)


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x, scale=1.0, train=False):
        x = nn.BatchNorm(use_running_average=not train, momentum=0.5)(nn.Dense(4)(x))
        return scale * nn.Dropout(0.5, deterministic=not train)(x)


class Nnx(nnx.Module):
    """No flag in its call; a list of layers, whose paths are numbers."""

    def __init__(self, rngs):
        self.layers = nnx.List([nnx.Linear(3, 4, rngs=rngs), nnx.BatchNorm(4, momentum=0.5, rngs=rngs)])
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x, scale=1.0):
        for layer in self.layers:
            x = layer(x)
        return scale * self.dropout(x)


def same(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), a, b)


def test_linen_is_flax_s_own_call():
    seam = flax_seam.seam(Linen())
    variables = Linen().init(jax.random.key(0), X)
    rngs = {"dropout": jax.random.key(3)}
    out, updates = seam.run(variables, (X,), {"train": False, "scale": 2.0}, False, None)
    same(out, Linen().apply(variables, X, scale=2.0))
    assert updates == {} and seam.variables is None
    out, updates = seam.run(variables, (X, 2.0), {"train": True}, ["batch_stats"], rngs)
    expected = Linen().apply(variables, X, 2.0, train=True, mutable=["batch_stats"], rngs=rngs)
    same((out, updates), expected)
    shapes = seam.shapes((X,), {"train": True})
    assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, dict(variables))
    assert flax_seam.mutable_collections(variables) == ["batch_stats"]


def test_nnx_is_the_module_s_own_call():
    """train and eval, random streams and new statistics; the user's module itself is left as it was."""
    model, twin = Nnx(nnx.Rngs(0)), Nnx(nnx.Rngs(0))
    seam = flax_seam.seam(model)
    before = {name: jax.tree.map(np.asarray, seam.variables[name]) for name in ("params", "batch_stats", "RngCount")}
    assert set(seam.variables) == {"params", "batch_stats", "RngKey", "RngCount"}
    assert set(flax_seam.flatten(seam.variables["params"])) == {
        f"layers/{i}/{n}" for i, n in ((0, "kernel"), (0, "bias"), (1, "scale"), (1, "bias"))
    }
    float_kernel = np.asarray(twin.layers[0].kernel.get_value())
    np.testing.assert_array_equal(seam.variables["params"]["layers"]["0"]["kernel"], float_kernel)
    twin.train()
    out, updates = seam.run(seam.variables, (X,), {"train": True, "scale": 3.0}, ["batch_stats"], None)
    same(out, twin(X, 3.0))
    assert set(updates) == {"batch_stats"}
    same(updates["batch_stats"]["layers"]["1"]["mean"], twin.layers[1].mean.get_value())
    twin.eval()
    moved = {**seam.variables, **updates}
    same(seam.run(moved, (X,), {"train": False}, False, None)[0], twin(X))
    same(seam.run(moved, (X,), {"deterministic": True}, False, None)[0], twin(X))
    every = seam.run(seam.variables, (X,), {"train": True}, True, None)[1]
    assert set(every) == set(seam.variables)
    drawn, earlier = (sum(jax.tree.leaves(tree["RngCount"])) for tree in (every, before))
    assert drawn == earlier + 1  # by the one dropout
    after = flax_seam.seam(model).variables
    jax.tree.map(np.testing.assert_array_equal, before, {name: after[name] for name in before})
    assert jax.tree.map(jnp.shape, seam.shapes((), {})) == jax.tree.map(jnp.shape, seam.variables)
    for rngs in (jax.random.key(0), {"dropout": jax.random.key(0)}):
        with pytest.raises(Refusal, match="carries its own random streams; leave rngs out"):
            seam.run(seam.variables, (X,), {}, False, rngs)


class Sows(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.BatchNorm(3, momentum=0.5, rngs=rngs)

    def __call__(self, x):
        self.sow(nnx.Intermediate, "seen", x)
        return self.norm(x)


def test_what_an_nnx_call_sows_is_not_a_variable_of_the_model():
    seam, twin = flax_seam.seam(Sows(nnx.Rngs(0))), nnx.BatchNorm(3, momentum=0.5, rngs=nnx.Rngs(0))
    out, updates = seam.run(seam.variables, (X,), {"train": True}, ["batch_stats"], None)
    same(out, twin(X))
    same(updates["batch_stats"]["norm"]["mean"], twin.mean.get_value())


def test_other_parameters_are_used_and_not_the_module_s_own():
    seam = flax_seam.seam(Nnx(nnx.Rngs(0)))
    doubled = {**seam.variables, "params": jax.tree.map(lambda p: 2 * p, seam.variables["params"])}

    @jax.jit
    def run(variables):
        return seam.run(variables, (X,), {"train": False}, False, None)[0]

    twin = Nnx(nnx.Rngs(0))
    for variable in (twin.layers[0].kernel, twin.layers[0].bias, twin.layers[1].scale, twin.layers[1].bias):
        variable.set_value(2 * variable.get_value())
    twin.eval()
    same(run(doubled), twin(X))


@pytest.mark.parametrize("model", [3, None, nn.Dense, lambda x: x])
def test_what_is_no_model(model):
    with pytest.raises(Refusal, match=f"^{type(model).__name__} is neither"):
        flax_seam.seam(model)


def test_trees_there_and_back():
    tree = {"a": {"b": {"c": 1}, "d": 2}, "e": 3}
    flat = flax_seam.flatten(tree)
    assert flat == {"a/b/c": 1, "a/d": 2, "e": 3} and flax_seam.unflatten(flat) == tree
    odd = {"norm": {"dense/kernel/scale": 1, "a~1b~": 2, "a": {"b": 3}}}  # as flax.linen.WeightNorm names its scales
    assert len(flax_seam.flatten(odd)) == 3 and flax_seam.unflatten(flax_seam.flatten(odd)) == odd


def test_arrays_are_told_from_other_arguments():
    """Arrays and shapes are exchanged; numbers, text, flags and None stay; whatever the nesting."""
    shape = jax.ShapeDtypeStruct((2,), jnp.float32)
    tree = {"x": (np.ones(3), 2, "text"), "y": [shape, None, True], "z": jnp.zeros(())}
    arrays, rebuild = flax_seam.split_arrays(tree)
    assert [np.shape(a) for a in arrays] == [(3,), (2,), ()]
    assert rebuild(["a", "b", "c"]) == {"x": ("a", 2, "text"), "y": ["b", None, True], "z": "c"}
