"""The ViT under nn.scan, nn.remat and dropout."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpq_jax import models

pytestmark = pytest.mark.usefixtures("quick_compilation")
VIT = {"patch_size": 2, "dim": 12, "depth": 2, "heads": 3}


def _shapes(model: Any, image: tuple[int, ...]) -> Any:
    return jax.eval_shape(model.init, _key(), jnp.zeros((1, *image)))


def _key(seed: int = 0) -> jax.Array:
    """A key of the generator that compiles fastest: "rbg" splits keys, as each scan does, by the default generator."""
    return jax.random.key(seed, impl="unsafe_rbg")


def _flat(tree: Any) -> dict[str, Any]:
    found = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(key, simple=True, separator="/"): leaf for key, leaf in found}


def _stacked(params: dict[str, Any]) -> dict[str, Any]:
    """Parameters of block1, block2, … -> those of the scanned model."""
    blocks = [params[f"block{i + 1}"] for i in range(VIT["depth"])]
    rest = {name: value for name, value in params.items() if not name.startswith("block")}
    return {**rest, "blocks": jax.tree.map(lambda *leaves: jnp.stack(leaves), *blocks)}


def _vit_variables() -> tuple[dict[str, Any], np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = _shapes(models.create("vit", 5, **VIT), (6, 4, 1))
    # Far from the small initial values, under which attention is nearly uniform.
    variables = jax.tree.map(lambda s: jnp.asarray(0.5 * rng.standard_normal(s.shape), s.dtype), shapes)
    return variables, rng.standard_normal((2, 6, 4, 1)).astype(np.float32)


def _value_and_gradient(options: dict[str, Any], variables: Any, x: np.ndarray) -> Any:
    model = models.create("vit", 5, **VIT, **options)

    def loss(variables: Any) -> tuple[jax.Array, jax.Array]:
        logits = model.apply(variables, x)
        return jnp.sum(jnp.sin(logits)), logits

    return jax.jit(jax.value_and_grad(loss, has_aux=True))(variables)


@pytest.fixture(scope="module")
def plain_vit() -> tuple[Any, np.ndarray, Any]:
    """(variables, images, ((loss, logits), gradient)) of the ViT without options."""
    variables, x = _vit_variables()
    return variables, x, _value_and_gradient({}, variables, x)


@pytest.mark.parametrize("options", [{"scan": True}, {"remat": True}, {"scan": True, "remat": True}])
def test_scan_and_remat_change_neither_logits_nor_gradients(options: dict[str, Any], plain_vit: Any) -> None:
    variables, x, ((_, logits), gradient) = plain_vit
    if options.get("scan"):
        variables, gradient = {"params": _stacked(variables["params"])}, {"params": _stacked(gradient["params"])}
    (_, found), found_gradient = _value_and_gradient(options, variables, x)
    np.testing.assert_allclose(found, logits, rtol=1e-5, atol=1e-5)
    expected = _flat(gradient)
    assert list(_flat(found_gradient)) == list(expected)
    for path, leaf in _flat(found_gradient).items():
        np.testing.assert_allclose(leaf, expected[path], rtol=1e-4, atol=1e-4, err_msg=path)


@pytest.mark.parametrize("scan", [False, True])
def test_scanned_blocks_start_different_and_are_seen_by_interceptors(scan: bool) -> None:
    model = models.create("vit", 5, **VIT, scan=scan)
    seen = []

    def note(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        if isinstance(context.module, (nn.Dense, nn.DenseGeneral, nn.Conv)):
            seen.append("/".join(context.module.path))
        return call(*args, **kwargs)

    variables = jax.jit(model.init)(_key(), jnp.zeros((1, 6, 4, 1)))
    with nn.intercept_methods(note):
        jax.eval_shape(model.apply, variables, jnp.zeros((1, 6, 4, 1)))
    blocks = ["blocks"] if scan else ["block1", "block2"]
    layers = [f"{b}/{layer}" for b in blocks for layer in ("attn/query", "attn/out", "mlp/fc1", "mlp/fc2")]
    assert {"patch_embed", "head", *layers} <= set(seen)
    params = variables["params"] if scan else _stacked(variables["params"])
    kernels = params["blocks"]["mlp"]["fc1"]["kernel"]
    assert kernels.shape == (2, 12, 48) and not np.any(kernels[0] == kernels[1])


@pytest.mark.parametrize("scan", [False, True])
def test_dropout_acts_in_training_only(scan: bool) -> None:
    variables, x = _vit_variables()
    variables = {"params": _stacked(variables["params"])} if scan else variables
    model = models.create("vit", 5, **VIT, scan=scan, dropout=0.5)
    train = jax.jit(lambda key: model.apply(variables, x, train=True, rngs={"dropout": key}))
    one, same, other = (np.asarray(train(_key(k))) for k in (0, 0, 1))
    assert np.array_equal(one, same) and not np.allclose(one, other)
    plain = models.create("vit", 5, **VIT, scan=scan)
    assert str(jax.make_jaxpr(model.apply)(variables, x)) == str(jax.make_jaxpr(plain.apply)(variables, x))


@pytest.mark.parametrize(
    ("options", "words"), [({"patch_size": 5}, "patch_size 5 must divide"), ({"heads": 5}, "heads 5 must divide")]
)
def test_vit_says_what_must_divide_what(options: dict[str, int], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        _shapes(models.create("vit", 10, **options), (32, 32, 3))
