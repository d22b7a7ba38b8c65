"""Indicators of LIMPQ's code: read, mapped to our layers, and refused where they are anything but plain numbers."""

import os
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpq_jax import Refusal, limpq
from mpq_jax.config import Config, Data, Model, Quantize, Search

CONFIG = Config(data=Data(name="cifar10"), model=Model(name="resnet8"), quantize=Quantize(bit_widths=(2, 3, 4)))
NAMES = [
    *("layer1.0.conv1", "layer1.0.conv2", "layer2.0.conv1", "layer2.0.conv2", "layer2.0.downsample.0"),
    *("layer3.0.conv1", "layer3.0.conv2", "layer3.0.downsample.0"),
]


def made(names=NAMES, widths=(6, 5, 4, 3, 2), seed=0):
    """As LIMPQ's importance_extractor.py writes it, with numbers from a seed."""
    rng = np.random.default_rng(seed)

    def tensor():
        return {f"module.{name}": {str(b): float(rng.random()) for b in widths} for name in names}

    return {"weight": tensor(), "act": tensor(), "layer_name": [f"module.{name}" for name in names]}


def as_csv(value):
    lines = ["layer,tensor,bits,value"]
    for tensor in ("weight", "act"):
        lines += [f"{n},{tensor},{b},{v!r}" for n, entries in value[tensor].items() for b, v in entries.items()]
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5, "csv"])
def test_reads_every_protocol_and_csv(tmp_path, protocol):
    value = made()
    path = tmp_path / ("i.csv" if protocol == "csv" else "i.pkl")
    if protocol == "csv":
        path.write_text(as_csv(value))
    else:
        path.write_bytes(pickle.dumps(value, protocol))
    found = limpq.read(path)
    assert list(found.weight) == NAMES and list(found.act) == NAMES
    for ours, theirs in ((found.weight, value["weight"]), (found.act, value["act"])):
        for name in NAMES:
            assert ours[name] == {int(b): v for b, v in theirs[f"module.{name}"].items()}


def test_the_table_of_our_layers():
    """Torch's names stand for our layers; rows in the order of our table, columns in that of the candidates."""
    value = made()
    indicators = limpq.Indicators(
        *(
            {n.removeprefix("module."): {int(b): v for b, v in e.items()} for n, e in value[t].items()}
            for t in ("weight", "act")
        )
    )
    table, ignored = limpq.to_importance(indicators, CONFIG, "file")
    searched = [layer.path for layer in table.layers if layer.searched]
    assert ignored == [] and len(searched) == 8 and table.alpha is None
    torch = {"stage1/block1/conv1": "layer1.0.conv1", "stage3/block1/shortcut_conv": "layer3.0.downsample.0"}
    for path, name in torch.items():
        row = searched.index(path)
        for k, bits in enumerate((2, 3, 4)):
            assert table.weight[row, k] == value["weight"][f"module.{name}"][str(bits)]
            assert table.activation[row, k] == value["act"][f"module.{name}"][str(bits)]


def test_fixed_layers_are_left_aside_and_rules_come_along():
    import dataclasses

    config = dataclasses.replace(
        CONFIG,
        quantize=Quantize(bit_widths=(2, 3, 4), rules=("stage1/block1/conv1=8,8", "stage2/.*=w2/3,a4")),
        search=Search(rules=("stage3=equal",)),
    )
    value = made(widths=(3, 2, 4))
    del value["weight"]["module.layer2.0.conv1"]["4"]
    indicators = limpq.Indicators(
        *(
            {n.removeprefix("module."): {int(b): v for b, v in e.items()} for n, e in value[t].items()}
            for t in ("weight", "act")
        )
    )
    table, ignored = limpq.to_importance(indicators, config, "file")
    assert ignored == ["layer1.0.conv1"] and table.weight.shape == (7, 3) and table.rules == ("stage3=equal",)


def test_names_of_their_mobilenet():
    config = Config(data=Data(name="imagenet2012"), model=Model(name="mobilenetv1"))
    names = limpq.our_paths(config, [])
    assert names["features.stage1.unit1.dw_conv.conv"] == "unit1/depthwise"
    assert names["features.stage4.unit6.pw_conv.conv"] == "unit11/pointwise"
    assert names["features.stage5.unit2.pw_conv.conv"] == names["blocks.4.1.conv_pw"] == "unit13/pointwise"


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda v: v["weight"].pop("module.layer2.0.conv1"), "no 'weight' indicators of layer 'stage2/block1/conv1'"),
        (lambda v: v["act"]["module.layer2.0.conv1"].pop("3"), "at 3 bits, only at 2,4,5,6"),
        (lambda v: v["act"].update({"module.layer9.conv": {"2": 1.0}}), "'layer9.conv', which resnet8 has not"),
    ],
)
def test_indicators_of_another_model(tmp_path, change, words):
    value = made()
    change(value)
    (tmp_path / "i.pkl").write_bytes(pickle.dumps(value))
    with pytest.raises(Refusal, match=words):
        limpq.to_importance(limpq.read(tmp_path / "i.pkl"), CONFIG, "file")


