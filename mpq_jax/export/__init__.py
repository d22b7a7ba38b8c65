"""Files that other programs run: one module a format."""
