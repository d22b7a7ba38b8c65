"""What the commands do: `learn` (float and joint training, importance) and `finish` (fine-tuning and the report)."""

import dataclasses
import hashlib
import itertools
import json
import math
import platform
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mpq_jax import __version__, costs, flax_seam, importance, joint, policy, processes, report, stages
from mpq_jax.config import Config
from mpq_jax.criteria import files as criteria
from mpq_jax.criteria import find
from mpq_jax.criteria.learned import learned, save_rows, unlearnable
from mpq_jax.data.own import OwnData, training_batch
from mpq_jax.files import read_json, write_json
from mpq_jax.layers import leaf_paths
from mpq_jax.numerics import at_bits
from mpq_jax.search import best_uniform, random_policies
from mpq_jax.search.constraints import check_search_rules
from mpq_jax.types import Bits, Budget, Importance, Policy, QuantizedModel, Refusal
from mpq_jax.workdir import importance_of, keep_table_settings, latest_step, latest_whole, settings

# (name, policies that its row is the mean of)
Contestant = tuple[str, list[dict[str, Bits]]]


def learn_float(config: Config, workdir: Path) -> tuple[stages.Run, Mapping[str, Any]]:
    """Float training, or the weights that were loaded: what criteria without joint training need. -> (run, variables)"""
    find(config.search.criterion)
    run = stages.open_run(config, workdir)
    searched = sum(layer.searched for layer in run.model.layers)
    if not searched:
        raise Refusal(
            f"none of the model's {len(run.model.layers)} layers is searched: all have fixed bits, by quantize.rules or as the "
            'first and the last layer ("8,8"); loosen the rules, or give --quantize.ends searched'
        )
    widths = run.model.bit_widths, run.model.activation_bit_widths
    check_search_rules(config.search.rules, Importance("none yet", *widths, run.model.layers, None, None))
    if processes.first() and (workdir / "config.json").exists():
        keep_table_settings(workdir, config)
    if isinstance(run.dataset, OwnData):  # what is wrong with its first examples is said before anything is written
        training_batch(run.dataset, run.dataset.splits["train"], config.seed, config.pretrain.batch_size, 0, 1, 0)
    print(f"{config.model.name} on {config.data.name}: {searched} of {len(run.model.layers)} layers are searched")
    if reason := unlearnable(run.model.quantizer):
        taken = config.search.criterion
        then = "choose another --search.criterion" if _needs_learned(config) else f"searches take {taken}"
        print(f"note: joint training of this run will make no importance.json: {reason}; {then}")
    variables = stages.pretrain(run)
    loss, accuracy = _evaluated(run, variables, None, "validation")
    shown = f"validation accuracy {accuracy:.2%}, loss" if run.has_accuracy else "validation loss"
    print(f"float: {shown} {loss:.4f}")
    return run, variables


def learn(config: Config, workdir: Path) -> Importance | None:
    """Float training, joint training, <workdir>/importance.json and the table of search.criterion. Resumes where it stopped.

    -> the learned table. A quantizer without learned indicators is trained all the same, for other criteria and for
    fine-tuning: then there is no importance.json, and None comes back.
    """
    alpha = _alpha(config.joint.alpha)
    run, variables = learn_float(config, workdir)
    reason = unlearnable(run.model.quantizer)
    searched = sum(layer.searched for layer in run.model.layers)
    start = stages.calibrated(run, variables)
    state, log = stages.joint_train(run, start)
    if not processes.first():
        return None  # the log and the files are process 0's
    if reason:
        print(f"joint training is done: {workdir}")
        _measure_searched(run, start)
        return None
    end = joint.row_variables(state, 0, averaged=True)
    if alpha is None and config.joint.alpha_policies:
        log = stages.measured_rows(run, state, config.joint.alpha_policies)
        save_rows(workdir / "joint" / "alpha_rows.npz", run.model.layers, log)
    if not _needs_learned(config):
        _measure_searched(run, start)
    table, outliers = importance.repair(learned(run.model, end, log))
    table = table._replace(alpha=alpha if alpha is not None else table.alpha, rules=config.search.rules)
    for path, kind, bits in outliers:
        print(f"repaired: the {kind} indicator of {path} at {bits} bits fell where bits were taken away")
    write_json(
        workdir / "indicators.json",
        {
            "format": "mpq-indicators",
            "version": 1,
            "initial": _tables(learned(run.model, start)),
            "learned": _tables(learned(run.model, end)),
            "outliers": [list(outlier) for outlier in outliers],
        },
    )
    # Last, so that where it is all others are, too.
    importance.save_importance(workdir / "importance.json", table)
    print(f"importance of {searched} layers, alpha {table.alpha:g}: {workdir / 'importance.json'}")
    if _needs_learned(config):
        _measure_searched(run, start)
    return table


