"""Stages that must be finished before something else can begin: checked, then read."""

from collections.abc import Mapping
from typing import Any

from mpq_jax import joint
from mpq_jax.config import Joint, Pretrain
from mpq_jax.stages.float_training import pretrain
from mpq_jax.stages.joint_training import SETTLED, joint_train
from mpq_jax.stages.run import Run, steps_of
from mpq_jax.types import Refusal
from mpq_jax.workdir import latest_whole


def check_finished(run: Run, stage: str, settings: Pretrain | Joint) -> None:
    """Refuses a stage whose last checkpoint is not there, or damaged."""
    (step, damage), steps = latest_whole(run.workdir / stage), steps_of(settings, run)
    if (step or 0) < steps and not (run.workdir / stage / SETTLED).exists():
        raise Refusal(
            f"{run.workdir / stage} stands at step {step or 0} of {steps}{f' ({damage})' if damage else ''}; finish it "
            f"with: python train.py --config … --workdir {run.workdir}"
        )


def finished_float(run: Run) -> Mapping[str, Any]:
    """The float model's variables, of a float training that is finished, or kept. Raises Refusal if it is not."""
    check_finished(run, "pretrain", run.config.pretrain)
    return pretrain(run)


def finished_joint(run: Run, start: Mapping[str, Any]) -> Mapping[str, Any]:
    """The first row's variables of a joint training that is finished. Raises Refusal if it is not.

    start: calibrated variables.
    """
    check_finished(run, "joint", run.config.joint)
    state, _ = joint_train(run, start)
    return joint.row_variables(state, 0, averaged=True)
