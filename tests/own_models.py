"""A user's models and data, right and wrong, as the tests name them: --model own_models:linen --data own_models:digits."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx
from made_models import Dense

from mpq_jax import FloatModel, data

DATA_DIR = "unset"  # where the built-in digits lie; a test sets it


def digits():
    """The built-in path's own splits, as plain arrays."""
    opened = data.open_dataset("digits", data_dir=DATA_DIR, augment=False)
    result = {"train": _train(opened)}
    for split in ("validation", "test"):
        batches = list(data.eval_batches(opened, split, 100))
        arrays = {key: np.concatenate([batch[key] for batch in batches]) for key in batches[0]}
        result[split] = {key: value[arrays["label"] >= 0] for key, value in arrays.items()}
    return result


def _train(opened):
    batches = list(data.eval_batches(opened, "train", 100))
    arrays = {key: np.concatenate([batch[key] for batch in batches]) for key in batches[0]}
    return {
        key: value[arrays["label"] >= 0].astype(np.int64 if key == "label" else np.float32)
        for key, value in arrays.items()
    }


class Undecided(nn.Module):
    """made_models.Dense, but its call is told `deterministic`, without a default."""

    num_classes: int
    features: tuple[int, ...]

    @nn.compact
    def __call__(self, x, deterministic: bool):
        nn.share_scope(self, inner := Dense(self.num_classes, self.features))
        return inner(x, train=not deterministic)


def linen(num_classes, features=(12, 10)):
    return Undecided(num_classes, tuple(features))


class Net(nnx.Module):
    """No flag in the call: the module's own mode."""

    def __init__(self, num_classes, width, rngs):
        self.first = nnx.Linear(64, width, rngs=rngs)
        self.norm = nnx.BatchNorm(width, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.head = nnx.Linear(width, num_classes, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm(self.first(x.reshape(x.shape[0], -1))))
        return self.head(self.dropout(x))


def in_nnx(num_classes=10, width=12, trained=False):
    return FloatModel(Net(num_classes, width, nnx.Rngs(3)), trained=trained)


def trained_nnx(num_classes=10):
    return in_nnx(num_classes, trained=True)


WEIGHTS = 1.0  # a test changes it between two runs of the same factory


def trained_linen(num_classes=10):
    """(module, variables), as somebody who has trained a model brings it."""
    module = Dense(num_classes, (12,))
    variables = module.init(jax.random.key(5), jnp.zeros((1, 8, 8, 1)))
    return module, jax.tree.map(lambda x: WEIGHTS * x, variables)


# ---- a task of one's own: two inputs, no right or wrong ------------------------------------------------------------


class Distance(nn.Module):
    """Two points to their distance; with noise of its own in training."""

    noise: str = "noise"

    @nn.compact
    def __call__(self, a, b, is_training=False):
        x = jnp.concatenate([a, b], -1)
        if is_training:
            x = x + 0.01 * jax.random.normal(self.make_rng(self.noise), x.shape)
        for i, width in enumerate((16, 16)):
            x = nn.relu(nn.Dense(width, name=f"dense{i}")(x))
        return {"distance": nn.Dense(1, name="head")(x)[..., 0]}


def squared_error(outputs, batch):
    return (outputs["distance"] - batch["distance"]) ** 2


def distance(rngs=("noise",), inputs=("a", "b"), loss=squared_error):
    return FloatModel(Distance(), inputs=inputs, rngs=rngs, loss=loss)


def points(count=600):
    rng = np.random.default_rng(0)
    a, b = rng.uniform(-1, 1, (2, count, 3))
    every = {"a": a, "b": b, "distance": np.linalg.norm(a - b, axis=1)}
    cut = count * 5 // 6
    return {"train": {k: v[:cut] for k, v in every.items()}, "test": {k: v[cut:] for k, v in every.items()}}


# ---- mistakes ------------------------------------------------------------------------------------------------------


def returns_nothing():
    pass


def returns_a_class():
    return Dense


def raises():
    raise RuntimeError("no licence\nfor this")


def needs_an_option(depth):
    return Dense(depth)


def wants_rows():
    return FloatModel(Dense(), inputs=("rows",))


def wrong_flag():
    return FloatModel(Dense(), eval_kwargs={"training": False})


def takes_images_apart():
    return FloatModel(nn.Dense(10))  # [B, 8, 8, 10], no logits


def mean_loss():
    return distance(loss=lambda outputs, batch: squared_error(outputs, batch).mean())


def column_loss():
    return distance(loss=lambda outputs, batch: abs(outputs["distance"] - batch["distance"][:, None]))


def no_noise():
    return distance(rngs=())


def loss_that_fails():
    return distance(loss=lambda outputs, batch: outputs["distnace"])


def half_a_model():
    return FloatModel(Dense(), trained=True)


def other_weights():
    return Dense(), Dense(features=(13,)).init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)))


class Lines:
    """A sequence of examples, read by number."""

    def __init__(self, examples):
        self.examples = examples

    def __len__(self):
        return len(self.examples["label"])

    def __getitem__(self, i):
        return {key: value[i] for key, value in self.examples.items()}


def made(count=40):
    rng = np.random.default_rng(count)
    return {"image": rng.normal(size=(count, 8, 8, 1)).astype(np.float32), "label": rng.integers(0, 10, count)}


def small():
    return {"train": made(40), "test": made(23)}


def by_number():
    return {"train": Lines(made(40)), "test": Lines(made(23)), "num_classes": 10}


def flipped():
    return {**small(), "augment": lambda batch, rng: {**batch, "image": batch["image"] * rng.choice([-1, 1])}}


def _labels(change, **more):
    parts = {"train": made(40), "test": made(23)}
    return {**{name: {**part, "label": change(part["label"])} for name, part in parts.items()}, **more}


def from_one():
    return _labels(lambda label: label + 1)


def from_minus_one():
    return _labels(lambda label: label - 1)


def too_few_classes():
    return _labels(lambda label: label, num_classes=7)


def classes_in_words():
    return _labels(lambda label: label, num_classes="ten")


def lines_from_one():
    return {name: Lines(part) for name, part in from_one().items()}


def changed_in_place():
    def augment(batch, rng):
        batch["image"] *= rng.choice([-1, 1])

    return {**small(), "augment": augment}


def own_mask():
    return {name: {**part, "valid": part["label"] > 3} for name, part in small().items()}


def ragged():
    return {
        **small(),
        "train": {"image": [np.zeros((8, 8, 1))] * 39 + [np.zeros((9, 8, 1))], "label": np.zeros(40, int)},
    }


class Unreadable(Lines):
    def __getitem__(self, i):
        raise KeyError(i)


def unreadable():
    return {"train": Unreadable(made(40)), "test": Unreadable(made(23))}


def pairs():
    return {"train": (made()["image"], made()["label"]), "test": (made()["image"], made()["label"])}


def no_test():
    return {"train": made()}


def uneven():
    return {"train": {**made(), "label": np.zeros(3, int)}, "test": made()}


def other_shapes():
    return {"train": made(), "test": {**made(), "image": np.zeros((40, 4, 4, 1), np.float32)}}


def words():
    return {"train": {**made(), "label": np.array(["cat"] * 40)}, "test": made()}


def unlabelled():
    return {"train": {"image": made()["image"]}, "test": {"image": made()["image"]}}


def endless():
    return {"train": (x for x in ()), "test": made()}


def shrinking():
    return {**small(), "augment": lambda batch, rng: {**batch, "image": batch["image"][:, ::2]}}
