"""Policies: made, checked, saved and loaded; what is refused names the layer."""

import json

import numpy as np
import pytest
from tables import budgets_of, made

from mpq_jax import Bits, Refusal, policy
from mpq_jax.search import solve

TABLE = made(1, tied=True, narrowed=True)
ARGUMENTS = (TABLE.layers, TABLE.bit_widths, TABLE.activation_bit_widths)
GOOD = {"first": [8, 8], "layer0": [2, 3], "layer1": [3, 3], "layer2": [4, 4], "layer3": [2, 2], "last": [32, 32]}


def write(path, bits, **changes):
    path.write_text(json.dumps({"format": "mpq-policy", "version": 1, "bits": bits} | changes))
    return path


def test_round_trip(tmp_path):
    found = solve(TABLE, budgets_of(TABLE, "bitops=W3A3"))
    policy.save_policy(tmp_path / "p.json", found, "abc")
    assert policy.load_policy(tmp_path / "p.json", *ARGUMENTS) == found.policy
    saved = json.loads((tmp_path / "p.json").read_text())
    wanted = {"format", "version", "bits", "objective", "bound", "gap", "status", "solver", "seconds", "budgets"}
    assert (
        set(saved) == wanted | {"importance_sha256"} and saved["budgets"]["bitops"]["used"] == found.used["bitops"][0]
    )


def test_numpys_numbers_are_written(tmp_path):
    given = {"a": Bits(np.int64(3), np.int32(4)), "b": Bits(np.array([2, 3]), 5), "c": Bits((2, 3), 5)}
    found = solve(TABLE, budgets_of(TABLE, "bitops=W3A3"))._replace(policy=given)
    policy.save_policy(tmp_path / "p.json", found, "")
    bits = json.loads((tmp_path / "p.json").read_text())["bits"]
    assert bits == {"a": [3, 4], "b": [[2, 3], 5], "c": [[2, 3], 5]}


def test_what_a_new_policy_takes_the_place_of(tmp_path):
    """Nothing, the same bits, another policy with and without budgets, and files that are no policy."""
    found, other = (solve(TABLE, budgets_of(TABLE, text, "size=4KB")) for text in ("bitops=3M", "bitops=2M"))
    place = tmp_path / "p.json"
    assert policy.replaced(place, found) is None
    policy.save_policy(place, found, "")
    assert policy.replaced(place, found) is None
    assert policy.replaced(place, other) == "another policy (within bitops 3.00 M, size 4.00 KB)"
    assert policy.replaced(write(place, GOOD), found) == "another policy"
    for damaged in ("", "{", json.dumps({"format": "mpq-policy", "version": 1, "bits": {}, "budgets": [1]})):
        place.write_text(damaged)
        assert policy.replaced(place, found) == "a file that is no whole policy.json"


def test_hand_written(tmp_path):
    """Only bits are needed; fixed layers may be left out."""
    expected = {name: Bits(*bits) for name, bits in GOOD.items()}
    assert policy.load_policy(write(tmp_path / "p.json", GOOD), *ARGUMENTS) == expected
    short = {name: bits for name, bits in GOOD.items() if name.startswith("layer")}
    assert policy.load_policy(write(tmp_path / "p.json", short), *ARGUMENTS) == expected


@pytest.mark.parametrize(
    "change, words",
    [
        ({"layer9": [2, 2]}, "layer9"),
        ({"layer2": [9, 2]}, "layer2.*9 weight bits.*2, 3, 4"),
        ({"layer2": [2, 9]}, "layer2.*9 activation bits"),
        ({"layer1": [2, 3]}, "layer1.*2 weight bits.*3, 4"),
        ({"layer1": [3, 2]}, "layer0.*layer1.*same tensor"),
        ({"first": [4, 4]}, "first.*fixes it at W8A8"),
        ({"layer2": [2]}, "layer2"),
        ({"layer2": "W2A2"}, "layer2"),
        ({"layer2": [2.0, 2]}, "layer2"),
        ({"layer2": [True, 2]}, "layer2"),
        ({"layer2": [[2, 3], 2]}, "for 2 output channels; it has 1283 weights"),
    ],
)
def test_refused_bits(tmp_path, change, words):
    with pytest.raises(Refusal, match=words) as refusal:
        policy.load_policy(write(tmp_path / "p.json", GOOD | change), *ARGUMENTS)
    assert "\n" not in str(refusal.value)


def test_refused_files(tmp_path):
    missing = {name: bits for name, bits in GOOD.items() if name != "layer3"}
    for made_file, words in (
        (write(tmp_path / "a.json", missing), "no bits for layer 'layer3'"),
        (write(tmp_path / "b.json", GOOD, version=9), "version 9"),
        (write(tmp_path / "c.json", GOOD, format="mpq-importance"), "no mpq-policy"),
        (write(tmp_path / "d.json", [1]), "must map layer paths"),
    ):
        with pytest.raises(Refusal, match=words):
            policy.load_policy(made_file, *ARGUMENTS)
    whole = write(tmp_path / "e.json", GOOD).read_text()
    (tmp_path / "e.json").write_text(whole[:-20])
    with pytest.raises(Refusal, match="not whole JSON"):
        policy.load_policy(tmp_path / "e.json", *ARGUMENTS)


def test_uniform_takes_the_nearest_candidate():
    found = policy.uniform(*ARGUMENTS[:1], 2, 4, *ARGUMENTS[1:])
    assert (
        found["layer0"] == (2, 3)
        and found["layer1"] == (3, 3)
        and found["layer2"] == (2, 4)
        and found["first"] == (8, 8)
    )


@pytest.mark.parametrize("w, a", [(2, 2), (2, 4), (3, 4), (8, 8), (1, 32)])
def test_uniform_is_always_allowed(w, a):
    """Nearest candidates, and tied layers nearest together."""
    policy.validate(policy.uniform(*ARGUMENTS[:1], w, a, *ARGUMENTS[1:]), *ARGUMENTS, "uniform")


def test_ties_without_common_candidates():
    layers = tuple(
        ly._replace(activation_bit_widths=(4,)) if ly.path == "layer0" else ly._replace(activation_bit_widths=(2,))
        for ly in TABLE.layers
        if ly.tied
    )
    with pytest.raises(Refusal, match="in common"):
        policy.tied_candidates(layers, (2, 3, 4))


def test_stack():
    stacked = policy.stack([{"a": Bits(2, 3)}, {"a": Bits(4, 5)}])
    assert stacked["a"].w.tolist() == [2, 4] and stacked["a"].a.tolist() == [3, 5] and stacked["a"].w.dtype == np.int32
