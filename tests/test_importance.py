"""importance.json: round trips, every malformed file, isotonic repair against scikit-learn, reversal by hand."""

import json

import numpy as np
import pytest
from sklearn.isotonic import IsotonicRegression
from tables import made

from mpq_jax import Bits, Interaction, Refusal
from mpq_jax.importance import combined, load_importance, repair, reversed_importance, save_importance, total


def with_interactions(**options):
    """Two terms: of weights and activations whose lists of widths differ, and of two activations."""
    importance = made(1, activation_widths=(4, 8), **options)
    rng = np.random.default_rng(5)
    first = Interaction(("layer0", "w"), ("layer2", "a"), rng.normal(size=(3, 2)))
    second = Interaction(("layer1", "a"), ("layer0", "a"), rng.normal(size=(2, 2)))
    return importance._replace(interactions=(first, second))


OPTIONS = [{}, {"pair": True}, {"tied": True, "narrowed": True}, {"activation_widths": (4, 8), "alpha": None}]


@pytest.mark.parametrize("options", OPTIONS)
def test_round_trip(tmp_path, options):
    importance = made(1, **options)
    save_importance(tmp_path / "i.json", importance)
    again = load_importance(tmp_path / "i.json")
    for field, mine, theirs in zip(importance._fields, importance, again, strict=True):
        np.testing.assert_equal(theirs, mine, err_msg=field)


def test_the_format_of_the_design(tmp_path):
    """A file as another program would write it, field by field."""
    value = {
        "format": "mpq-importance",
        "version": 1,
        "criterion": "learned",
        "alpha": 0.8,
        "bit_widths": [2, 3],
        "layers": [
            {"path": "stem", "params": 9408, "macs": 118013952, "searched": False, "bits": [8, 8]},
            {
                "path": "conv",
                "params": 36864,
                "macs": 115605504,
                "searched": True,
                "tied": "in",
                "inputs": 4,
                "outputs": 4,
            },
        ],
        "weight": [[0.11, 0.07]],
        "activation": [[0.31, 0.17]],
    }
    (tmp_path / "i.json").write_text(json.dumps(value))
    importance = load_importance(tmp_path / "i.json")
    assert importance.layers[1].tied == "in" and importance.layers[0].bits == (8, 8)
    assert total(importance, {"conv": type(importance.layers[0].bits)(3, 2)}) == pytest.approx(0.8 * 0.07 + 0.31)
    save_importance(tmp_path / "again.json", importance)
    assert json.loads((tmp_path / "again.json").read_text()) == value


def test_interactions_round_trip_and_total(tmp_path):
    """Back as they were, under the format's names; a policy's total has each term once, alpha is not theirs."""
    importance = with_interactions()
    save_importance(tmp_path / "i.json", importance, about={"unit": "loss"})
    value = json.loads((tmp_path / "i.json").read_text())
    assert value["interactions"][0]["a"] == ["layer0", "w"] and value["interactions"][0]["b"] == ["layer2", "a"]
    again = load_importance(tmp_path / "i.json")
    assert [(i.a, i.b) for i in again.interactions] == [(i.a, i.b) for i in importance.interactions]
    for mine, theirs in zip(importance.interactions, again.interactions, strict=True):
        np.testing.assert_array_equal(mine.table, theirs.table)
    policy = {"layer0": Bits(3, 8), "layer1": Bits(2, 4), "layer2": Bits(4, 4), "layer3": Bits(2, 8)}
    added = importance.interactions[0].table[1, 0] + importance.interactions[1].table[0, 1]
    for alpha in (None, 7.0):
        alone = total(importance._replace(interactions=()), policy, alpha)
        assert total(again, policy, alpha) == pytest.approx(alone + added)
    assert "interactions" not in json.loads(_saved(tmp_path, made(1)))


def _saved(tmp_path, importance):
    save_importance(tmp_path / "other.json", importance)
    return (tmp_path / "other.json").read_text()


def test_reversed_by_the_alpha_that_is_asked_for():
    importance = made(0)
    for alpha in (None, 1e-6, 1e6):
        order = np.argsort(combined(importance, alpha).mean((1, 2)))
        wrong = reversed_importance(importance, alpha)
        np.testing.assert_array_equal(wrong.weight[order], importance.weight[order[::-1]])
    assert (reversed_importance(importance, 1e-6).weight != reversed_importance(importance, 1e6).weight).any()


