"""The loop that all stages share. What comes out of whole stages, stopped and resumed, is in test_pipeline.py."""

import types
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpq_jax import Refusal, parallel, stages
from mpq_jax import config as config_lib
from mpq_jax.stages import loop


class State(NamedTuple):
    params: jax.Array
    fresh: jax.Array


def test_a_stage_that_starts_from_a_checkpoint_compiles_its_step_once(tmp_path):
    """Arrays of a checkpoint are tied to a device, fresh ones are not; a step must not be compiled for each mixture."""
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, *_, **__: compiled.append(event) if event.endswith("backend_compile_duration") else None
    )
    kept = jax.device_put(np.ones(3, np.float32), jax.devices()[0])
    state = State(kept, jax.numpy.zeros(3))
    step = stages.compile_step(
        lambda state, batch, key, fixed: (jax.tree.map(lambda x: x + batch, state), {"losses": state.params[:1]})
    )
    config = config_lib.Config(checkpoint_every=9, log_every=9)
    run = types.SimpleNamespace(config=config, workdir=tmp_path, sinks=(), layout=parallel.layout(config.parallel))
    before_step = []

    def batches(_):
        for i in range(3):
            before_step.append(len(compiled))
            yield np.float32(i)

    end = stages.train(run, "stage", state, step, 3, batches, ["row"])
    np.testing.assert_array_equal(end.fresh, [3, 3, 3])
    assert before_step[0] < before_step[1] == before_step[2]


def test_what_cannot_be_started_or_saved_is_refused(tmp_path):
    """A gradient can overflow where no loss does: then no checkpoint holds what came of it."""
    good, bad = {"conv": {"kernel": jnp.ones(3)}}, {"conv": {"kernel": jnp.float32([1, jnp.nan, 1])}}
    loop._check_parameters(good, 7, "joint", tmp_path)
    with pytest.raises(Refusal, match="after step 7 of joint; lower the learning rate"):
        loop._check_parameters(bad, 7, "joint", tmp_path)
    (tmp_path / "5").mkdir()
    with pytest.raises(
        Refusal, match=r"\['conv'\]\['kernel'\] is not finite after step 7 of joint; the last good checkpoint"
    ):
        loop._check_parameters(bad, 7, "joint", tmp_path)
