"""Memory for time: what a backward pass takes of its forward pass is worked out again in place of being kept.

On GPUs and TPUs this is `jax.checkpoint`. XLA's CPU backend takes the second working-out for the first one, which it
has, and keeps that; a conditional whose other branch is never taken it leaves as it is.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import lax

T = TypeVar("T")


def on_cpu() -> bool:
    """Whether programs run on CPU where nothing else is said."""
    return jax.default_backend() == "cpu"


def apart(function: Callable[..., T], *arguments: Any) -> T:
    """function(*arguments) as a program of its own, whose arguments and results are arrays in memory. For CPU.

    XLA's CPU backend makes a sum of products part of every program that takes it, and makes part of it what it is of: a
    depthwise convolution would be worked out for each of those programs, and its images for each product. Optimization
    barriers are gone before it does so. A conditional it leaves as it is; here one that is always true, which XLA does
    not know.
    """
    results = jax.eval_shape(function, *arguments)
    true = lax.optimization_barrier(jnp.bool_(True))

    def never(*_: Any) -> Any:  # its zeros are made here, not outside, where XLA would fill them in memory each time
        return jax.tree.map(lambda result: jnp.zeros(result.shape, result.dtype), results)

    return lax.cond(true, function, never, *arguments)


def recomputed(function: Callable[[Any, Any], jax.Array]) -> Callable[[Any, Any], jax.Array]:
    """`function`, of which nothing but its arguments is kept for the backward pass.

    function(moving, still): gradients are those of `moving`, a pytree of floats; `still` has none.
    """
    if not on_cpu():
        return jax.checkpoint(function)

    @jax.custom_vjp
    def run(moving: Any, still: Any) -> jax.Array:
        return function(moving, still)

    def forward(moving: Any, still: Any) -> tuple[jax.Array, tuple[Any, Any]]:
        return function(moving, still), (moving, still)

    def backward(kept: tuple[Any, Any], gradient: jax.Array) -> tuple[Any, None]:
        return apart(_gradients, *kept, gradient), None

    def _gradients(moving: Any, still: Any, gradient: jax.Array) -> Any:
        return jax.vjp(lambda moving: function(moving, still), moving)[1](gradient)[0]

    run.defvjp(forward, backward)
    return run
