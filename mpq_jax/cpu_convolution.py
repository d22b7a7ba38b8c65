"""Convolution and its two gradients in the forms that XLA runs fast on CPU.

XLA's CPU backend is fast at one form: the forward convolution NHWC x HWIO of images no smaller than the kernel. Filter
gradients, which come in another layout, take up to six times as long as the matrix products that they are; both
gradients take 20 to 40 times as long inside `lax.scan` or `lax.map`; images smaller than the kernel take up to 100
times as long, and depthwise convolutions 40 times (benchmarks/convolutions.py measures each). So, with p a position of
the output, i an offset in the kernel and s the stride:

  forward          y[b, p] = sum over i of x[b, s p + i] k[i]            on images padded first, if they are small
  input gradient   dx: the same sum over dy, spread out by s and padded, with k reversed and its channels exchanged
  filter gradient  dk[i] = sum over b, p of x[b, s p + i]' dy[b, p]      one matrix product

The results equal those of JAX's own operations but for rounding. Shapes: x [B, H, W, I], k [kh, kw, I, O], y and dy
[B, oh, ow, O]; depthwise: k [kh, kw, 1, C].
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from mpq_jax.recompute import apart

Pair = tuple[int, int]

# Filter gradients work on copies of the images: of so many bytes at a time, that they stay in the cache.
_COPIED = 4 * 2**20
_MULTIPLIED = 2**18  # the products of a depthwise one, one for each offset


class Geometry(NamedTuple):
    """A 2-D convolution of NHWC images without dilation: strides, padding and what its products are summed in."""

    strides: Pair
    padding: tuple[Pair, Pair]
    precision: Any
    dtype: Any  # preferred_element_type

    def padded(self, x: jax.Array) -> jax.Array:
        return jnp.pad(x, ((0, 0), *self.padding, (0, 0)))

    def seen(self, x: jax.Array, i: int, j: int, size: tuple[int, ...]) -> jax.Array:
        """Of padded images, what the kernel's offset (i, j) is multiplied with: [B, oh, ow, I]; size: (oh, ow)."""
        rows, columns = (
            slice(at, at + (n - 1) * s + 1, s) for at, n, s in zip((i, j), size, self.strides, strict=True)
        )
        return x[:, rows, columns, :]


def geometry(params: dict[str, Any], lhs: jax.Array, rhs: jax.Array) -> Geometry | None:
    """That of a `conv_general_dilated` of these jaxpr parameters; None: not NHWC x HWIO, or dilated, cropped, complex."""
    numbers = params["dimension_numbers"]
    if not (
        lhs.ndim == 4
        and params["batch_group_count"] == 1
        and (tuple(numbers.lhs_spec), tuple(numbers.rhs_spec)) == ((0, 3, 1, 2), (3, 2, 0, 1))
        and tuple(numbers.out_spec) == (0, 3, 1, 2)
        and all(d == 1 for d in (*params["lhs_dilation"], *params["rhs_dilation"]))
        and all(p >= 0 for pair in params["padding"] for p in pair)
        and jnp.issubdtype(lhs.dtype, jnp.floating)
        and lhs.dtype == rhs.dtype
        and 0 not in (*lhs.shape, *rhs.shape)
    ):
        return None
    rows, columns = ((int(low), int(high)) for low, high in params["padding"])
    return Geometry(params["window_strides"], (rows, columns), params["precision"], params["preferred_element_type"])


def is_depthwise(params: dict[str, Any], lhs: jax.Array, rhs: jax.Array) -> bool:
    """One input and one output channel a group."""
    return bool(params["feature_group_count"] == lhs.shape[3] == rhs.shape[3] > 1)


# ---- one group ----------------------------------------------------------------------------------------------------


def forward(at: Geometry, x: jax.Array, k: jax.Array) -> jax.Array:
    """y [B, oh, ow, O]."""
    padding = at.padding
    if x.shape[1] < k.shape[0] or x.shape[2] < k.shape[1]:
        # The barrier keeps XLA from taking the padding back into the convolution.
        x, padding = lax.optimization_barrier(at.padded(x)), ((0, 0), (0, 0))
    return _convolution(x, k, at.strides, padding, at)


