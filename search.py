"""The search from a checkout: `python search.py --help`. Installed it is `mpq-search`."""

import sys

from mpq_jax.commands.search import main

if __name__ == "__main__":
    sys.exit(main())
