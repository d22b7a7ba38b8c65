"""Losses of random policies, which alpha is fitted to: joint training's own, random_rows.npz, and some measured after it."""

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

from mpq_jax import joint, row_policies
from mpq_jax.criteria.learned import UNREADABLE, RowLog, policies_in
from mpq_jax.files import whole
from mpq_jax.stages.run import Run, is_linen, train_batches
from mpq_jax.tasks import random_streams
from mpq_jax.types import Refusal

ALPHA_BATCHES, ALPHA_ROWS = 2, 8  # measured_rows: batches, and policies drawn together


class RowLogFile:
    """random_rows.npz: layers [L] paths; step [N], policies [N, L, 2], loss [N] of the random rows, uniform [N, K].

    Files of earlier runs, whose policies have another name, are read and gone on with.
    """

    def __init__(self, path: Path, widths: int, layers: list[str]):
        self.path, self.widths, self.layers = path, widths, layers
        self.parts: list[dict[str, np.ndarray]] = []

    def load(self, step: int) -> None:
        """Reads what is there of the steps before `step`. Raises Refusal for a log that is damaged or lacks some."""
        self.parts = []
        if not step:
            return
        try:
            with np.load(self.path) as file:
                rows = {name: file[name] for name in ("step", "loss", "uniform")}
                rows["policies"] = policies_in(file)
        except UNREADABLE as error:
            raise Refusal(f"{self.path} cannot be read ({error}); {self._again()}") from None
        keep = rows["step"] < step
        if set(rows["step"][keep].tolist()) != set(range(step)):
            raise Refusal(f"{self.path} lacks steps before {step}; {self._again()}")
        self.parts = [{name: values[keep] for name, values in rows.items()}]

    def _again(self) -> str:
        return f"it cannot be made again without them: delete {self.path.parent} to start joint training again"

    def add(self, step: int, metrics: Mapping[str, np.ndarray]) -> None:
        losses, policies = metrics["losses"], metrics["policies"]
        rows = len(policies)
        self.parts.append(
            {
                "step": np.full(rows, step, np.int32),
                "policies": policies.astype(np.int32),
                "loss": losses[self.widths :],
                "uniform": np.broadcast_to(losses[: self.widths], (rows, self.widths)),
            }
        )

    def flush(self) -> None:
        with whole(self.path) as temporary:
            arrays: dict[str, Any] = {"layers": np.array(self.layers), **self._joined()}
            np.savez_compressed(temporary, **arrays)

    def _joined(self) -> dict[str, np.ndarray]:
        empty = {
            "step": np.zeros(0, np.int32),
            "policies": np.zeros((0, len(self.layers), 2), np.int32),
            "loss": np.zeros(0, np.float32),
            "uniform": np.zeros((0, self.widths), np.float32),
        }
        return {name: np.concatenate([empty[name], *(part[name] for part in self.parts)]) for name in empty}

    def log(self) -> RowLog:
        """The log as the criteria take it."""
        joined = self._joined()
        return RowLog(joined["step"], joined["policies"], joined["loss"], joined["uniform"].mean(-1))


def measured_rows(run: Run, state: joint.TrainState, policies: int) -> RowLog:
    """Losses of `policies` random policies of the joint model (rounded up to a multiple of 8), all on the same batches.

    For `fit_alpha` where the rows' own log is too noisy, as with slices of the batch: policies that meet the same
    samples differ by their bits alone. Statistics are each batch's own, as in joint training. Cost: a forward pass of
    2 batches a policy.
    """
    settings, model, task = run.config.joint, run.model, run.task(run.config.joint.label_smoothing)
    variables = joint.row_variables(state, -1, averaged=True)
    rows = joint.init_state(variables, optax.identity(), 1).rows
    rngs = random_streams(task, jax.random.key(run.config.seed)) if is_linen(model) else None

    @jax.jit
    def losses(params, rows, policies, batch):
        return joint.joint_loss(model, task, params, rows, policies, batch, rngs=rngs)[1][0]

    batches = list(itertools.islice(train_batches(run, settings.batch_size, "alpha")(0), ALPHA_BATCHES))
    key = jax.random.fold_in(jax.random.key(run.config.seed), sum(map(ord, "alpha")))
    arrays, found = [], []
    for i in range(-(-policies // ALPHA_ROWS)):
        bits = row_policies.random_bits(
            jax.random.fold_in(key, i), model.layers, model.bit_widths, model.activation_bit_widths, ALPHA_ROWS
        )
        arrays.append(np.asarray(bits))
        drawn = row_policies.as_rows(bits, model.layers)
        for row in range(ALPHA_ROWS):
            part = jax.tree.map(lambda bits, row=row: bits[row : row + 1], drawn)
            found.append(np.mean([losses(variables["params"], rows, part, batch) for batch in batches], axis=0))
    loss = np.concatenate(found)
    return RowLog(np.zeros(len(loss), np.int32), np.concatenate(arrays), loss, np.zeros_like(loss))