def input_gradient(at: Geometry, image: Pair, dy: jax.Array, k: jax.Array) -> jax.Array:
    """dx [B, H, W, I]; image: (H, W)."""
    dy, k = _alike(dy, k)
    around: Any = _around(at, image, dy, k)
    # The barrier keeps XLA from taking the reversal into the convolution, whose layout is then another.
    k = lax.optimization_barrier(k[::-1, ::-1].transpose(0, 1, 3, 2))
    spread = at.strides
    if dy.shape[1] < k.shape[0] or dy.shape[2] < k.shape[1]:
        inside = [(low, high, stride - 1) for (low, high), stride in zip(around, spread, strict=True)]
        dy = lax.optimization_barrier(lax.pad(dy, jnp.zeros((), dy.dtype), ((0, 0, 0), *inside, (0, 0, 0))))
        around, spread = ((0, 0), (0, 0)), (1, 1)
    return _convolution(dy, k, (1, 1), around, at, spread)


def _around(at: Geometry, image: Pair, dy: jax.Array, k: jax.Array) -> list[Pair]:
    """The padding of dy, spread out, for the input gradient; negative where images were padded by more than the kernel."""
    return [
        (size - 1 - low, n + low - 1 - (out - 1) * stride)
        for n, out, size, stride, (low, _) in zip(image, dy.shape[1:3], k.shape, at.strides, at.padding, strict=False)
    ]


def filter_gradient(at: Geometry, kernel: Pair, x: jax.Array, dy: jax.Array) -> jax.Array:
    """dk [kh, kw, I, O]; kernel: (kh, kw).

    The offsets are laid side by side as channels before the product: all of them in copies of x; or, for stride 1, the
    columns in copies of x and the rows in copies of dy, which is less where kernel and image are large.
    """
    (height, width), (inputs, outputs) = kernel, (x.shape[3], dy.shape[3])
    oh, ow = dy.shape[1:3]
    in_x = height * width * inputs * oh * ow
    in_both = (width * inputs + height * outputs) * (oh + height - 1) * ow
    if at.strides == (1, 1) and in_both < in_x:
        return _summed(lambda x, dy: _offsets_in_both(at, kernel, x, dy), x, dy, in_both, _COPIED)
    copied = in_x if height * width > 1 else 0
    return _summed(lambda x, dy: _offsets_in_x(at, kernel, x, dy), x, dy, copied, _COPIED)


def _offsets_in_x(at: Geometry, kernel: Pair, x: jax.Array, dy: jax.Array) -> jax.Array:
    (height, width), x, size = kernel, at.padded(x), dy.shape[1:3]
    copies = [at.seen(x, i, j, size) for i in range(height) for j in range(width)]
    product = _product(jnp.concatenate(copies, -1), dy, at)
    return product.reshape(height, width, x.shape[3], dy.shape[3])


def _offsets_in_both(at: Geometry, kernel: Pair, x: jax.Array, dy: jax.Array) -> jax.Array:
    """Columns in x, rows in dy: x[b, r, q + j] dy[b, r - i, q], with r = p + i the row of x."""
    (height, width), x, columns = kernel, at.padded(x), dy.shape[2]
    of_x = jnp.concatenate([x[:, :, j : j + columns] for j in range(width)], -1)
    of_dy = jnp.concatenate([jnp.pad(dy, ((0, 0), (i, height - 1 - i), (0, 0), (0, 0))) for i in range(height)], -1)
    product = _product(of_x, of_dy, at).reshape(width, x.shape[3], height, dy.shape[3])
    return product.transpose(2, 0, 1, 3)


def _convolution(
    x: jax.Array, k: jax.Array, strides: Pair, padding: Any, at: Geometry, spread: Pair = (1, 1)
) -> jax.Array:
    return lax.conv_general_dilated(
        x,
        k,
        strides,
        padding,
        lhs_dilation=spread,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision=at.precision,
        preferred_element_type=at.dtype,
    )


