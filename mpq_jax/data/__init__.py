"""Data sets in TFDS format in, batches of NumPy arrays out.

`open_dataset` finds (or, for `digits` and `fashion_mnist`, writes) a prepared set; `train_batches` and `eval_batches`
read it through `tfds.data_source` and grain. No TensorFlow, no JAX: what comes out is NumPy.

A user's own arrays (`open_own`) go through the same two functions.

The splits are "train", "validation" (cut from the set's own train split) and "test". Nothing but
`eval_batches(dataset, "test", ...)` reads the test split.
"""

from mpq_jax.data.batches import eval_batches, train_batches
from mpq_jax.data.opening import Dataset, open_dataset
from mpq_jax.data.own import OwnData, answered, open_own

__all__ = ["Dataset", "OwnData", "answered", "eval_batches", "open_dataset", "open_own", "train_batches"]
