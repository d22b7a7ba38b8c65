"""What a factory returned, as a float model: how it is called, by the signatures that it has; what is none, in one line."""

import own_models
import pytest
from flax import linen as nn
from flax import nnx

from mpq_jax import FloatModel, Refusal
from mpq_jax.float_model import call_flags, float_model


class NnxFlagged(nnx.Module):
    def __call__(self, x, deterministic=False):
        return x


def test_flags_are_found_by_their_names():
    module = own_models.linen(10)
    assert call_flags(module, False) == ({"deterministic": False}, {"deterministic": True})
    assert call_flags(own_models.Distance(), False) == ({"is_training": True}, {"is_training": False})
    assert call_flags(own_models.Net(10, 4, nnx.Rngs(0)), True) == ({"train": True}, {"train": False})
    assert call_flags(nn.Dense(3), False) == ({}, {})
    assert call_flags(NnxFlagged(), True) == ({"deterministic": False}, {"deterministic": True})
    assert FloatModel(module, inputs=("x",)).is_trained is False


class Flagged(nn.Module):
    @nn.compact
    def __call__(self, x, train, deterministic=False, other=3):
        return x


def test_what_is_left_out_is_filled_in():
    """All flags that a call has; what is given stays, and a name alone is a list of one."""
    model = float_model(Flagged(), "m:f")
    assert model.train_kwargs == {"train": True, "deterministic": False}
    assert model.eval_kwargs == {"train": False, "deterministic": True}
    assert (model.inputs, model.rngs, model.is_trained) == (("image",), ("dropout",), False)
    given = float_model(FloatModel(Flagged(), inputs="tokens", rngs="noise", eval_kwargs={"other": 1}), "m:f")
    assert (given.inputs, given.rngs, given.eval_kwargs) == (("tokens",), ("noise",), {"other": 1})
    # An NNX module keeps its mode in itself: it is set, unless what is given sets it.
    module = own_models.Net(10, 4, nnx.Rngs(0))
    scaled = float_model(FloatModel(module, train_kwargs={"scale": 2.0}, eval_kwargs={"scale": 1.0}), "m:f")
    assert scaled.train_kwargs == {"train": True, "scale": 2.0} and scaled.eval_kwargs == {"train": False, "scale": 1.0}
    frozen = float_model(FloatModel(module, train_kwargs={"train": False}), "m:f")
    assert frozen.train_kwargs == frozen.eval_kwargs == {"train": False}
    assert given.train_kwargs == model.train_kwargs
    trained = float_model((Flagged(), {"params": {}}), "m:f")
    assert trained.is_trained and trained.variables == {"params": {}}


DENSE, LINEAR = nn.Dense(3), nnx.Linear(2, 2, rngs=nnx.Rngs(0))


@pytest.mark.parametrize(
    "found, words",
    [
        (None, "returned None; return a Linen or NNX module"),
        (3, "returned an int; return"),
        (nn.Dense, r"returned the class Dense, not a model of it; return Dense\(…\)"),
        ((DENSE, {"kernel": 1}), r"gave variables of kernel; a Linen model has"),
        ((DENSE, {}), "gave variables of nothing"),
        (FloatModel(LINEAR, variables={"params": {}}), "beside an NNX module, which holds its own"),
        (FloatModel(DENSE, trained=True), "says trained=True and gives no variables"),
        (FloatModel(DENSE, inputs=()), "names no inputs"),
        (FloatModel(DENSE, loss=3), "gave an int as loss; give a function"),
        (FloatModel(DENSE, correct=len), "gave correct without loss"),
    ],
)
def test_what_is_no_float_model(found, words):
    with pytest.raises(Refusal, match=f"^m:f .*{words}") as refusal:
        float_model(found, "m:f")
    assert "\n" not in str(refusal.value)
