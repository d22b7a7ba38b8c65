"""A user's own data: arrays, or examples read by number, for each split. Shuffling, batches and padding are ours.

So every batch is a function of (data, batch size, seed, step) alone, and a resumed run goes on exactly where it was.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from mpq_jax.data.augment import generator, shuffled
from mpq_jax.data.opening import SPLITS, Split, cut_validation
from mpq_jax.factories import told
from mpq_jax.types import Refusal

Batch = dict[str, np.ndarray]
WANTED = '{"train": {"image": array [N, …], "label": array [N]}, "test": {…}}'
_EXTRA = ("augment", "num_classes")
_OURS = {"valid": "what fills up the last one", "teacher": "what distillation compares with"}


class OwnData(NamedTuple):
    """A user's data, opened.

    features: array name -> (shape, dtype) of one example, as batches have it. num_classes: of "label"; None: not known.
    augment(batch, rng) -> batch: changes a training batch, or None.
    sizes, splits: as in `opening.Dataset`.
    answers: "label" is one of so many classes, from 0 on, whatever reads it; None: what it may be is the model's affair.
    """

    name: str
    num_classes: int | None
    features: Mapping[str, tuple[tuple[int, ...], Any]]
    sizes: dict[str, int]
    augment: Callable[[Batch, np.random.Generator], Batch] | None
    splits: Mapping[str, Split]
    answers: int | None = None


def open_own(
    name: str, found: Any, *, validation_fraction: float = 0.1, seed: int = 0, augment: bool = True
) -> OwnData:
    """OwnData of what a user's function returned.

    found: {"train": split, "test": split} and, if there is one, "validation": split; else it is cut from train. A split
    is a dict of arrays of equal length, or a sequence (len and []) of dicts, one an example. Beside them may stand
    "augment", a function (batch, numpy Generator) -> batch for training, and "num_classes".
    Raises Refusal, naming what was found, for anything else.
    """
    where = f"--data {name}"
    if not isinstance(found, Mapping):
        raise Refusal(f"{where} returned {type(found).__name__}; return {WANTED}")
    if unknown := [key for key in found if key not in (*SPLITS, *_EXTRA)]:
        raise Refusal(f"{where} returned a split {unknown[0]!r}; there are {', '.join((*SPLITS, *_EXTRA))}")
    if missing := [split for split in ("train", "test") if split not in found]:
        raise Refusal(f"{where} returned no {missing[0]!r}; return {WANTED}")
    changes = found.get("augment")
    if changes is not None and not callable(changes):
        raise Refusal(f"{where}: augment is {type(changes).__name__}; give a function (batch, rng) -> batch")
    given = {split: _checked(where, split, found[split]) for split in SPLITS if split in found}
    features = {split: _features(where, split, examples) for split, examples in given.items()}
    for split, mine in features.items():
        if mine != features["train"]:
            raise Refusal(
                f"{where}: {split} has {_shown(mine)}, train has {_shown(features['train'])}; give both alike"
            )
    train = given["train"]
    splits = {split: Split(examples, np.arange(count_of(examples))) for split, examples in given.items()}
    if "validation" not in splits:
        numbers = cut_validation(name, count_of(train), validation_fraction, seed, _labels(train))
        splits |= {split: Split(train, each) for split, each in zip(("train", "validation"), numbers, strict=True)}
    return OwnData(
        name=name,
        num_classes=_classes(where, found, given),
        features=features["train"],
        sizes={split: len(splits[split].numbers) for split in SPLITS},
        augment=changes if augment else None,
        splits=splits,
    )


def count_of(examples: Any) -> int:
    """How many examples there are: arrays in a mapping [N, ...], or a sequence."""
    return len(next(iter(examples.values()))) if isinstance(examples, Mapping) else len(examples)


# ---- what was given ------------------------------------------------------------------------------------------------


def _checked(where: str, split: str, examples: Any) -> Any:
    """Arrays of equal lengths, or the sequence as it is."""
    if isinstance(examples, Mapping):
        arrays = {str(key): _array(where, split, key, value) for key, value in examples.items()}
        if not arrays:
            raise Refusal(f"{where}: {split} is empty; return {WANTED}")
        if scalar := [key for key, value in arrays.items() if not value.ndim]:
            raise Refusal(
                f"{where}: {split}[{scalar[0]!r}] is one number; give an array whose first axis is the examples"
            )
        lengths = {key: len(value) for key, value in arrays.items()}
        if len(set(lengths.values())) > 1:
            shown = ", ".join(f"{key} {n}" for key, n in lengths.items())
            raise Refusal(f"{where}: the arrays of {split} have different lengths ({shown}); give one example an entry")
    elif hasattr(examples, "__len__") and hasattr(examples, "__getitem__") and not isinstance(examples, (str, bytes)):
        try:
            first = examples[0] if len(examples) else {}
        except Exception as error:
            raise Refusal(f"{where}: {split}[0] cannot be read: {told(error)}; give {WANTED}") from None
        if isinstance(examples, (tuple, np.ndarray)) or not isinstance(first, Mapping):
            what = (
                type(examples).__name__ if isinstance(examples, np.ndarray) else f"{type(examples).__name__} of others"
            )
            raise Refusal(f"{where}: {split} is {what}; give a dict of named arrays, or a sequence of dicts: {WANTED}")
        arrays = examples
    else:
        raise Refusal(
            f"{where}: {split} is {type(examples).__name__}, which has no examples by number (len and []); give a dict of "
            "arrays, or a sequence of dicts"
        )
    if not count_of(arrays):
        raise Refusal(f"{where}: {split} has no examples")
    return arrays


def _array(where: str, split: str, key: Any, value: Any) -> np.ndarray:
    try:
        return value if isinstance(value, np.ndarray) else np.asarray(value)
    except ValueError:
        raise Refusal(
            f"{where}: the examples of {split}[{key!r}] have different shapes; make them alike, or give a sequence of dicts "
            "that reads each one in the same shape"
        ) from None


def _features(where: str, split: str, examples: Any) -> dict[str, tuple[tuple[int, ...], Any]]:
    """Shape and dtype of one example's arrays, as batches have them."""
    first = {k: v[0] for k, v in examples.items()} if isinstance(examples, Mapping) else examples[0]
    result = {}
    if taken := [key for key in first if str(key) in _OURS]:
        raise Refusal(
            f"{where}: {split} has an array {taken[0]!r}, and batches have one of that name for {_OURS[str(taken[0])]}; "
            "give it another name"
        )
    for key, value in first.items():
        array = np.asarray(value)
        if array.dtype.kind not in "biuf" and array.dtype.name != "bfloat16":
            raise Refusal(f"{where}: {split}[{key!r}] has entries of type {array.dtype}; give numbers")
        result[str(key)] = (array.shape, _batch_type(key, array.dtype))
    return result


