"""Trained weights of a user's own model from files: each form against the arrays that were written."""

import jax
import numpy as np
import pytest
import safetensors.numpy
from flax import serialization, traverse_util

from mpq_jax import Refusal, weights


def _nested(flat):
    return traverse_util.unflatten_dict(flat, sep="/")


TREE = {
    "params": _nested(
        {"dense/kernel": np.arange(6, dtype=np.float32).reshape(2, 3), "dense/bias": np.ones(3, np.float32)}
    ),
    "batch_stats": _nested({"norm/mean": np.full(3, 2.0, np.float32)}),
}


def test_weights_from_files_of_every_kind(tmp_path):
    """Each form that Flax weights are kept in fills the same leaves; random streams of NNX stay as they were."""
    import orbax.checkpoint as ocp

    empty = {**jax.tree.map(np.zeros_like, TREE), "RngCount": {"dropout": {"count": np.uint32(7)}}}
    flat = traverse_util.flatten_dict(TREE, sep="/")
    safetensors.numpy.save_file(
        {k: np.ascontiguousarray(v, np.float32) for k, v in flat.items()}, tmp_path / "a.safetensors"
    )
    one_tree = {k.partition("/")[2]: np.ascontiguousarray(v, np.float32) for k, v in flat.items()}
    safetensors.numpy.save_file(one_tree, tmp_path / "nnx.safetensors")
    (tmp_path / "b.msgpack").write_bytes(serialization.msgpack_serialize(TREE))
    with ocp.PyTreeCheckpointer() as writer:
        writer.save((tmp_path / "c").absolute(), {**TREE, "step": 4, "opt_state": [np.zeros(2)]})
        writer.save((tmp_path / "d").absolute(), {k: {"value": v} for k, v in one_tree.items()})
        # A folder of checkpoints, as runs and orbax's manager have them: the newest counts.
        for step, factor in ((9, 0.0), (100, 1.0)):
            each = jax.tree.map(lambda x, factor=factor: factor * x, TREE)
            writer.save((tmp_path / "run" / str(step) / "default").absolute(), each)
    for name in ("a.safetensors", "nnx.safetensors", "b.msgpack", "c", "d", "run", "run/100", "run/100/default"):
        loaded = weights.load(tmp_path / name, empty)
        assert loaded.pop("RngCount") == empty["RngCount"]
        jax.tree.map(np.testing.assert_array_equal, loaded, TREE)


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda flat: flat.pop("params/dense/bias"), "lack params/dense/bias"),
        (
            lambda flat: flat.update({"params/more/kernel": np.ones(2)}),
            "have params/more/kernel, which the model has not",
        ),
        (lambda flat: flat.update({"params/dense/bias": np.ones(4)}), r"shape \[4\], the model needs \[3\]"),
    ],
)
def test_weights_of_another_model_are_refused(tmp_path, change, words):
    flat = traverse_util.flatten_dict(TREE, sep="/")
    change(flat)
    (tmp_path / "w.msgpack").write_bytes(serialization.msgpack_serialize(_nested(flat)))
    with pytest.raises(Refusal, match=words):
        weights.load(tmp_path / "w.msgpack", TREE)
    for name, content in (("no.msgpack", b"\x00\x01"), ("w.pickle", b"x"), ("w.safetensors", b"x")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(Refusal, match=r"give a \.safetensors file of Flax paths"):
            weights.load(tmp_path / name, TREE)