def test_interactions_go_with_their_rows():
    """Reversed, a term names the layers that its layers' rows have gone to."""
    importance = with_interactions()._replace(alpha=1.0)
    order = np.argsort(combined(importance).mean((1, 2)))
    home = {f"layer{a}": f"layer{b}" for a, b in zip(order, order[::-1], strict=True)}
    wrong = reversed_importance(importance)
    for before, after in zip(importance.interactions, wrong.interactions, strict=True):
        assert after.a == (home[before.a[0]], before.a[1]) and after.b == (home[before.b[0]], before.b[1])
        assert after.table is before.table
    assert repair(importance)[0].interactions == importance.interactions


def _term(**changes):
    def change(value):
        value["interactions"][0] |= changes

    return change


BROKEN_INTERACTIONS = {
    "no list": lambda value: value.update(interactions={"a": 1}),
    "null": lambda value: value.update(interactions=None),
    "no table": lambda value: value["interactions"][0].pop("table"),
    "unknown key": _term(weight=1),
    "a fixed layer": _term(a=["first", "w"]),
    "no layer": _term(a=["nowhere", "w"]),
    "kind": _term(b=["layer2", "weight"]),
    "one word": _term(b="layer2"),
    "kind is a list": _term(b=["layer2", ["a"]]),
    "one decision twice": _term(b=["layer0", "w"]),
    "transposed": lambda value: _term(table=np.transpose(value["interactions"][0]["table"]).tolist())(value),
    "ragged": _term(table=[[1, 2], [1, 2], [1]]),
    "not a number": _term(table=[[1, 2], [1, 2], [1, None]]),
    "a pair again": lambda value: value["interactions"].append(
        {"a": ["layer2", "a"], "b": ["layer0", "w"], "table": [[0, 0, 0]] * 2}
    ),
}


@pytest.mark.parametrize("name", BROKEN_INTERACTIONS)
def test_malformed_interactions_are_refused(tmp_path, name):
    save_importance(tmp_path / "i.json", with_interactions())
    value = json.loads((tmp_path / "i.json").read_text())
    BROKEN_INTERACTIONS[name](value)
    (tmp_path / "i.json").write_text(json.dumps(value))
    with pytest.raises(Refusal, match="interactions") as refusal:
        load_importance(tmp_path / "i.json")
    assert "\n" not in str(refusal.value) and "train.py" in str(refusal.value)


def _first(**changes):
    def change(value):
        value["layers"][0] |= changes

    return change


def _second(**changes):
    def change(value):
        value["layers"][1] |= changes

    return change


def _top(**changes):
    return lambda value: value.update(changes)


BROKEN = {
    "version": _top(version=2),
    "format": _top(format="other"),
    "widths twice": _top(bit_widths=[2, 2, 4]),
    "width 0": _top(bit_widths=[0, 3, 4]),
    "width 33": _top(bit_widths=[2, 3, 33]),
    "width true": _top(bit_widths=[True, 3, 4]),
    "no layers": _top(layers=[]),
    "shape": _top(weight=[[1.0, 2.0, 3.0]]),
    "ragged": _top(weight=[[1.0, 2.0, 3.0], [1.0]] * 2),
    "text in table": _top(weight=[["a", 1, 2]] * 4),
    "true in table": _top(weight=[[True, 1, 2]] * 4),
    "no activation": lambda value: value.pop("activation"),
    "pair beside": _top(pair=[]),
    "alpha": _top(alpha=-1),
    "alpha text": _top(alpha="auto"),
    "criterion": _top(criterion=3),
    "no bits": lambda value: value["layers"][0].pop("bits"),
    "bits 33": _first(bits=[8, 33]),
    "bits short": _first(bits=[8]),
    "negative": _second(macs=-1),
    "fraction": _second(params=1.5),
    "true as count": _second(params=True),
    "twice": _second(path="first"),
    "no path": _second(path=None),
    "searched": _second(searched=1),
    "both": _second(bits=[2, 2]),
    "tied": _second(tied=3),
    "unknown key": _second(colour="red"),
    "own widths": _second(weight_bit_widths=[5]),
    "inputs": _second(inputs=-4),
    "empty tie": _second(tied=""),
    "more macs than int64 holds": _second(macs=2**52),
    "more params than int64 holds": _second(params=10**30),
    "more inputs than int64 holds": _second(inputs=10**19),
    "more outputs than int64 holds": _second(outputs=2**57),
    "integer beyond floats in table": _top(weight=[[10**400, 1, 2]] * 4),
    "integer beyond floats as alpha": _top(alpha=10**400),
    "deep table": _top(weight=json.loads("[" * 400 + "1" + "]" * 400)),
    "table of objects": _top(weight=[{"a": 1}] * 4),
    "null in table": _top(weight=[[None, 1, 2]] * 4),
    "activation widths": _top(activation_bit_widths=[2, 3, "4"]),
    "layer is a list": lambda value: value["layers"].append([]),
    "no searched layer": lambda value: value.update(layers=value["layers"][:1]),
}


