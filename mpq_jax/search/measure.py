"""Measuring a policy on held-out data: the joint model of a finished run, its statistics re-estimated for the policy."""

import dataclasses
import itertools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax

from mpq_jax import data, joint, stages
from mpq_jax.policy import stack
from mpq_jax.search.journal import Outcome
from mpq_jax.search.methods import Measuring
from mpq_jax.types import Policy, Refusal
from mpq_jax.workdir import load_config


class Bench(NamedTuple):
    """A finished run, opened. variables: of the joint model. float_accuracy: on what policies are measured on."""

    run: stages.Run
    variables: Mapping[str, Any]
    float_accuracy: float
    settings: Measuring

    @property
    def call(self) -> tuple[Any, Any]:
        """How the model is called: (shapes of one example's inputs, keyword arguments in evaluation)."""
        return self.run.example(), self.run.task().eval_kwargs


def open_bench(workdir: Path, settings: Measuring) -> Bench:
    """Opens the run in a folder. Raises Refusal where its joint training is not there."""
    config = load_config(workdir)
    if not (workdir / "joint").is_dir():
        raise Refusal(
            f"{workdir} has no joint model (its folder joint/ is not there), which this method measures policies on; "
            f"train it with: python train.py --config … --workdir {workdir}"
        )
    if settings.statistics_batches:
        config = dataclasses.replace(config, statistics_batches=settings.statistics_batches)
    run = stages.open_run(config, workdir)
    float_variables = stages.finished_float(run)
    stages.check_finished(run, "joint", config.joint)
    state, _ = stages.joint_train(run, stages.calibrated(run, float_variables))
    rows = stages.rows_of(float_variables, 1)
    _, accuracies = stages.evaluate(run, float_variables["params"], rows, None, "validation", settings.examples or None)
    # Of the rows, the last saw mixed policies: its own affine copies, where there are any, are the nearest.
    variables = joint.row_variables(state, -1, averaged=True)
    return Bench(run, variables, float(accuracies[0]), settings)


def evaluator(bench: Bench) -> Callable[[Policy], Outcome]:
    """evaluate(policy) -> its loss and accuracy on the validation split, after the settings' short fine-tuning.

    Compiled once for all policies, and once more for those with weight bits per output channel.
    """
    run, settings = bench.run, bench.settings
    tuned = _tuner(bench) if settings.finetune_steps else lambda policies: bench.variables

    def evaluate(policy: Policy) -> Outcome:
        policies = stack([policy])
        variables = tuned(policies)
        stats = stages.reestimated(run, variables["params"], stages.rows_of(variables, 1), policies)
        limit = settings.examples or None
        losses, accuracies = stages.evaluate(run, variables["params"], stats, policies, "validation", limit)
        return Outcome(float(losses[0]), float(accuracies[0]))

    return evaluate


def _tuner(bench: Bench) -> Callable[[Any], Mapping[str, Any]]:
    """tuned(policies) -> variables after a few steps of fine-tuning, always on the same batches of train."""
    run, steps = bench.run, bench.settings.finetune_steps
    settings = run.config.finetune
    optimizer = stages.finetune_optimizer(run.model, settings, steps)
    task = run.task(settings.label_smoothing)
    dropout = run.model.variables is None
    step = jax.jit(joint.make_step(run.model, task, optimizer, dropout=dropout))
    key = jax.random.key(run.config.seed)

    def tuned(policies: Any) -> Mapping[str, Any]:
        state = joint.init_state(bench.variables, optimizer, 1)
        batches = data.train_batches(run.dataset, settings.batch_size, seed=run.config.seed)
        for batch in itertools.islice(batches, steps):
            state, _ = step(state, batch, key, policies)
        return joint.row_variables(state, 0)

    return tuned
