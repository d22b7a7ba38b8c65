"""Problems whose shares differentiable searches learn, small enough to try every policy."""

import jax
import jax.numpy as jnp
import numpy as np
from tables import budgets_of, every_policy, made

from mpq_jax.search.problem import build

RULES = ("layer2=2,2|4,4", "layer3=w3+")


def problem_of(rules=RULES, budget="bitops=W4A4", **options):
    importance = made(4, **options)._replace(rules=rules)
    budgets = budgets_of(importance, budget)
    return importance, budgets, build(importance, budgets)


def allowed_policies(problem, importance):
    """picks of every policy that rules, candidates and ties allow."""
    each = (problem.picks(policy) for policy in every_policy(importance))
    return [picks for picks in each if picks is not None]


def random_theta(theta, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(2 * rng.normal(size=x.shape), jnp.float32), theta)