def _product(a: jax.Array, b: jax.Array, at: Geometry) -> jax.Array:
    """[..., I] x [..., O] -> [I, O], summed over all else, in float32 at least."""
    a, b = (each.reshape(-1, each.shape[-1]) for each in _alike(a, b))  # as matrices, which XLA multiplies faster
    dtype = jnp.promote_types(a.dtype, jnp.float32)
    return lax.dot_general(a, b, (((0,), (0,)), ((), ())), precision=at.precision, preferred_element_type=dtype)


def _alike(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Both in the wider of their types: a gradient is wider than what it is multiplied with under preferred_element_type."""
    dtype = jnp.promote_types(a.dtype, b.dtype)
    return a.astype(dtype), b.astype(dtype)


def _summed(
    function: Callable[..., jax.Array], x: jax.Array, dy: jax.Array, elements: int, limit: int, least: int = 1
) -> jax.Array:
    """`function` of a few samples at a time, summed; elements: that it copies for one. At least `least` samples."""
    batch = x.shape[0]
    most = max(least, limit // max(elements * x.dtype.itemsize, 1))
    samples = max(n for n in range(1, batch + 1) if batch % n == 0 and n <= most)
    if samples == batch:
        return function(x, dy).astype(x.dtype)
    parts = tuple(each.reshape(-1, samples, *each.shape[1:]) for each in (x, dy))
    start = jax.eval_shape(function, parts[0][0], parts[1][0])
    total, _ = lax.scan(lambda sum_, part: (sum_ + function(*part), None), jnp.zeros(start.shape, start.dtype), parts)
    return total.astype(x.dtype)


# ---- depthwise ----------------------------------------------------------------------------------------------------


def depthwise(at: Geometry, x: jax.Array, k: jax.Array, own: bool = True) -> jax.Array:
    """y[b, p, c] = sum over i of x[b, s p + i, c] k[i, 0, c], as a sum of shifted products: [B, oh, ow, C].

    own: as a program of its own. Not where JAX differentiates it: a conditional would keep each product's operands.
    """
    products = functools.partial(_shifted_products, at)
    return apart(products, at.padded(x), k) if own else products(at.padded(x), k)


def depthwise_input_gradient(at: Geometry, image: Pair, dy: jax.Array, k: jax.Array) -> jax.Array:
    """dx [B, H, W, C]; image: (H, W)."""
    dy, k = _alike(dy, k)
    inside = [(*edges, stride - 1) for edges, stride in zip(_around(at, image, dy, k), at.strides, strict=True)]
    spread = lax.pad(dy, jnp.zeros((), dy.dtype), ((0, 0, 0), *inside, (0, 0, 0)))
    return apart(functools.partial(_shifted_products, at._replace(strides=(1, 1))), spread, k[::-1, ::-1])


def _shifted_products(at: Geometry, x: jax.Array, k: jax.Array) -> jax.Array:
    """Of padded images."""
    height, width = k.shape[:2]
    x = x.astype(at.dtype or x.dtype)
    size = tuple((n - m) // s + 1 for n, m, s in zip(x.shape[1:3], k.shape, at.strides, strict=False))
    products = (at.seen(x, i, j, size) * k[i, j, 0] for i in range(height) for j in range(width))
    return functools.reduce(jnp.add, products)


def depthwise_filter_gradient(at: Geometry, kernel: Pair, x: jax.Array, dy: jax.Array) -> jax.Array:
    """dk [kh, kw, 1, C]: products of shifted images with dy, summed by a product with ones (XLA's own sum is slower)."""
    height, width = kernel

    def function(x: jax.Array, dy: jax.Array) -> jax.Array:
        x, size = lax.optimization_barrier(at.padded(x)), dy.shape[1:3]
        ones = jnp.ones((*dy.shape[:3], 1), dy.dtype)
        sums = [_product(ones, at.seen(x, i, j, size) * dy, at) for i in range(height) for j in range(width)]
        return jnp.stack(sums).reshape(height, width, 1, -1)

    return _summed(function, x, dy, dy[0].size, _MULTIPLIED, least=4)
