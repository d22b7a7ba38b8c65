"""Float training, joint training and fine-tuning from a checkout: `python train.py --help`. Installed it is `mpq-train`."""

import sys

from mpq_jax.commands.train import main

if __name__ == "__main__":
    sys.exit(main())
