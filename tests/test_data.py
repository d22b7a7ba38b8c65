"""Data: what the batches hold, that they can be made again anywhere, and that a set that is not there is refused."""

import itertools
import math
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from made_data import jpeg, made_image, make_cifar10, make_fashion_mnist, make_imagenet2012

from mpq_jax.data import eval_batches, open_dataset, opening, records, train_batches
from mpq_jax.data.images import centre_crop
from mpq_jax.data.opening import cut_validation
from mpq_jax.data.prepare import labelled, write_set
from mpq_jax.data.recipes import IDX_VARIABLE, RECIPES
from mpq_jax.types import Refusal

NAMES = ("digits", "fashion_mnist", "cifar10", "imagenet2012")
SIZES = {"imagenet2012": 32}
ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A data_dir with all four sets, and what was put into the three made ones."""
    root = tmp_path_factory.mktemp("data")
    contents = {
        "fashion_mnist": make_fashion_mnist(root),
        "cifar10": make_cifar10(root),
        "imagenet2012": make_imagenet2012(root, sizes=((60, 80), (80, 53), (64, 64))),
    }
    return root, contents


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """No set is found by accident, nothing is written into the working directory."""
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "home"))
    monkeypatch.setenv(IDX_VARIABLE, str(tmp_path / "no-idx"))
    monkeypatch.chdir(tmp_path)


def opened(made, name, **options):
    return open_dataset(name, data_dir=made[0], image_size=SIZES.get(name), **options)


def taken(batches, count):
    return list(itertools.islice(batches, count))


def same(first, second):
    return all(np.array_equal(first[key], second[key]) for key in ("image", "label"))


def joined(batches):
    """All examples of some batches, padding left out: (image bytes, label)."""
    return [
        (image.tobytes(), int(label))
        for batch in batches
        for image, label in zip(batch["image"], batch["label"], strict=True)
        if label >= 0
    ]


# What every set must do, whatever it is made of.


@pytest.mark.parametrize("name", NAMES)
def test_batches_have_the_promised_form(made, name):
    dataset = opened(made, name)
    for batch in (next(train_batches(dataset, 6, seed=0)), next(eval_batches(dataset, "test", 6))):
        assert batch["image"].shape == (6, *dataset.image_shape) and batch["image"].dtype == np.float32
        assert batch["label"].shape == (6,) and batch["label"].dtype == np.int32
        assert batch["label"].min() >= 0 and batch["label"].max() < dataset.num_classes
        assert np.isfinite(batch["image"]).all() and batch["image"].std() > 0.1


@pytest.mark.parametrize("name", NAMES)
def test_training_can_be_made_again_from_any_step(made, name):
    dataset = opened(made, name)
    batches = taken(train_batches(dataset, 10, seed=3), 6)
    again = taken(train_batches(opened(made, name), 10, seed=3), 6)
    assert all(map(same, batches, again))
    for step in (1, 4):
        assert same(next(train_batches(dataset, 10, seed=3, first_step=step)), batches[step])
    assert not same(next(train_batches(dataset, 10, seed=4)), batches[0])


@pytest.mark.parametrize("name", NAMES)
def test_every_example_once_an_epoch_in_a_new_order(made, name):
    dataset = opened(made, name, augment=False)
    size = dataset.sizes["train"]
    examples = joined(taken(train_batches(dataset, 7, seed=0), 2 * size // 7 + 1))
    first, second = examples[:size], examples[size : 2 * size]
    everything = Counter(joined(eval_batches(dataset, "train", 16)))
    assert sum(everything.values()) == size and len(everything) > 0.9 * size
    assert Counter(first) == Counter(second) == everything
    # A random permutation keeps one example in its place on average.
    assert sum(one == other for one, other in zip(first, second, strict=True)) < 12
    assert first != joined(eval_batches(dataset, "train", 16))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("count", (2, 3))
def test_processes_share_the_batches_of_one(made, name, count):
    dataset = opened(made, name)
    for single, *parts in zip(
        taken(train_batches(dataset, 12, seed=1, first_step=2), 3),
        *(
            train_batches(dataset, 12, seed=1, first_step=2, process_index=index, process_count=count)
            for index in range(count)
        ),
        strict=False,
    ):
        for index, part in enumerate(parts):
            block = slice(index * 12 // count, (index + 1) * 12 // count)
            assert same(part, {key: value[block] for key, value in single.items()})
    whole = list(eval_batches(dataset, "validation", 12))
    shares = [
        list(eval_batches(dataset, "validation", 12, process_index=index, process_count=count))
        for index in range(count)
    ]
    assert {len(share) for share in shares} == {len(whole)}
    assert Counter(joined(itertools.chain(*shares))) == Counter(joined(whole))


@pytest.mark.parametrize("name", NAMES)
def test_evaluation_is_one_pass_padded_never_dropped(made, name):
    dataset = opened(made, name)
    for split in ("train", "validation", "test"):
        batches = list(eval_batches(dataset, split, 16))
        size = dataset.sizes[split]
        assert len(batches) == math.ceil(size / 16) and all(len(batch["label"]) == 16 for batch in batches)
        labels = np.concatenate([batch["label"] for batch in batches])
        assert (labels[:size] >= 0).all() and (labels[size:] == -1).all()
        assert not np.concatenate([batch["image"] for batch in batches])[size:].any()
        assert all(map(same, batches, eval_batches(dataset, split, 16)))
        limited = joined(eval_batches(dataset, split, 4, limit=3))
        assert limited == joined(batches)[:3]


@pytest.mark.parametrize("name", NAMES)
def test_the_splits_have_nothing_in_common(made, name):
    dataset = opened(made, name)
    train, held_out = dataset.splits["train"], dataset.splits["validation"]
    assert train.records == held_out.records and train.records != dataset.splits["test"].records
    numbers = np.concatenate([train.numbers, held_out.numbers])
    assert np.array_equal(np.sort(numbers), np.arange(len(numbers)))
    again = opened(made, name, augment=False).splits["validation"].numbers
    assert np.array_equal(held_out.numbers, again)
    assert not np.array_equal(
        np.sort(held_out.numbers), np.sort(opened(made, name, seed=1).splits["validation"].numbers)
    )
    if name != "digits":
        assert set(joined(eval_batches(dataset, "validation", 8))).isdisjoint(joined(eval_batches(dataset, "train", 8)))
        assert set(joined(eval_batches(dataset, "test", 8))).isdisjoint(joined(eval_batches(dataset, "train", 8)))


@pytest.mark.parametrize("name", ("fashion_mnist", "cifar10", "imagenet2012"))
def test_images_and_labels_belong_together(made, name):
    """Every example against the made images themselves, found by their label and their pixels."""
    dataset, contents = opened(made, name, validation_fraction=0), made[1][name]
    recipe, size = RECIPES[name], SIZES.get(name)
    for split, source in (("train", "train"), ("test", "validation" if name == "imagenet2012" else "test")):
        images, labels = contents[source]
        if size:
            images = [centre_crop(image, 3, size) for image in images]
        expected = [(np.asarray(image, np.float64) / 255 - recipe.mean) / recipe.std for image in images]
        found = []
        for batch in eval_batches(dataset, split, 10):
            for image, label in zip(batch["image"], batch["label"], strict=True):
                errors = [np.abs(image - other).max() for other in expected]
                found.append(int(np.argmin(errors)))
                assert min(errors) < 1e-5 and labels[found[-1]] == label
        assert sorted(found) == list(range(len(labels)))


# Order and augmentation.


@pytest.mark.parametrize("name", ("fashion_mnist", "cifar10", "imagenet2012"))
def test_augmentation_depends_on_position_not_on_the_batch(made, name):
    dataset, plain = opened(made, name), opened(made, name, augment=False)
    small, large = (joined(taken(train_batches(dataset, size, seed=2), 48 // size)) for size in (8, 24))
    assert small == large
    unchanged = joined(taken(train_batches(plain, 24, seed=2), 2))
    assert [label for _, label in unchanged] == [label for _, label in large]
    assert sum(one != other for one, other in zip(unchanged, large, strict=True)) > 40
    # The same example looks different in different epochs: always where it is cropped, mostly where only shifted.
    size = dataset.sizes["train"]
    assert len(set(joined(taken(train_batches(dataset, size, seed=2), 3)))) >= (3 if name in SIZES else 2.8) * size


# The validation split.


@pytest.mark.parametrize("count, fraction", ((100, 0.1), (57, 0.25), (10, 0.01), (1000, 0.5)))
@pytest.mark.parametrize("with_labels", (False, True))
def test_validation_is_cut_at_random_and_in_proportion(count, fraction, with_labels):
    labels = np.random.default_rng(1).choice([3, 5, 9], count, p=[0.6, 0.3, 0.1]) if with_labels else None
    kept, held_out = cut_validation("name", count, fraction, 0, labels)
    assert len(held_out) == max(1, round(count * fraction))
    assert sorted([*kept, *held_out]) == list(range(count))
    others = [cut_validation(name, count, fraction, seed, labels)[1] for name, seed in (("name", 1), ("other", 0))]
    if count > 10:
        assert all(set(other) != set(held_out) for other in others)
    if labels is not None:
        for label in np.unique(labels):
            share = (labels == label).sum() * len(held_out) / count
            assert abs((labels[held_out] == label).sum() - share) <= 1
    assert np.array_equal(held_out, cut_validation("name", count, fraction, 0, labels)[1])


def test_no_validation_is_possible_and_reading_it_is_refused(made):
    dataset = opened(made, "cifar10", validation_fraction=0)
    assert dataset.sizes == {"train": 100, "validation": 0, "test": 50}
    with pytest.raises(Refusal, match="validation split of cifar10 is empty"):
        eval_batches(dataset, "validation", 4)


# digits and Fashion-MNIST, which are written here.


def test_digits_are_scikit_learns_scans(made):
    from sklearn.datasets import load_digits

    dataset, scans = opened(made, "digits", validation_fraction=0), load_digits()
    assert dataset.sizes == {"train": 1442, "validation": 0, "test": 355}
    recipe, found, labels = RECIPES["digits"], Counter(), Counter()
    for split in ("train", "test"):
        for batch in eval_batches(dataset, split, 128):
            real = batch["label"] >= 0
            pixels = (batch["image"][real].astype(np.float64) * recipe.std + recipe.mean) * 255 / 15
            assert np.abs(pixels - pixels.round()).max() < 1e-4
            found.update(
                (image.round().astype(np.uint8).tobytes(), int(label))
                for image, label in zip(pixels, batch["label"][real], strict=True)
            )
            if split == "test":
                labels.update(batch["label"][real].tolist())
    assert found == Counter(
        (image.astype(np.uint8).tobytes(), int(label)) for image, label in zip(scans.images, scans.target, strict=True)
    )
    assert labels == {label: (scans.target == label).sum() // 5 for label in range(10)}


def test_digits_constants_are_those_of_the_training_images(made):
    dataset = opened(made, "digits", validation_fraction=0)
    images = np.concatenate([batch["image"] for batch in eval_batches(dataset, "train", 103)])
    assert len(images) == 1442 and abs(images.mean(dtype=np.float64)) < 1e-4
    assert abs(images.std(dtype=np.float64) - 1) < 1e-4


def test_two_processes_write_digits_at_once(tmp_path):
    script = (
        "from mpq_jax.data import open_dataset, eval_batches\n"
        "d = open_dataset('digits', data_dir='shared')\n"
        "print(d.sizes, sum((b['label'] >= 0).sum() for b in eval_batches(d, 'test', 64)))"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    running = [
        subprocess.Popen(
            [sys.executable, "-c", script], stdout=subprocess.PIPE, env=environment, cwd=tmp_path, text=True
        )
        for _ in range(2)
    ]
    outputs = [process.communicate(timeout=60)[0] for process in running]
    assert [process.returncode for process in running] == [0, 0]
    assert outputs == ["{'train': 1298, 'validation': 144, 'test': 355} 355\n"] * 2
    # Nothing half written is left beside the set.
    assert sorted(path.name for path in (tmp_path / "shared").iterdir()) == ["digits"]
    assert [path.name for path in (tmp_path / "shared" / "digits").iterdir()] == ["1.0.0"]


# Reading: memory, files, other sets.


def test_streamed_and_in_memory_are_the_same(made, monkeypatch):
    in_memory = opened(made, "cifar10", validation_fraction=0, augment=False)
    monkeypatch.setattr(opening, "MEMORY_LIMIT", 0)
    streamed = opened(made, "cifar10", validation_fraction=0, augment=False)
    assert in_memory.in_memory and not streamed.in_memory
    for split in ("train", "test"):
        for one, other in zip(eval_batches(in_memory, split, 32), eval_batches(streamed, split, 32), strict=True):
            assert same(one, other)
    pairs = zip(train_batches(in_memory, 32, seed=0), train_batches(streamed, 32, seed=0), strict=True)
    assert all(same(*pair) for pair in itertools.islice(pairs, 5))


def test_workers_make_the_same_batches(made):
    dataset = opened(made, "imagenet2012")
    iterator = train_batches(dataset, 8, seed=0, first_step=2, workers=2)
    batches = taken(iterator, 4)
    iterator.close()
    assert all(map(same, batches, train_batches(dataset, 8, seed=0, first_step=2)))


def test_decoded_images_are_kept_until_the_set_changes(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "_CACHE_FROM", 0)
    make_cifar10(tmp_path / "data", train=20, test=10)
    first = joined(eval_batches(open_dataset("cifar10", data_dir=tmp_path / "data"), "test", 10))
    (kept,) = (tmp_path / "data" / "decoded").glob("cifar10-*-test-*.npz")
    with np.load(kept) as arrays:
        np.savez(kept, images=arrays["images"], labels=(arrays["labels"] + 1) % 10)
    again = joined(eval_batches(open_dataset("cifar10", data_dir=tmp_path / "data"), "test", 10))
    assert [label for _, label in again] == [(label + 1) % 10 for _, label in first]
    kept.write_bytes(kept.read_bytes()[:1000])
    assert joined(eval_batches(open_dataset("cifar10", data_dir=tmp_path / "data"), "test", 10)) == first
    for file in (tmp_path / "data" / "cifar10" / "3.0.2").iterdir():
        os.utime(file, ns=(1, 1))
    kept.unlink()
    np.savez(kept, images=np.zeros((10, 32, 32, 3), np.uint8), labels=np.zeros(10, np.int32))
    assert joined(eval_batches(open_dataset("cifar10", data_dir=tmp_path / "data"), "test", 10)) == first


def test_any_set_with_images_and_labels_can_be_read(tmp_path):
    """Grey and coloured JPEGs and PNGs of several sizes, no recipe: centre crop, [-1, 1], "validation" as test."""
    import tensorflow_datasets as tfds

    features = tfds.features.FeaturesDict(
        {"image": tfds.features.Image(shape=(None, None, 3)), "label": tfds.features.ClassLabel(num_classes=4)}
    )
    random = np.random.default_rng(0)
    images = [made_image(random, number, (30 + number, 40, 3 if number % 2 else 1)) for number in range(12)]

    def encoded(count):
        return lambda: ((n, {"image": jpeg(images[n]), "label": n % 4}) for n in range(count))

    write_set(tmp_path / "data", "garden", "2.0.0", features, {"train": encoded(12), "validation": encoded(4)})
    dataset = open_dataset("garden", data_dir=tmp_path / "data", image_size=24, validation_fraction=0.25)
    assert (dataset.num_classes, dataset.image_shape) == (4, (24, 24, 3))
    assert dataset.sizes == {"train": 9, "validation": 3, "test": 4}
    batch = next(eval_batches(dataset, "test", 4))
    expected = {n: centre_crop(jpeg(images[n]), 3, 24) / 127.5 - 1 for n in range(4)}
    for image, label in zip(batch["image"], batch["label"], strict=True):
        np.testing.assert_allclose(image, expected[int(label)], atol=1e-6)
    # Without a recipe training images are not changed.
    assert set(joined(taken(train_batches(dataset, 9, seed=0), 1))) == set(joined(eval_batches(dataset, "train", 9)))


def test_neither_jax_nor_tensorflow_is_needed(made):
    """jax cannot be imported at all here; grain uses it where it can."""
    script = (
        "import sys\n"
        "class NoJax:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('jax', 'jaxlib'):\n"
        "            raise ImportError(name)\n"
        "import mpq_jax.data as data\n"
        "heavy = ('jax', 'tensorflow', 'tensorflow_datasets', 'grain', 'sklearn')\n"
        "assert not [name for name in heavy if name in sys.modules]\n"
        "sys.meta_path.insert(0, NoJax())\n"
        "for name, size in (('digits', None), ('cifar10', None), ('imagenet2012', 32)):\n"
        "    dataset = data.open_dataset(name, data_dir=sys.argv[1], image_size=size)\n"
        "    next(data.train_batches(dataset, 4, seed=0))\n"
        "    sum(len(batch['label']) for batch in data.eval_batches(dataset, 'test', 4))\n"
        "assert not [name for name in ('jax', 'tensorflow') if name in sys.modules]\n"
        "print('read')"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", script, str(made[0])]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout == "read\n", done.stderr


# What is refused.


@pytest.mark.parametrize(
    "name, words",
    (
        ("fashion_mnist", ["apt-get install dataset-fashion-mnist", IDX_VARIABLE, "tfds build fashion_mnist"]),
        ("cifar10", ["tfds build cifar10 --file_format array_record --data_dir nowhere"]),
        ("imagenet2012", ["ILSVRC2012_img_train.tar", "tfds build imagenet2012", "--manual_dir DIR"]),
        ("cifar01", ["did you mean cifar10?"]),
        ("tf_flowers", ["tfds build tf_flowers"]),
        ("digits:7.0.0", ["digits alone"]),
        ("../secret", ["is no name"]),
    ),
)
def test_a_missing_set_is_refused_with_the_way_to_get_it(name, words):
    with pytest.raises(Refusal) as refusal:
        open_dataset(name, data_dir="nowhere")
    message = str(refusal.value)
    assert "\n" not in message and all(word in message for word in words)
    assert name in message


@pytest.mark.parametrize("damage", ("tfrecord", "json", "no records", "no test"))
def test_a_set_that_cannot_be_read_is_refused(tmp_path, damage):
    make_cifar10(tmp_path / "data", train=20, test=10)
    folder = tmp_path / "data" / "cifar10" / "3.0.2"
    info = folder / "dataset_info.json"
    if damage == "tfrecord":
        info.write_text(info.read_text().replace('"array_record"', '"tfrecord"'))
    elif damage == "json":
        info.write_text(info.read_text()[:100])
    elif damage == "no records":
        next(folder.glob("*train*")).unlink()
    else:
        info.write_text(info.read_text().replace('"name": "test"', '"name": "tset"'))
    with pytest.raises(Refusal) as refusal:
        open_dataset("cifar10", data_dir=tmp_path / "data")
    assert "\n" not in str(refusal.value) and "cifar10" in str(refusal.value)


def test_a_set_without_images_and_labels_is_refused(tmp_path):
    import tensorflow_datasets as tfds

    features = tfds.features.FeaturesDict(
        {"image": tfds.features.Image(shape=(4, 4, 1)), "label": tfds.features.Text()}
    )
    examples = labelled(np.zeros((3, 4, 4, 1), np.uint8), np.zeros(3, int))
    texts = {"train": lambda: ((key, {**one, "label": "x"}) for key, one in examples())}
    write_set(tmp_path / "data", "captions", "1.0.0", features, {**texts, "test": texts["train"]})
    with pytest.raises(Refusal, match='has the features image, label; only sets with an "image"'):
        open_dataset("captions", data_dir=tmp_path / "data")


@pytest.mark.parametrize(
    "options, words",
    (
        ({"validation_fraction": 1.0}, "validation_fraction is 1.0"),
        ({"validation_fraction": -0.1}, "validation_fraction is -0.1"),
        ({"validation_fraction": 0.999}, "too few"),
        ({"image_size": 64}, "cifar10 has images of 32x32"),
    ),
)
def test_impossible_options_are_refused(made, options, words):
    with pytest.raises(Refusal, match=words):
        open_dataset("cifar10", data_dir=made[0], **options)
    with pytest.raises(Refusal, match="image_size is 0"):
        open_dataset("imagenet2012", data_dir=made[0], image_size=0)


@pytest.mark.parametrize(
    "layout",
    (
        {"batch_size": 0},
        {"batch_size": 10, "process_count": 3},
        {"batch_size": 4, "process_index": 2, "process_count": 2},
        {"batch_size": 4, "process_count": 0},
    ),
)
def test_impossible_layouts_are_refused(made, layout):
    dataset = opened(made, "cifar10")
    with pytest.raises(Refusal):
        train_batches(dataset, seed=0, **layout)
    with pytest.raises(Refusal):
        eval_batches(dataset, "test", **layout)


def test_impossible_steps_splits_and_limits_are_refused(made):
    dataset = opened(made, "cifar10")
    with pytest.raises(Refusal, match="first_step is -1"):
        train_batches(dataset, 4, seed=0, first_step=-1)
    with pytest.raises(Refusal, match="'valid' is no split; give one of train, validation, test"):
        eval_batches(dataset, "valid", 4)
    with pytest.raises(Refusal, match="limit is 0"):
        eval_batches(dataset, "test", 4, limit=0)


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(Refusal, match="digits cannot be written under"):
        open_dataset("digits", data_dir=tmp_path / "file")