def _needs_learned(config: Config) -> bool:
    """Whether the table that searches take is made from importance.json."""
    return "indicators" in find(config.search.criterion).needs or config.criteria.step_sizes == "joint"


def _measure_searched(run: stages.Run, start: Mapping[str, Any]) -> None:
    """The table that search.py will take, made while data and model are at hand: so that a search needs neither.

    start: calibrated variables. What cannot be measured here (a criterion that draws policies near budgets, or reads
    checkpoints, which several processes do together) is by the first search.
    """
    name = run.config.search.criterion
    row = find(name)
    from_start = set(row.needs) <= {"checkpoint", "labels"} and run.config.criteria.step_sizes == "calibrated"
    if "near" in row.settings or not (from_start or processes.alone()):
        print(f"criterion {name} is measured by the first search")
        return
    try:
        criteria.ensure(run.workdir, name, opened=(run, start))
    # Training is done all the same, and other tables can be searched.
    except Refusal as refusal:
        print(f"note: criterion {name} was not measured: {refusal}")
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        print(
            f"note: criterion {name} was not measured: memory is too short for {run.config.criteria.batch_size} samples at "
            f"once; measure it with: python search.py --workdir {run.workdir} --criterion {name} --criteria.batch_size 8"
        )


def _alpha(text: str) -> float | None:
    if text == "auto":
        return None
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value < float("inf"):
        raise Refusal(f'joint.alpha is {text!r}; write "auto" or a positive number')
    return value


def _tables(table: Importance) -> dict[str, Any]:
    assert table.weight is not None and table.activation is not None
    return {"weight": table.weight.tolist(), "activation": table.activation.tolist()}


# ---- fine-tuning and the report -----------------------------------------------------------------------------------


def finish(config: Config, workdir: Path, policy_path: Path) -> Path:
    """Fine-tunes the policy and those it is compared with, measures all once on the test set, writes report.md and .html."""
    found_with = importance_of(workdir, policy_path)
    table = importance.load_importance(found_with)
    mixed = policy.load_policy(policy_path, table.layers, table.bit_widths, table.activation_bit_widths)
    saved = read_json(policy_path, "mpq-policy", 1, policy.MADE_BY)
    budgets = costs.restore_budgets(costs.saved_limits(saved.get("budgets"), str(policy_path)), table)
    run = stages.open_run(config, workdir)
    float_variables = stages.pretrain(run)
    start = stages.calibrated(run, float_variables)
    # Without joint training there is nothing that it left: fine-tuning and figures start from calibration.
    joined = processes.from_first(latest_step(workdir / "joint") is not None)
    joint_state = stages.joint_train(run, start)[0] if joined else None
    others = processes.first_only(lambda: _compared(table, budgets, config) if config.finetune.compare else [])
    contestants = _from_first([*(others or []), ("mixed", [mixed])])
    finetune = stages.finetuner(run, float_variables)
    beginning = starts(run, joint_state, start)
    trained = {
        name: [finetune(stage_of(config, each), name, each, beginning) for each in group] for name, group in contestants
    }
    # The test set is read here, after every decision has been made.
    loss, accuracy = _evaluated(run, float_variables, None, "test")
    everything_float = {layer.path: Bits(32, 32) for layer in table.layers}
    rows = [_row("float", table, [(loss, accuracy)], [everything_float], as_float=True)]
    for name, group in contestants:
        measured = [_evaluated(run, v, p, "test") for v, p in zip(trained[name], group, strict=True)]
        rows.append(_row(name, table, measured, group))
    if not processes.first():
        return workdir / "report.md"
    made = report.Report(
        title=f"{config.model.name} on {config.data.name}",
        importance=table,
        policies={name: group[0] for name, group in contestants},
        used={b.name: (costs.used(b, mixed, table), b.limit, b.unit) for b in budgets},
        accuracy=rows,
        grids=_grids(run.model, joint.row_variables(joint_state, 0, averaged=True) if joint_state else start, table),
        depthwise_pairs=depthwise_pairs(run.model),
        provenance=_provenance(config, found_with, policy_path),
        config=settings(config),
        test_samples=run.dataset.sizes["test"],
        solution=saved,
        **_curve(table, budgets, mixed),
        **indicators(workdir, table),
    )
    path = report.write(made, workdir)
    results = [_as_json(row) for row in rows]
    write_json(workdir / "results.json", {"format": "mpq-results", "version": 1, "rows": results})
    print(report.terminal_table(made))
    print(f"report: {path.with_suffix('.html')} (for a browser), {path}")
    return path