# ---- what a pickle must not do ------------------------------------------------------------------------------------


class Calls:
    def __reduce__(self):
        return (os.system, ("true",))


class Looks:
    def __reduce__(self):
        return (getattr, (str, "upper"))


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize(
    "value", [Calls(), {"weight": Calls()}, [Looks()], os.system, np.float32(1), {1, 2}, b"bytes", bytearray(3), 1j]
)
def test_no_operation_that_could_import_or_call(monkeypatch, value, protocol):
    content, ran = pickle.dumps(value, protocol), []
    monkeypatch.setattr(os, "system", ran.append)
    with pytest.raises(Refusal, match="is not run") as refusal:
        limpq.unpickle(content, "file")
    assert ran == [] and "\n" not in str(refusal.value)


HANDMADE = {
    "global": b"cposix\nsystem\n(S'true'\ntR.",
    "stack global": b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c\x04true\x85R.",
    "inst": b"(S'true'\niposix\nsystem\n.",
    "persistent id": b"Pname\n.",
    "extension": b"\x82\x01.",
    "build": b"}}b.",
    "huge memo": b"\x80\x02}r\xff\xff\xff\x7f.",
    "huge text": b"\x80\x04\x8d\xff\xff\xff\xff\xff\xff\xff\x7fa.",
    "huge integer": b"\x80\x02\x8b\xff\xff\xff\x7f1.",
    "nothing on the stack": b".",
    "no stop": b"}",
    "deep": b"(" * 10**5 + b".",
    "text": b"hello",
    "empty": b"",
}


@pytest.mark.parametrize("name", HANDMADE)
def test_handmade_pickles(name):
    with pytest.raises(Refusal) as refusal:
        limpq.unpickle(HANDMADE[name], "file")
    assert "\n" not in str(refusal.value) and "importance_extractor" in str(refusal.value)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_mutated_files_are_read_or_refused(tmp_path_factory, data):
    """Never anything but plain numbers or a Refusal."""
    content = bytearray(pickle.dumps(made(NAMES[:2], (2, 3)), data.draw(st.sampled_from([0, 2, 4]))))
    for _ in range(data.draw(st.integers(1, 6))):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.mktemp("m") / "i.pkl"
    path.write_bytes(bytes(content[: data.draw(st.integers(0, len(content)))] if data.draw(st.booleans()) else content))
    try:
        found = limpq.read(path)
    except Refusal as refusal:
        assert "\n" not in str(refusal)
        return
    assert all(type(v) is float for tensor in found for entries in tensor.values() for v in entries.values())


DOUBLED: list = []  # of 60 levels, each holding the one below twice: its text would be longer than any memory
for _ in range(60):
    DOUBLED = [DOUBLED, DOUBLED]


@pytest.mark.parametrize(
    "value, words",
    [
        ([1, 2], "no dictionary"),
        ({}, "no layers under 'weight'"),
        ({"weight": {"a": 3}, "act": {}}, "must map layer names"),
        ({"weight": {"a": {"2": "x"}}, "act": {}}, "'2'"),
        ({"weight": {"a": {"0": 1.0}}, "act": {}}, "'0'"),
        ({"weight": {"a": {"2": float("nan")}}, "act": {}}, "nan"),
        ({"weight": {"a": {"2": True}}, "act": {}}, "True"),
        ({"weight": {"a": {"2": 1.0}}}, "no layers under 'act'"),
        ({"weight": {"a": {"2": 1.0}, "module.a": {"2": 2.0}}, "act": {}}, "layer 'a' twice"),
        ({"weight": {"a": {"2": 10**100}}, "act": {}}, "'2': int"),
        ({"weight": {"a": {"2": DOUBLED}}, "act": {}}, "'2': list"),
        ({"weight": {"a": {(2, 3): 1.0}}, "act": {}}, "is no plain pickle: TUPLE2"),
    ],
)
def test_plain_but_wrong(tmp_path, value, words):
    (tmp_path / "i.pkl").write_bytes(pickle.dumps(value))
    with pytest.raises(Refusal, match=words):
        limpq.read(tmp_path / "i.pkl")


@pytest.mark.parametrize(
    "text, words",
    [
        ("", "no layers under 'weight'"),
        ("layer,bits\na,2\n", "line 2: it must have"),
        ("layer,tensor,bits,value\na,weight,2,x\n", "line 2: 'x' is no number"),
        ("layer,tensor,bits,value\na,weights,2,1\n", "line 2"),
        ("layer,tensor,bits,value\na,weight,2,1\na,weight,2,1\n", "stands twice"),
        ("layer,tensor,bits,value\na,weight,2,inf\na,act,2,1\n", "inf"),
    ],
)
def test_wrong_csv(tmp_path, text, words):
    (tmp_path / "i.csv").write_text(text)
    with pytest.raises(Refusal, match=words):
        limpq.read(tmp_path / "i.csv")
    with pytest.raises(Refusal, match="does not exist"):
        limpq.read(tmp_path / "none.pkl")
