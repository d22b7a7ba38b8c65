"""Worked examples: models that are not this project's, from training to a report. Each file says how it is run."""