def _as_json(row: Any) -> dict[str, Any]:
    """The fields of a row; null where they are no number (test data with NaN, say): JSON has none."""
    fields = row._asdict()
    return {name: None if isinstance(x, float) and not math.isfinite(x) else x for name, x in fields.items()}


def finetuned(
    config: Config, workdir: Path, policy_path: Path
) -> tuple[stages.Run, Mapping[str, Any], dict[str, Bits]]:
    """(run, variables, policy) of a fine-tuning that is finished. Raises Refusal where it is not."""
    table = importance.load_importance(importance_of(workdir, policy_path))
    chosen = policy.load_policy(policy_path, table.layers, table.bit_widths, table.activation_bit_widths)
    stage = stage_of(config, chosen)
    run = stages.open_run(config, workdir)
    (step, damage), steps = latest_whole(workdir / "finetune" / stage), stages.steps_of(config.finetune, run)
    if (step or 0) < steps:
        raise Refusal(
            f"{workdir} has no finished fine-tuning of {policy_path} with these settings (step {step or 0} of {steps}"
            f"{f'; {damage}' if damage else ''}); do it with: python train.py --config … --workdir {workdir} --policy "
            f"{policy_path} (and give the same --finetune options here)"
        )
    float_variables = stages.finished_float(run)
    start = stages.calibrated(run, float_variables)  # only its shapes count: all is restored
    return run, stages.finetuner(run, float_variables)(stage, "mixed", chosen, start), chosen


def _compared(table: Importance, budgets: Sequence[Budget], config: Config) -> list[Contestant]:
    """The best uniform policy that fits, and random ones within 2 % of the budget (5 or 10 % for small networks)."""
    found: list[Contestant] = []
    if not budgets:
        return found
    uniform = best_uniform(table, budgets)
    if uniform is not None:
        found.append((f"uniform {uniform[0]}", [uniform[1]]))
    for within in (0.02, 0.05, 0.1):
        others = random_policies(table, budgets, config.finetune.random_policies, seed=config.seed, within=within)
        if others:
            found.append(("random", others))
            break
    return found


def _from_first(contestants: list[Contestant]) -> list[Contestant]:
    """Process 0's contestants: all train the same policies, whatever files or solvers gave them."""
    plain = [(name, [{path: list(bits) for path, bits in p.items()} for p in group]) for name, group in contestants]

    def bits(w, a):
        return Bits(tuple(w) if isinstance(w, list) else w, a)

    return [
        (name, [{path: bits(*entry) for path, entry in p.items()} for p in group])
        for name, group in processes.from_first(plain)
    ]


def starts(run: stages.Run, joint_state: joint.TrainState | None, calibrated: Mapping[str, Any]) -> Mapping[str, Any]:
    """Where fine-tuning starts: the joint model, or the float one with step sizes started anew."""
    if run.config.finetune.start == "joint" and joint_state is not None:
        # Of the rows, the last saw mixed policies: its statistics and its own affine copies are the nearest.
        return joint.row_variables(joint_state, -1, averaged=True)
    if run.config.finetune.start == "float":
        return calibrated
    raise Refusal(f'finetune.start {run.config.finetune.start!r} is not known; choose "joint" or "float"')


def stage_of(config: Config, chosen: Policy) -> str:
    """A folder's name for one policy under these settings: others never resume from it."""
    values = dataclasses.asdict(config.finetune)
    if values["optimizer"] == "sgd":
        del values["optimizer"]  # folders from before there was a choice are found again
    settings = json.dumps(values, sort_keys=True)
    bits = json.dumps({path: list(b) for path, b in chosen.items()}, sort_keys=True)
    return hashlib.sha256((settings + bits).encode()).hexdigest()[:12]


def _evaluated(run: stages.Run, variables: Any, chosen: Policy | None, split: str) -> tuple[float, float]:
    policies = None if chosen is None else policy.stack([chosen])
    losses, accuracies = stages.evaluate(run, variables["params"], stages.rows_of(variables, 1), policies, split)
    return float(losses[0]), float(accuracies[0])


def _row(name: str, table: Importance, measured, group: Sequence[Policy], as_float: bool = False) -> report.AccuracyRow:
    losses, accuracies = np.array(measured).T
    known = not np.isnan(accuracies).any()
    layers = [layer._replace(bits=None) if as_float else layer for layer in table.layers]
    return report.AccuracyRow(
        name=name if len(group) == 1 else f"{name} (mean of {len(group)})",
        accuracy=float(accuracies.mean()) if known else None,
        accuracy_std=float(accuracies.std(ddof=1)) if len(group) > 1 and known else None,
        runs=len(group),
        loss=float(losses.mean()),
        bitops=round(np.mean([costs.bitops(layers, p) for p in group])),
        size_bytes=round(np.mean([costs.size(layers, p) for p in group])),
    )


