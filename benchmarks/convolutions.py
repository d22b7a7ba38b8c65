"""The convolutions of a net one by one: JAX's own, ours (mpq_jax/cpu_convolution.py) and PyTorch's, and what they bound.

  python benchmarks/convolutions.py [--models resnet8 mobilenetv1 resnet18] [--batch 64] [--repeats 5]

For every different convolution of the net: forward, input gradient and filter gradient, in ms; the same inside
`lax.map`; PyTorch's forward and both gradients where it is installed. The last line adds up all convolutions of the
net, as often as they occur: six times that no joint step of six rows can be faster than, whatever else it costs.
"""

import argparse
import functools
import importlib.util
import sys
from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.timing import timed
from mpq_jax import models, ops

NETS = {
    "resnet8": ({}, (28, 28, 1)),
    "mobilenetv1": ({"width": 0.25, "small_images": True}, (28, 28, 1)),
    "resnet18": ({}, (64, 64, 3)),
}
MAPPED = 3


def convolutions(name: str, batch: int) -> Counter:
    """{(lhs shape, rhs shape, parameters as sorted items, whether it is the first): how often}."""
    options, shape = NETS[name]
    model = models.create(name, 10, **options)
    images = jnp.zeros((batch, *shape))
    variables = jax.eval_shape(lambda x: model.init(jax.random.key(0), x), images[:1])
    jaxpr = jax.make_jaxpr(lambda v, x: model.apply(v, x, train=False))(variables, images).jaxpr
    found: Counter = Counter()

    def walk(jaxpr) -> None:
        for equation in jaxpr.eqns:
            if equation.primitive.name == "conv_general_dilated":
                lhs, rhs = (v.aval.shape for v in equation.invars)
                fields = {k: equation.params[k] for k in ops.FIELDS["conv_general_dilated"]}
                found[(lhs, rhs, tuple(sorted(fields.items())), not found)] += 1
            for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
                if hasattr(inner, "jaxpr") or hasattr(inner, "eqns"):
                    walk(getattr(inner, "jaxpr", inner))

    walk(jaxpr)
    return found


def median_ms(function, *arguments, repeats: int) -> float:
    call = functools.partial(function, *arguments)
    timed(call)  # compiles
    return 1e3 * float(np.median([timed(call) for _ in range(repeats)]))


def ours_and_jax(lhs, rhs, params, kernels, first: bool, repeats: int) -> dict[str, float]:
    """ms of the forward pass, of each gradient, and of all three in a loop; no input gradient of the first layer."""
    product = ops.contract("conv_general_dilated", params, kernels)

    def to_x(x, k, dy):
        return jax.vjp(lambda x: product(x, k), x)[1](dy)[0]

    def to_k(x, k, dy):
        return jax.vjp(lambda k: product(x, k), k)[1](dy)[0]

    dy = jnp.ones_like(product(lhs, rhs))
    functions = {"forward": lambda x, k, dy: product(x, k), "dx": to_x, "dk": to_k}
    if first:
        del functions["dx"]
    result = {name: median_ms(jax.jit(f), lhs, rhs, dy, repeats=repeats) for name, f in functions.items()}

    def mapped(x, k, dy):
        return lax.map(lambda k: tuple(f(x, k, dy * k.sum()) for f in functions.values()), jnp.stack([k] * MAPPED))

    result["in a loop"] = median_ms(jax.jit(mapped), lhs, rhs, dy, repeats=min(repeats, 3)) / MAPPED
    return result


def pytorch(lhs, rhs, params, first: bool, repeats: int) -> dict[str, float]:
    import torch

    groups, strides = params["feature_group_count"], params["window_strides"]
    # PyTorch pads alike on both sides: more rows of zeros than JAX's "SAME" where the stride is 2, to no effect on time.
    padding = tuple(max(pair) for pair in params["padding"])
    x = torch.tensor(np.array(lhs)).permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)
    k = torch.tensor(np.array(rhs)).permute(3, 2, 0, 1).contiguous(memory_format=torch.channels_last)

    def forward():
        return torch.nn.functional.conv2d(x, k, stride=strides, padding=padding, groups=groups)

    dy = torch.ones_like(forward())

    def backward():
        return torch.ops.aten.convolution_backward(
            dy, x, k, None, strides, padding, (1, 1), False, (0, 0), groups, (not first, True, False)
        )

    return {name: median_ms(f, repeats=repeats) for name, f in (("forward", forward), ("backward", backward))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=NETS, default=list(NETS))
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    has_torch = importlib.util.find_spec("torch") is not None
    rng = np.random.default_rng(0)
    for name in arguments.models:
        totals: Counter = Counter()
        print(f"{name}, batch {arguments.batch}; ms")
        for (lhs, rhs, fields, first), count in convolutions(name, arguments.batch).items():
            x, k = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in (lhs, rhs))
            params = dict(fields)
            each = {
                "JAX": ours_and_jax(x, k, params, "plain", first, arguments.repeats),
                "ours": ours_and_jax(x, k, params, "rows", first, arguments.repeats),
            }
            if has_torch:
                each["PyTorch"] = pytorch(x, k, params, first, arguments.repeats)
            print(f"  {count} x {lhs} * {rhs}, stride {params['window_strides'][0]}")
            for whose, times in each.items():
                for what, ms in times.items():
                    totals[whose, "in a loop" if what == "in a loop" else "all"] += count * ms
                print(f"    {whose:8}" + ", ".join(f"{what} {ms:.2f}" for what, ms in times.items()), flush=True)
        print(
            f"  {name}, all: " + ", ".join(f"{whose} {what} {ms:.1f}" for (whose, what), ms in totals.items()),
            flush=True,
        )


if __name__ == "__main__":
    main()
