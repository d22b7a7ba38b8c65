"""Search: from tables to a policy. Nothing here, nor what it imports, needs JAX.

The methods that measure policies instead (see methods.py) import it where `run.find` runs one.
"""

from mpq_jax.search.ilp import solve
from mpq_jax.search.others import best_uniform, random_policies

__all__ = ["best_uniform", "random_policies", "solve"]
