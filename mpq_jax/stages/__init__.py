"""The stages of a run: float training, joint training, fine-tuning. Each resumes where it stopped.

A stage writes checkpoints under <workdir>/<stage>/ and nothing else that a later stage needs, but for joint training's
random_rows.npz and the importance.json made from it.

run (what is open while a run lasts) -> loop (what all stages share) -> float_training, row_log, joint_training,
evaluation, fine_tuning, finished.
"""

from mpq_jax.stages.evaluation import evaluate, reestimated, rows_of
from mpq_jax.stages.fine_tuning import finetune_optimizer, finetuner
from mpq_jax.stages.finished import check_finished, finished_float, finished_joint
from mpq_jax.stages.float_training import pretrain
from mpq_jax.stages.joint_training import calibrated, joint_optimizer, joint_settled, joint_train
from mpq_jax.stages.loop import compile_step, train
from mpq_jax.stages.row_log import RowLogFile, measured_rows
from mpq_jax.stages.run import Run, open_run, steps_of

__all__ = [
    "RowLogFile",
    "Run",
    "calibrated",
    "check_finished",
    "compile_step",
    "evaluate",
    "finetune_optimizer",
    "finetuner",
    "finished_float",
    "finished_joint",
    "joint_optimizer",
    "joint_settled",
    "joint_train",
    "measured_rows",
    "open_run",
    "pretrain",
    "reestimated",
    "rows_of",
    "steps_of",
    "train",
]