@pytest.mark.parametrize("name", BROKEN)
def test_malformed_files_are_refused(tmp_path, name):
    save_importance(tmp_path / "i.json", made(1))
    value = json.loads((tmp_path / "i.json").read_text())
    BROKEN[name](value)
    (tmp_path / "i.json").write_text(json.dumps(value))
    with pytest.raises(Refusal) as refusal:
        load_importance(tmp_path / "i.json")
    assert "\n" not in str(refusal.value) and "train.py" in str(refusal.value)


@pytest.mark.parametrize(
    "damage", [lambda t: t[:200], lambda t: "", lambda t: "[1]", lambda t: t.replace("0.", "NaN,", 1)]
)
def test_damaged_files_are_refused(tmp_path, damage):
    save_importance(tmp_path / "i.json", made(1))
    (tmp_path / "i.json").write_text(damage((tmp_path / "i.json").read_text()))
    with pytest.raises(Refusal):
        load_importance(tmp_path / "i.json")
    with pytest.raises(Refusal, match="does not exist"):
        load_importance(tmp_path / "none.json")


def test_numbers_that_python_will_not_read_are_refused(tmp_path):
    """An integer of 5,000 digits, and a version that only looks like 1: one line each, no traceback."""
    save_importance(tmp_path / "i.json", made(1))
    text = (tmp_path / "i.json").read_text()
    for old, new in (('"macs": 5000', '"macs": ' + "9" * 5000), ('"version": 1', '"version": true')):
        assert old in text
        (tmp_path / "i.json").write_text(text.replace(old, new))
        with pytest.raises(Refusal) as refusal:
            load_importance(tmp_path / "i.json")
        assert "\n" not in str(refusal.value) and "train.py" in str(refusal.value)


def test_nan_and_infinity_are_refused(tmp_path):
    for bad in ("NaN", "Infinity", "1e999"):
        save_importance(tmp_path / "i.json", made(1))
        value = json.loads((tmp_path / "i.json").read_text())
        value["weight"][0][0] = 12345.5
        (tmp_path / "i.json").write_text(json.dumps(value).replace("12345.5", bad))
        with pytest.raises(Refusal, match="finite"):
            load_importance(tmp_path / "i.json")


def test_repair_equals_scikit_learn():
    importance = made(2, widths=(2, 3, 4, 5, 6))
    noise = np.random.default_rng(0).normal(0, 0.3, importance.weight.shape)
    rough = importance._replace(weight=importance.weight + noise, activation=importance.activation[:, ::-1])
    fixed, outliers = repair(rough)
    for before, after in ((rough.weight, fixed.weight), (rough.activation, fixed.activation)):
        for x, y in zip(before, after, strict=True):
            np.testing.assert_allclose(y, IsotonicRegression(increasing=False).fit_transform(range(5), x), atol=1e-12)
    expected = {
        (f"layer{row}", kind, 2 + i)
        for kind, table in (("weight", rough.weight), ("activation", rough.activation))
        for row in range(4)
        for i in range(4)
        if table[row, i] < table[row, i + 1]
    }
    assert set(outliers) == expected and repair(fixed)[1] == []
    assert repair(importance)[1] == []


def test_reversed_by_hand():
    """Layers ranked by their mean importance; the least important row goes to the most important layer."""
    importance = made(3)._replace(alpha=1.0)
    order = np.argsort(combined(importance).mean((1, 2)))
    wrong = reversed_importance(importance)
    for rank in range(4):
        np.testing.assert_array_equal(wrong.weight[order[rank]], importance.weight[order[3 - rank]])
        np.testing.assert_array_equal(wrong.activation[order[rank]], importance.activation[order[3 - rank]])