# ---- what the figures show ----------------------------------------------------------------------------------------


def _grids(model: QuantizedModel, variables: Mapping[str, Any], table: Importance) -> list[report.WeightGrid]:
    """The narrowest and the widest searched layer at the same width, as in the paper's figure 1."""
    searched = sorted((layer for layer in table.layers if layer.searched), key=lambda layer: layer.params)
    middle = sorted(table.bit_widths)[len(table.bit_widths) // 2]
    grids = []
    for layer in (searched[0], searched[-1]) if len(searched) > 1 else searched:
        spec = next(s for s in model.specs.values() if layer.path in s.paths)
        bits = min(spec.weight_bit_widths, key=lambda b: abs(b - middle))
        flat, quantizer = flax_seam.flatten(variables["params"]), model.quantizer.weight
        position = np.unravel_index(spec.paths.index(layer.path), spec.stack) if spec.stack else ()
        values = {
            name: at_bits(flat[path][position], spec.weight_bit_widths, jnp.int32(bits))
            for name, path in leaf_paths(spec, model.quantizer, "weight").items()
        }
        if any(v.ndim for v in values.values()):
            continue  # one grid per output channel has no one picture
        at = (flat[spec.leaf][position], values, jnp.int32(bits), True)
        codes, decoding = quantizer.encode(*at), quantizer.decoding(*at)
        step_size, offset = float(decoding.scale), float(decoding.offset)
        grids.append(report.WeightGrid(layer.path, bits, step_size, np.ravel(at[0]), np.ravel(codes), offset))
    return grids


def depthwise_pairs(model: QuantizedModel) -> list[tuple[str, str]]:
    """Each searched depthwise layer with the layer that follows it, as in the paper's figure 2."""
    kinds = {path: spec.kind for spec in model.specs.values() for path in spec.paths}
    searched = [layer.path for layer in model.layers if layer.searched]
    return [(a, b) for a, b in itertools.pairwise(searched) if kinds[a] == "depthwise" and kinds[b] != "depthwise"]


def _curve(table: Importance, budgets: Sequence[Budget], mixed: Policy) -> dict[str, Any]:
    """The frontier beside the policy; or why there is none: no report fails for the want of it."""
    try:
        return {"curve": report.curve(table, budgets, mixed)}
    except Refusal as refusal:
        return {"curve": None, "no_curve": f"There is no frontier: {refusal}."}


def indicators(workdir: Path, table: Importance) -> dict[str, Any]:
    """What a report shows of indicators.json, which a run has that learned its step sizes.

    Raises Refusal where its tables are not those of the searched layers of `table`.
    """
    path = workdir / "indicators.json"
    if not path.exists():
        return {"indicators": None, "initial": None, "outliers": []}
    saved = read_json(path, "mpq-indicators", 1, importance.MADE_BY)
    paths = [layer.path for layer in table.layers if layer.searched]
    outliers = saved.get("outliers", [])
    try:
        for name, widths in (("weight", table.bit_widths), ("activation", table.activation_bit_widths)):
            for when in ("initial", "learned"):
                values = np.array(saved[when][name], np.float64)
                if values.shape != (len(paths), len(widths)) or not np.isfinite(values).all():
                    raise ValueError(f'"{when}" has no finite numbers in {len(paths)} x {len(widths)} for "{name}"')
        for at, kind, bits in outliers:
            if at not in paths or kind not in ("weight", "activation") or type(bits) is not int:
                raise ValueError('"outliers" must list [layer, "weight" or "activation", bits]')
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise Refusal(f"{path}: {error}; move it away, or make it again with: {importance.MADE_BY}") from None
    return {
        "indicators": saved["learned"],
        "initial": saved["initial"],
        "outliers": [tuple(outlier) for outlier in outliers],
    }


def _provenance(config: Config, found_with: Path, policy_path: Path) -> dict[str, str]:
    packages = ("jax", "jaxlib", "flax", "optax", "cvxpy", "highspy", "tensorflow-datasets", "grain")
    return {
        "mpq_jax": __version__,
        "Python": platform.python_version(),
        **{name: metadata.version(name) for name in packages},
        "device": f"{jax.devices()[0].platform} x {jax.device_count()}",
        "seed": str(config.seed),
        f"{found_with.name} (SHA-256)": importance.sha256(found_with),
        "policy (SHA-256)": importance.sha256(policy_path),
    }
