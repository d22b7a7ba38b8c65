"""Criteria: each returns an `Importance`, the harm of every searched layer at each of its bit-widths."""

from mpq_jax.criteria.learned import learned

CRITERIA = {"learned": learned}
__all__ = ["CRITERIA", "learned"]
