"""The quadratic form against the objective of every policy; its projection against what makes it the nearest."""

import numpy as np
import pytest
from tables import every_policy, made
from test_ilp import with_interactions

from mpq_jax.importance import total
from mpq_jax.search import solve
from mpq_jax.search.psd import projected, quadratic


def one_hot(importance, policy):
    parts = []
    for layer in importance.layers:
        if layer.searched:
            parts.append(np.array(importance.bit_widths) == policy[layer.path].w)
            parts.append(np.array(importance.activation_bit_widths) == policy[layer.path].a)
    return np.concatenate(parts).astype(float)


@pytest.mark.parametrize("options", [{}, {"pair": True}, {"activation_widths": (2, 4, 8), "tied": True}])
def test_form_and_projection(options):
    importance = with_interactions(3, layers=3, **options)
    form, decisions, _ = quadratic(importance)
    assert len(decisions) == 6 and np.array_equal(form, form.T) and np.linalg.eigvalsh(form).min() < -0.1
    there = projected(importance)
    again, _, _ = quadratic(there)
    for policy in every_policy(importance):
        x = one_hot(importance, policy)
        assert x @ form @ x == pytest.approx(total(importance, policy))
        # Off the diagonal within one decision a one-hot vector sees nothing.
        assert x @ again @ x == pytest.approx(total(there, policy))
    # The nearest: what was taken away is negative semi-definite and orthogonal to what is left (Higham 1988).
    values, vectors = np.linalg.eigh(form)
    nearest = (vectors * values.clip(0)) @ vectors.T
    away = nearest - form
    assert np.linalg.eigvalsh(away).min() > -1e-9 and abs((away * nearest).sum()) < 1e-9
    for policy in every_policy(importance):
        x = one_hot(importance, policy)
        assert x @ nearest @ x == pytest.approx(total(there, policy)) and total(there, policy) > -1e-9


def test_an_additive_table_is_its_own_projection():
    importance = made(1)
    there = projected(importance)
    for policy in every_policy(importance):
        assert total(there, policy) == pytest.approx(total(importance, policy))


def test_it_can_be_searched():
    from tables import best_by_force, budgets_of

    there = projected(with_interactions(2, layers=3))
    budgets = budgets_of(there, "bitops=W3A3")
    assert solve(there, budgets).objective == pytest.approx(best_by_force(there, budgets)[0], abs=1e-8)
