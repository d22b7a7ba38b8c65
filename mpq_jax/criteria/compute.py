"""Measures a criterion: on what it is given, or on what a run's folder holds."""

import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mpq_jax import config as config_lib
from mpq_jax import data, flax_seam, stages
from mpq_jax import importance as importances
from mpq_jax.config import Config
from mpq_jax.criteria import Measured, find
from mpq_jax.criteria.coupling import coupled_pairs, searched_pairs
from mpq_jax.criteria.learned import load_rows
from mpq_jax.stages.run import row_names, sliced
from mpq_jax.types import Importance, QuantizedModel, Refusal

NOISY = (
    "the random rows' losses are those of slices of a batch, and noisy; train with --joint.slices false in another "
    "--workdir, or take --criterion sampled"
)


def measure(name: str, **given: Any) -> Measured:
    """Runs a criterion on what it takes of `given`: model, task, variables (with step sizes), batches (a sequence of
    dicts), rows or log (RowLog), base (the learned Importance), pairs, seed, and its settings by name.

    Raises Refusal for a name that does not exist, for what the criterion takes and was not given, for batches without
    the labels that it needs, and for a result that is not finite.
    """
    criterion, function = find(name), function_of(name)
    parameters = inspect.signature(function).parameters
    missing = [key for key, p in parameters.items() if p.default is p.empty and given.get(key) is None]
    if missing:
        raise Refusal(f"criterion {name} needs {' and '.join(criterion.needs) or 'a model'}: give {', '.join(missing)}")
    labelled = getattr(given.get("task"), "needs_label", True)
    if "labels" in criterion.needs and labelled and not all("label" in batch for batch in given["batches"]):
        raise Refusal(
            f'criterion {name} needs labels, and the batches have none; give batches with a "label", or take a '
            "criterion without: initial, regression, random"
        )
    result = function(**{key: value for key, value in given.items() if key in parameters})
    measured = Measured(result) if isinstance(result, Importance) else result
    _check_finite(name, measured.importance)
    return measured


def _check_finite(name: str, table: Importance) -> None:
    searched = [layer.path for layer in table.layers if layer.searched]
    for kind in ("weight", "activation"):
        bad = ~np.isfinite(getattr(table, kind)).all(1)
        if bad.any():
            raise Refusal(
                f"criterion {name} is not finite for the {kind}s of layer {searched[int(bad.argmax())]!r}: the float "
                "model's loss or its step sizes are not; look at the float training, or at model.dtype"
            )


def function_of(name: str) -> Callable[..., Importance | Measured]:
    """The criterion's function, imported. Raises Refusal for a name that does not exist."""
    module, _, function = find(name).function.partition(":")
    return getattr(importlib.import_module(f"mpq_jax.criteria.{module}"), function)


def compute(
    name: str,
    workdir: Path,
    config: Config,
    *,
    path: Path,
    made_from: Mapping[str, Any],
    rows: Path,
    log: Path | None,
    opened: tuple[stages.Run, Any] | None = None,
) -> Importance:
    """Measures a criterion on a run's folder and keeps it as `path`, with what is to be known of it under "about".

    config: the run's, with the `criteria` settings to use. made_from: plain JSON, kept under "about" as it is. rows: the
    log of joint training's random rows, for criteria that take it. log: what alpha is fitted to; None: it is not fitted.
    opened: (the run, its calibrated variables) where the caller has them; None: from the folder.
    Raises Refusal for a stage that is not finished.
    """
    criterion = find(name)
    print(f"criterion {name}: {criterion.line}")
    run, start = opened or (stages.open_run(config, workdir), None)
    given = _given(run, start, config, rows, log, set(inspect.signature(function_of(name)).parameters))
    measured = measure(name, **given)
    if "rows" in given and sliced(config.joint, len(row_names(run.model, config.joint))):
        measured = measured._replace(notes=(*measured.notes, NOISY))
    train_passes = measured.sample_passes / run.dataset.sizes["train"]
    about = {
        "unit": criterion.unit,
        "cost": criterion.cost,
        "sample_passes": measured.sample_passes,
        "train_passes": train_passes,
        "notes": list(measured.notes),
        "details": dict(measured.details),
        "made_from": dict(made_from),
    }
    importances.save_importance(path, measured.importance._replace(rules=config.search.rules), about)
    for note in measured.notes:
        print(f"  {note}")
    print(f"  unit: {criterion.unit}; cost: {train_passes:.3g} passes over the training set ({criterion.cost})")
    print(f"importance: {path}")
    return measured.importance


def _given(
    run: stages.Run, start: Any, config: Config, rows: Path, log: Path | None, wanted: set[str]
) -> dict[str, Any]:
    """What the criterion takes, and nothing else, from the run's folder. start: calibrated variables, None to read them."""

    def calibrated() -> Any:
        return stages.calibrated(run, stages.finished_float(run)) if start is None else start

    sources: Mapping[str, Callable[[], Any]] = {
        "model": lambda: run.model,
        "task": run.task,
        "variables": lambda: _variables(run, calibrated(), config),
        "batches": lambda: _batches(run, config),
        "rows": lambda: load_rows(rows, run.model.layers),
        "log": lambda: load_rows(log, run.model.layers) if log else None,
        "joint": lambda: stages.finished_joint(run, calibrated()),
        "rules": lambda: config.search.rules,
        "base": lambda: _base(run.workdir, run.model),
        "pairs": lambda: _pairs(run),
        "seed": lambda: config.seed,
    }
    settings = config_lib.to_json(config)["criteria"]
    return {key: sources[key]() if key in sources else settings[key] for key in wanted}


def _variables(run: stages.Run, start: Any, config: Config) -> Any:
    """The float model's variables, with calibrated (`start`) or jointly learned step sizes beside the weights."""
    if config.criteria.step_sizes == "calibrated":
        return start
    learned = flax_seam.flatten(stages.finished_joint(run, start)["params"])
    flat = flax_seam.flatten(start["params"])
    prefixes = tuple(name for spec in run.model.specs.values() for name in spec.names.values())
    sizes = {path: learned[path] for path in flat if path.startswith(prefixes) and path not in run.model.specs}
    return {**start, "params": flax_seam.unflatten(flat | sizes)}


def _batches(run: stages.Run, config: Config) -> Sequence[Any]:
    """Whole training batches of `criteria.samples` samples at most, no sample twice."""
    settings = config.criteria
    samples = min(settings.samples, run.dataset.sizes["train"])
    size = min(settings.batch_size, samples)
    stream = data.train_batches(run.dataset, size, seed=config.seed * 1000 + 999, workers=config.data.workers)
    return [batch for _, batch in zip(range(samples // size), stream, strict=False)]


def _base(workdir: Path, model: QuantizedModel) -> Importance:
    base = importances.load_importance(workdir / "importance.json")
    if base.layers != model.layers or base.weight is None:
        raise Refusal(
            f"{workdir / 'importance.json'} is no table of this run's model; make it again with: {importances.MADE_BY}"
        )
    return base


def _pairs(run: stages.Run) -> Any:
    shapes = jax.eval_shape(lambda: run.variables)
    return searched_pairs(run.model, coupled_pairs(run.model, shapes, *run.example(), **run.task().eval_kwargs))
