"""The commands, one a file: mpq-train, mpq-search and mpq-export, or train.py and search.py in a checkout."""
