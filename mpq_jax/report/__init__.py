"""The report of a run: Markdown, figures, and the same table for the terminal. NumPy and matplotlib, no JAX."""

from mpq_jax.report.tables import AccuracyRow, Grid, Report, terminal_table
from mpq_jax.report.write import write

__all__ = ["AccuracyRow", "Grid", "Report", "terminal_table", "write"]
