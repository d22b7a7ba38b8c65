"""The report of a run: a page, Markdown with figures, and a table for the terminal. No JAX.

NumPy, Jinja2 and matplotlib, imported where they are needed.
"""

from mpq_jax.report.curves import Curve, curve
from mpq_jax.report.page import html
from mpq_jax.report.searched import searched
from mpq_jax.report.tables import AccuracyRow, Report, WeightGrid, terminal_table
from mpq_jax.report.write import write

__all__ = ["AccuracyRow", "Curve", "Report", "WeightGrid", "curve", "html", "searched", "terminal_table", "write"]
