"""`python -m mpq_jax.export`, the same as `mpq-export`."""

import sys

from mpq_jax.commands.export import main

if __name__ == "__main__":
    sys.exit(main())
