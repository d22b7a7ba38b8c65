"""Search: from tables to a policy. Nothing here, nor what it imports, needs JAX."""

from mpq_jax.search.ilp import solve
from mpq_jax.search.others import best_uniform, random_policies

__all__ = ["best_uniform", "random_policies", "solve"]