def _batch_type(key: str, dtype: Any) -> Any:
    """JAX's types, which have no 64 bits; labels are int32, so that -1 can mark padding."""
    if dtype.name in ("int64", "uint64") or (key == "label" and dtype.kind in "iu"):
        return np.dtype(np.int32)
    return np.dtype(np.float32) if dtype.name == "float64" else dtype


def _classes(where: str, found: Mapping[str, Any], given: Mapping[str, Any]) -> int | None:
    """As given, or one more than the largest label of arrays; None where labels are no classes, or not all to be seen."""
    if "num_classes" in found:
        count = found["num_classes"]
        if isinstance(count, bool) or not isinstance(count, (int, np.integer)) or count < 1:
            raise Refusal(f"{where}: num_classes is {count!r}; give how many classes there are, e.g. 10")
        return int(count)
    labels = [_labels(examples) for examples in given.values()]
    found_all = [each for each in labels if each is not None]
    if len(found_all) < len(labels) or min(int(each.min()) for each in found_all) < 0:
        return None
    return 1 + max(int(each.max()) for each in found_all)


def _labels(examples: Any) -> np.ndarray | None:
    """Integer labels [N] of arrays; None: there are none."""
    labels = examples.get("label") if isinstance(examples, Mapping) else None
    return labels if labels is not None and labels.ndim == 1 and labels.dtype.kind in "iu" else None


