"""EdMIPS (Cai and Vasconcelos, CVPR 2020): the one-branch form of differentiable search.

Each layer's weights are a softmax mixture of its quantized weights, its activations one of its quantized activations,
and there is one product. That equals the supernet where the shares of weight and activation bits are independent.
Unlike its authors, who train theta with the weights on the same batches and add the cost to the loss, this shares the
loss and the separate splits of gumbel.py: the forms are compared, not the recipes.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from mpq_jax.search import supernet
from mpq_jax.search.problem import Problem
from mpq_jax.search.supernet import NEVER


def init_theta(problem: Problem) -> dict[str, jax.Array]:
    """{"weight": [L, Kw], "activation": [L, Ka]} of zeros: logits. Tied rows read the first's activation logits."""
    rows, (kw, ka) = len(problem.paths), problem.widths
    return {"weight": jnp.zeros((rows, kw)), "activation": jnp.zeros((rows, ka))}


def marginals(theta: Mapping[str, jax.Array], problem: Problem) -> tuple[jax.Array, jax.Array]:
    """p [L, Kw], q [L, Ka]: softmax of the logits over the bits that a row may have at all."""
    allowed = jnp.asarray(problem.allowed).reshape(-1, *problem.widths)
    first = {row: group[0] for group in problem.tied for row in group}
    source = jnp.asarray([first.get(row, row) for row in range(len(problem.paths))])
    p = jax.nn.softmax(jnp.where(allowed.any(2), theta["weight"], NEVER), 1)
    q = jax.nn.softmax(jnp.where(allowed.any(1), theta["activation"][source], NEVER), 1)
    return p, q


def shares_of(theta: Mapping[str, jax.Array], problem: Problem) -> jax.Array:
    """[L, Kw, Ka]: p_i q_j."""
    p, q = marginals(theta, problem)
    return p[:, :, None] * q[:, None, :]


def form(problem: Problem) -> supernet.Form:
    """The one-branch form: no noise, no temperature."""

    def shares(theta: Mapping[str, jax.Array], key: jax.Array, step: jax.Array) -> jax.Array:
        del key, step
        return shares_of(theta, problem)

    return supernet.Form(supernet.one_branch_layer, shares)


def probabilities(theta: Mapping[str, jax.Array], problem: Problem) -> jax.Array:
    """[L, Kw, Ka]: p_i q_j of the pairs that a row may have, made to add up to 1."""
    shares = shares_of(theta, problem) * problem.allowed.reshape(-1, *problem.widths)
    return shares / shares.sum((1, 2), keepdims=True)
