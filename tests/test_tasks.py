"""Losses and right answers: against NumPy float64, padding in no mean."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from mpq_jax import FloatModel, Refusal, by_example, tasks


def cross_entropy(logits, labels, smoothing=0.0):
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    target = np.eye(logits.shape[-1])[labels] * (1 - smoothing) + smoothing / logits.shape[-1]
    return -(target * log_p).sum(-1).mean()


def test_padding_and_smoothing():
    logits = np.random.default_rng(1).normal(size=(6, 3))
    labels = np.array([0, 1, 2, 0, -1, -1])
    smooth = tasks.classification(0.1)
    batch = {"label": jnp.asarray(labels)}
    expected = cross_entropy(logits[:4], labels[:4], 0.1)
    np.testing.assert_allclose(smooth.loss(jnp.asarray(logits), batch), expected, rtol=1e-5)
    right, count = smooth.correct(jnp.asarray(logits), batch)
    assert int(count) == 4 and int(right) == (logits[:4].argmax(-1) == labels[:4]).sum()


@pytest.mark.parametrize("outputs", [{"box": np.zeros(3), "score": np.zeros(1)}, (), None, ((np.zeros(3),), 1)])
def test_outputs_without_logits_are_named(outputs):
    with pytest.raises(Refusal, match=r"box, score|tuple|NoneType") as refused:
        tasks.logits_of(outputs)
    assert "distill" in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: (x, None), lambda x: {"logits": x, "extra": 0}])
def test_logits_of_whatever_a_model_returns(wrap):
    """Losses and answers are those of the logits alone; padding that fills a batch is a loss of 0 of 0 examples."""
    logits, task = np.random.default_rng(3).normal(size=(4, 3)), tasks.classification()
    batch = {"label": jnp.asarray([2, 0, 1, 1])}
    np.testing.assert_allclose(
        task.loss(wrap(jnp.asarray(logits)), batch), cross_entropy(logits, [2, 0, 1, 1]), rtol=1e-5
    )
    assert int(task.correct(wrap(jnp.asarray(logits)), batch)[0]) == (logits.argmax(1) == [2, 0, 1, 1]).sum()
    empty = {"label": jnp.full(4, -1)}
    assert float(task.loss(wrap(jnp.asarray(logits)), empty)) == 0 and int(task.correct(wrap(logits), empty)[1]) == 0


def test_means_over_examples_leave_padding_out():
    """Against NumPy: further axes are averaged, padded examples are in no mean."""
    rng = np.random.default_rng(0)
    outputs, valid = rng.normal(size=(5, 4)).astype(np.float32), np.array([True, True, True, False, False])
    batch = {"x": np.zeros((5, 4)), "y": rng.normal(size=(5, 4)).astype(np.float32), "valid": valid}
    task = by_example(lambda o, b: (o - b["y"]) ** 2, lambda o, b: o > 0, ("x",), {}, {})
    np.testing.assert_allclose(task.loss(outputs, batch), ((outputs - batch["y"])[:3] ** 2).mean(), rtol=1e-6)
    right, count = task.correct(outputs, batch)
    np.testing.assert_allclose(right / count, (outputs[:3] > 0).mean(), rtol=1e-6)
    del batch["valid"]
    np.testing.assert_allclose(task.loss(outputs, batch), ((outputs - batch["y"]) ** 2).mean(), rtol=1e-6)
    no_answers = by_example(lambda o, b: o, None, ("x",), {}, {})
    assert np.isnan(no_answers.correct(outputs, batch)[0]) and no_answers.correct(outputs, batch)[1] == 5


def test_inputs_come_in_the_order_of_their_names():
    batch = {"a": np.ones(2), "b": np.zeros(2), "label": np.zeros(2, int)}
    task = tasks.classification(inputs=("b", "a"))
    assert [x is batch[name] for x, name in zip(task.inputs(batch), "ba", strict=True)] == [True, True]
    assert task.needs_label and not by_example(lambda o, b: o, None, ("a",), {}, {}).needs_label


def test_streams_are_all_different_and_the_first_is_the_key():
    key = jax.random.key(4)
    streams = tasks.random_streams(tasks.classification(streams=("dropout", "noise", "paths")), key)
    drawn = {name: float(jax.random.uniform(k)) for name, k in streams.items()}
    assert list(drawn) == ["dropout", "noise", "paths"] and len(set(drawn.values())) == 3
    assert drawn["dropout"] == float(jax.random.uniform(key))


def test_the_task_of_a_model():
    """Its own loss, as it is; without one, classification; how it is called is the model's word."""
    labelled = FloatModel(nn.Dense(3), inputs=("x",), train_kwargs={"on": True}, eval_kwargs={}, rngs=("a",))
    task = tasks.task_of(labelled, 0.2)
    logits = np.random.default_rng(0).normal(size=(4, 3))
    batch = {"x": np.zeros((4, 2)), "label": jnp.asarray([0, 1, 2, 0])}
    np.testing.assert_allclose(
        task.loss(jnp.asarray(logits), batch), cross_entropy(logits, [0, 1, 2, 0], 0.2), rtol=1e-5
    )
    assert (task.train_kwargs, task.eval_kwargs, task.streams) == ({"on": True}, {}, ("a",))
    own = labelled._replace(loss=lambda outputs, batch: outputs[:, 0] ** 2)
    np.testing.assert_allclose(
        tasks.task_of(own).loss(jnp.asarray(logits), batch), (logits[:, 0] ** 2).mean(), rtol=1e-5
    )
    with pytest.raises(Refusal, match=r"label_smoothing is 0\.2, and the model has a loss of its own"):
        tasks.task_of(own, 0.2)
