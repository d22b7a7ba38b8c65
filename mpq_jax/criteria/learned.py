"""The paper's criterion: the learned step size itself is the importance (LIMPQ, Tang et al., ECCV 2022)."""

import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from mpq_jax import flax_seam
from mpq_jax.files import whole
from mpq_jax.importance import spread
from mpq_jax.layers import leaf_paths
from mpq_jax.types import Importance, Layer, QuantizedModel, Quantizer, Refusal

OTHERS = ("hawq", "hawq_v2", "mpqco", "output_fisher", "regression", "one_at_a_time")


class RowLog(NamedTuple):
    """What the random rows of joint training cost.

    step: int32 [N]. policies: int32 [N, L, 2], weight and activation bits of the searched layers.
    loss: float32 [N]. reference: float32 [N], the mean loss of the same step's uniform rows (same weights, same batch).
    """

    step: np.ndarray
    policies: np.ndarray
    loss: np.ndarray
    reference: np.ndarray


# What numpy raises for a file that is no whole .npz; TypeError: for one that is a .npy.
UNREADABLE = (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile, zlib.error)


def load_rows(path: str | Path, layers: Sequence[Layer]) -> RowLog:
    """Reads a run's random_rows.npz. Raises Refusal for one that is damaged, or of another model's layers."""
    again = "make it again with: python train.py --config … --workdir …"
    try:
        with np.load(path) as file:
            policies = policies_in(file)
            names, step, loss, uniform = (file[name] for name in ("layers", "step", "loss", "uniform"))
    except UNREADABLE as error:
        raise Refusal(f"{path} cannot be read: {str(error).splitlines()[0]}; {again}") from None
    if names.tolist() != [layer.path for layer in layers if layer.searched]:
        raise Refusal(f"{path} is of other layers than this model's; {again}")
    return RowLog(step, policies, loss, uniform.mean(-1))


def policies_in(file: Mapping[str, np.ndarray]) -> np.ndarray:
    """[N, L, 2]: the policies of a log of rows, under the name that they have, or had in the files of earlier runs."""
    return file["policies" if "policies" in file else "assignment"]


def save_rows(path: Path, layers: Sequence[Layer], log: RowLog) -> None:
    """Writes a log as `load_rows` reads it, whole or not at all; "uniform" holds the reference."""
    with whole(path) as temporary:
        names = np.array([layer.path for layer in layers if layer.searched])
        np.savez_compressed(
            temporary,
            layers=names,
            step=log.step,
            policies=log.policies,
            loss=log.loss,
            uniform=log.reference[:, None],
        )


def unlearnable(quantizer: Quantizer) -> str | None:
    """Why a quantizer has no learned indicators; None where it has."""
    for kind in ("weight", "activation"):
        if getattr(quantizer, kind).indicator is None:
            return f"{quantizer.name} learns no spacing for its {kind} grids, so there are no learned indicators"
    return None


def learned(model: QuantizedModel, variables: Mapping[str, Any], log: RowLog | None = None) -> Importance:
    """Importance from the step sizes in a parameter tree (files are not needed: any tree with those leaves will do).

    weight[l, i] and activation[l, j] are the indicators s_w and s_a of LIMPQ's objective
    sum_l (s_a[l, j] + alpha s_w[l, i]); for other quantizers, their grid's spacing in input units.
    log: with it alpha is fitted (`fit_alpha`), else None.
    Entries at bit-widths that a rule took from a layer are filled in by `importance.spread`. Indicators stand as they were
    learned, ordered or not: joint training as a command puts the table through `mpq_jax.repair` before it writes it.
    Raises Refusal for a quantizer that has none (PACT: its weights, as DoReFa's, have nothing to learn).
    """
    if reason := unlearnable(model.quantizer):
        others = f"{', '.join(OTHERS)}; search.py --criterion NAME"
        raise Refusal(f"{reason}; choose another criterion ({others}), or train with --quantizer lsq")
    tables = {
        kind: np.stack([_row(model, variables, layer, kind) for layer in model.layers if layer.searched])
        for kind in ("weight", "activation")
    }
    importance = Importance(
        criterion="learned",
        bit_widths=model.bit_widths,
        activation_bit_widths=model.activation_bit_widths,
        layers=model.layers,
        weight=tables["weight"],
        activation=tables["activation"],
    )
    return importance if log is None else importance._replace(alpha=fit_alpha(importance, log))


def _row(model: QuantizedModel, variables: Mapping[str, Any], layer: Layer, kind: str) -> np.ndarray:
    """[K] float64: the indicators of one layer, filled in by `importance.spread`."""
    spec = next(s for s in model.specs.values() if layer.path in s.paths)
    weight = kind == "weight"
    every = model.bit_widths if weight else model.activation_bit_widths
    held = spec.weight_bit_widths if weight else spec.activation_bit_widths
    quantizer = model.quantizer.weight if weight else model.quantizer.activation
    position = np.unravel_index(spec.paths.index(layer.path), spec.stack) if spec.stack else ()
    flat = flax_seam.flatten(variables["params"])
    paths = leaf_paths(spec, model.quantizer, kind)
    leaves = {name: np.asarray(flat[path])[position] for name, path in paths.items()}

    def indicator(bits: int) -> float:
        at = {key: jnp.asarray(leaf[held.index(bits)]) for key, leaf in leaves.items()}
        assert quantizer.indicator is not None
        return float(quantizer.indicator(at, jnp.int32(bits), weight or spec.signed))

    return spread({bits: indicator(bits) for bits in layer.candidates(kind, every)}, every)


def fit_alpha(importance: Importance, log: RowLog) -> float:
    """The alpha whose sum predicts the losses of random policies best: logged in training, or measured after it.

    Least squares of  loss - reference  on  1, c * (A + alpha W)  with c >= 0, where A and W are the row's sums of
    activation and weight indicators; alpha is searched on a logarithmic grid of [1e-3, 1e3] (121 points).
    The reference (same step, same batch) takes out what the step and the batch contribute. The later half of the log
    is used: the early rows measured step sizes that had not settled. (Policies measured after training are all of step
    0, on the same batches, with a reference of 0: all are used.)
    Returns 1.0 where the log holds fewer than 8 rows, or no alpha predicts with a positive slope.
    """
    late = log.step >= (np.median(log.step) if len(log.step) else 0)
    target = (log.loss - log.reference)[late].astype(np.float64)
    if len(target) < 8:
        return 1.0
    w, a = _sums(importance, log.policies[late])
    best, best_fit = 1.0, 0.0
    for alpha in np.logspace(-3, 3, 121):
        x = a + alpha * w
        x, y = x - x.mean(), target - target.mean()
        norm = float(x @ x)
        slope = float(x @ y)
        if norm > 0 and slope > 0 and slope**2 / norm > best_fit:
            best, best_fit = float(alpha), slope**2 / norm
    return float(f"{best:.4g}")


def _sums(importance: Importance, policies: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[N], [N]: each row's sum of weight and of activation indicators."""
    assert importance.weight is not None and importance.activation is not None

    def total(table: np.ndarray, widths: Sequence[int], bits: np.ndarray) -> np.ndarray:
        column = np.searchsorted(np.asarray(widths), bits)
        return table[np.arange(table.shape[0]), column].sum(-1)

    return (
        total(importance.weight, importance.bit_widths, policies[..., 0]),
        total(importance.activation, importance.activation_bit_widths, policies[..., 1]),
    )
