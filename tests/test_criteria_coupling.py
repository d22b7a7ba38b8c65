"""Which layers are coupled, in networks whose wiring is known."""

import itertools

import jax
import jax.numpy as jnp

from mpq_jax import models
from mpq_jax.criteria.coupling import Pair, coupled_pairs, searched_pairs
from mpq_jax.quantized_model import quantize


def pairs_of(name, **options):
    model = models.create(name, 10, **options)
    x = jax.ShapeDtypeStruct((1, 8, 8, 1), jnp.float32)
    quantized = quantize(model, x, train=False)
    variables = quantized.variables or jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 1))))
    return quantized, coupled_pairs(quantized, variables, x, train=False)


def test_coupled_layers_of_a_residual_network():
    quantized, found = pairs_of("resnet8")
    neighbours = {(p.first, p.second) for p in found if p.kind == "neighbours"}
    residual = {(p.first, p.second) for p in found if p.kind == "residual"}
    blocks = [f"stage{i}/block1" for i in (1, 2, 3)]
    assert residual == {
        ("stem/conv", f"{blocks[0]}/conv2"),
        (f"{blocks[1]}/conv2", f"{blocks[1]}/shortcut_conv"),
        (f"{blocks[2]}/conv2", f"{blocks[2]}/shortcut_conv"),
    }
    ends = {0: ("stem/conv", f"{blocks[0]}/conv2"), 1: (f"{blocks[1]}/conv2", f"{blocks[1]}/shortcut_conv")}
    expected = {(f"{block}/conv1", f"{block}/conv2") for block in blocks} | {("stem/conv", f"{blocks[0]}/conv1")}
    for i, makers in ends.items():
        expected |= {(maker, f"{blocks[i + 1]}/{name}") for maker in makers for name in ("conv1", "shortcut_conv")}
    expected |= {(f"{blocks[2]}/{name}", "head") for name in ("conv2", "shortcut_conv")}
    assert neighbours == expected
    inner = searched_pairs(quantized, found)
    assert {p for p in found if "stem" not in p.first and p.second != "head"} == set(inner)


def test_coupled_layers_in_a_chain_and_in_a_scan():
    _, chain = pairs_of("cnn_nnx")
    assert chain == tuple(Pair(a, b, "neighbours") for a, b in itertools.pairwise(("conv1", "conv2", "conv3", "head")))
    options = {"depth": 2, "dim": 8, "heads": 2, "patch_size": 4}
    _, looped = pairs_of("vit", **options)
    _, scanned = pairs_of("vit", **options, scan=True)

    def renamed(path):
        for i in range(2):
            if path.endswith(f"[{i}]"):
                return path[:-3].replace("blocks/", f"block{i + 1}/")
        return path

    assert {(renamed(p.first), renamed(p.second), p.kind) for p in scanned} == set(looped)
    assert ("block1/mlp/fc2", "block2/attn/out", "residual") in set(looped)
