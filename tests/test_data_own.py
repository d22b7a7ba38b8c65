"""A user's own data: arrays or examples by number, split, shuffled and augmented by seed and step alone."""

import jax
import numpy as np
import own_models
import pytest

from mpq_jax import Refusal, data
from mpq_jax.data.own import open_own


def opened(name, **options):
    return open_own(f"own_models:{name}", getattr(own_models, name)(), **options)


def test_every_example_once_an_epoch_and_any_step_on_its_own():
    dataset = opened("small", validation_fraction=0.2)
    assert dataset.sizes == {"train": 32, "validation": 8, "test": 23} and dataset.num_classes == 10
    stream = data.train_batches(dataset, 8, seed=3)
    epoch = [next(stream) for _ in range(4)]
    seen = np.concatenate([batch["image"] for batch in epoch])
    assert len(np.unique(seen.reshape(32, -1), axis=0)) == 32
    held = np.concatenate([b["image"][b["valid"]] for b in data.eval_batches(dataset, "validation", 5)])
    assert not {x.tobytes() for x in held} & {x.tobytes() for x in seen}
    later = next(data.train_batches(dataset, 8, seed=3, first_step=3))
    jax.tree.map(np.testing.assert_array_equal, later, epoch[3])
    halves = [next(data.train_batches(dataset, 8, seed=3, process_index=i, process_count=2)) for i in (0, 1)]
    np.testing.assert_array_equal(np.concatenate([h["label"] for h in halves]), epoch[0]["label"])


def test_examples_by_number_are_the_same_batches():
    arrays, lines = opened("small"), opened("by_number", validation_fraction=0.1)
    for one, other in zip(data.eval_batches(arrays, "test", 8), data.eval_batches(lines, "test", 8), strict=True):
        jax.tree.map(np.testing.assert_array_equal, one, other)
    batches = list(data.eval_batches(lines, "test", 8))
    assert [int(batch["valid"].sum()) for batch in batches] == [8, 8, 7]
    assert batches[-1]["label"][-1] == -1 and not batches[-1]["image"][-1].any()
    assert next(data.train_batches(lines, 8, seed=0))["label"].dtype == np.int32


def test_augmentation_depends_on_seed_and_step_alone():
    dataset, small = (opened(name, validation_fraction=0) for name in ("flipped", "small"))
    signs = [
        np.sign((a["image"] * b["image"]).sum()) for a, b in zip(_steps(dataset, 12), _steps(small, 12), strict=True)
    ]
    assert set(signs) == {-1.0, 1.0}
    jax.tree.map(
        np.testing.assert_array_equal,
        _steps(dataset, 12)[7],
        next(data.train_batches(dataset, 8, seed=1, first_step=7)),
    )
    jax.tree.map(
        np.testing.assert_array_equal,
        _steps(opened("flipped", augment=False, validation_fraction=0), 3),
        _steps(small, 3),
    )
    with pytest.raises(Refusal, match="augment of --data own_models:shrinking made"):
        _steps(opened("shrinking"), 1)


def test_labels_are_the_loss_s_affair_where_it_is_the_model_s_own():
    """Ignored ones of -100, or ratings below 0, are given as they are."""
    dataset = opened("from_minus_one", validation_fraction=0)
    assert dataset.num_classes is None and min(batch["label"].min() for batch in _steps(dataset, 5)) == -1


def _steps(dataset, count):
    return [batch for _, batch in zip(range(count), data.train_batches(dataset, 8, seed=1), strict=False)]