def answered(dataset: Any, answers: int) -> Any:
    """The data (Dataset or OwnData) for a model that gives so many logits: each label must have one.

    Raises Refusal where one has none: of arrays now, of a sequence when it is read.
    """
    if not isinstance(dataset, OwnData):
        if dataset.num_classes > answers:
            raise Refusal(
                f"{dataset.name} has {dataset.num_classes} classes, and the model gives {answers} logits; give it one for each"
            )
        return dataset
    dataset = dataset._replace(answers=min(answers, dataset.num_classes or answers))
    for split in SPLITS:
        if (labels := _labels(dataset.splits[split].records)) is not None:
            _check_labels(dataset, labels)
    return dataset


def _check_labels(dataset: OwnData, labels: np.ndarray) -> None:
    low, high = int(labels.min()), int(labels.max())
    if dataset.answers is not None and (low < 0 or high >= dataset.answers):
        raise Refusal(
            f'--data {dataset.name}: a "label" is {low if low < 0 else high}, and there are {dataset.answers} classes, '
            f"numbered from 0 to {dataset.answers - 1}; number the labels so, or give the model an output for each"
        )


def _shown(features: Mapping[str, tuple[tuple[int, ...], Any]]) -> str:
    return ", ".join(f"{key} {np.dtype(dtype).name}{list(shape)}" for key, (shape, dtype) in features.items())


# ---- batches -------------------------------------------------------------------------------------------------------


def training_batch(
    dataset: OwnData, split: Split, seed: int, batch_size: int, process_index: int, process_count: int, step: int
) -> Batch:
    """Batch number `step` of this process; as `batches.train_batches` says."""
    size = batch_size // process_count
    positions = step * batch_size + process_index * size + np.arange(size)
    batch = _gathered(dataset, split, split.numbers[shuffled(seed, positions, len(split.numbers))])
    if dataset.augment is None:
        return batch
    try:
        changed = dataset.augment(batch, generator(seed, step * process_count + process_index))
    except Exception as error:
        raise Refusal(f"augment of --data {dataset.name} failed: {told(error)}") from None
    if not isinstance(changed, Mapping):
        raise Refusal(f"augment of --data {dataset.name} returned {type(changed).__name__}; return the batch")
    mine = {key: (np.shape(value)[1:], _batch_type(key, np.asarray(value).dtype)) for key, value in changed.items()}
    if mine != dict(dataset.features) or any(len(v) != len(positions) for v in changed.values()):
        raise Refusal(
            f"augment of --data {dataset.name} made {_shown(mine)} of {_shown(dataset.features)}; keep them alike"
        )
    return {key: np.asarray(value, dataset.features[key][1]) for key, value in changed.items()}


def eval_batch(dataset: OwnData, split: Split, rows: np.ndarray) -> Batch:
    """Examples by number, -1 for padding: zeros, a label of -1, and "valid" False."""
    batch, valid = _gathered(dataset, split, np.maximum(rows, 0)), rows >= 0
    for key, value in batch.items():
        value[~valid] = -1 if key == "label" and value.dtype.kind == "i" else 0
    return {**batch, "valid": valid}


def _gathered(dataset: OwnData, split: Split, numbers: np.ndarray) -> Batch:
    examples: Any = split.records
    if isinstance(examples, Mapping):
        return {key: np.array(examples[key][numbers], dtype) for key, (_, dtype) in dataset.features.items()}
    try:
        each: Sequence[Mapping[str, Any]] = [examples[int(number)] for number in numbers]
    except Exception as error:
        raise Refusal(f"an example of --data {dataset.name} cannot be read: {told(error)}") from None
    for number, example in zip(numbers, each, strict=True):
        mine = {
            str(key): (np.shape(value), _batch_type(key, np.asarray(value).dtype)) for key, value in example.items()
        }
        if mine != dict(dataset.features):
            raise Refusal(
                f"--data {dataset.name}: example {number} has {_shown(mine)}, the first has {_shown(dataset.features)}; "
                "all examples must be alike"
            )
    batch = {key: np.stack([np.asarray(e[key], dtype) for e in each]) for key, (_, dtype) in dataset.features.items()}
    if "label" in batch:
        _check_labels(dataset, batch["label"])
    return batch
