"""What the commands do: `learn` (float and joint training, importance) and `finish` (fine-tuning and the report)."""

import platform
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from mpq_jax import build, costs, flax_seam, joint, report, stages
from mpq_jax.config import Config
from mpq_jax.criteria.learned import learned
from mpq_jax.files import read_json, write_json
from mpq_jax.importance import load_importance, repair, save_importance
from mpq_jax.policy import load_policy
from mpq_jax.search import best_uniform, random_policies
from mpq_jax.types import Budget, Importance, Policy, Refusal


def learn(config: Config, workdir: Path) -> Importance:
    """Float training, joint training, and <workdir>/importance.json. Resumes where it stopped."""
    run = stages.open_run(config, workdir)
    print(f"{config.model.name} on {config.data.name}: {sum(ly.searched for ly in run.model.layers)} layers to search")
    variables = stages.pretrain(run)
    loss, accuracy = stages.evaluate(run, variables, None, "validation")
    print(f"float: validation accuracy {accuracy:.2%}, loss {loss:.4f}")
    start = stages.calibrated(run, variables)
    state, log = stages.joint_train(run, start)
    trained = joint.row_variables(state, 0, averaged=True)
    importance = learned(run.model, trained, log)
    if config.joint.alpha != "auto":
        importance = importance._replace(alpha=_alpha(config.joint.alpha))
    importance, outliers = repair(importance)
    for path, kind, bits in outliers:
        print(f"repaired: the {kind} indicator of {path} at {bits} bits fell where bits were taken away")
    write_json(
        workdir / "indicators.json",
        {
            "format": "mpq-indicators",
            "version": 1,
            "initial": _tables(learned(run.model, start)),
            "learned": _tables(learned(run.model, trained)),
            "outliers": [list(outlier) for outlier in outliers],
        },
    )
    save_importance(workdir / "importance.json", importance)
    print(f"importance of {len(importance.weight)} layers, alpha {importance.alpha}: {workdir / 'importance.json'}")
    return importance


def _alpha(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value < float("inf"):
        raise Refusal(f'joint.alpha is {text!r}; write "auto" or a positive number')
    return value


def _tables(importance: Importance) -> dict[str, Any]:
    assert importance.weight is not None and importance.activation is not None
    return {"weight": importance.weight.tolist(), "activation": importance.activation.tolist()}


# ---- fine-tuning and the report -----------------------------------------------------------------------------------


def finish(config: Config, workdir: Path, policy_path: Path) -> Path:
    """Fine-tunes the policy and those it is compared with, and writes <workdir>/report.md. -> its path"""
    run = stages.open_run(config, workdir)
    importance = load_importance(workdir / "importance.json")
    policy = load_policy(policy_path, importance.layers, importance.bit_widths, importance.activation_bit_widths)
    saved = read_json(policy_path, "mpq-policy", 1, "python search.py --workdir … --budget …")
    budgets = _budgets(saved, importance)
    float_variables = stages.pretrain(run)
    start_joint = _joint_variables(run, float_variables)
    contestants: dict[str, list[Policy]] = {}
    if config.finetune.compare and budgets:
        contestants |= _compared(importance, budgets, config)
    contestants["mixed"] = [policy]
    rows = [_measured(run, "float", [(float_variables, None)], importance)]
    final: Mapping[str, Any] = {}
    for name, policies in contestants.items():
        trained = []
        for i, each in enumerate(policies):
            stage = _slug(name) + (f"-{i + 1}" if len(policies) > 1 else "") + "-" + _fingerprint(each)
            start = _start(run, start_joint, float_variables, each)
            final = stages.finetune(run, stage, each, start, float_variables)
            trained.append((final, each))
        rows.append(_measured(run, name, trained, importance))
    made = report.Report(
        title=f"{config.model.name} on {config.data.name}",
        importance=importance,
        policies={name: policies[0] for name, policies in contestants.items()},
        used={b.name: (costs.used(b, policy, importance.layers, importance), b.limit, b.unit) for b in budgets},
        accuracy=rows,
        grids=_grids(run, start_joint, importance),
        depthwise_pairs=_depthwise_pairs(run),
        **_indicator_tables(workdir),
        history=None,
        provenance=_provenance(config, policy_path),
    )
    path = report.write(made, workdir)
    write_json(
        workdir / "results.json",
        {"format": "mpq-results", "version": 1, "rows": [row._asdict() for row in rows]},
    )
    print(report.terminal_table(made))
    print(f"report: {path}")
    return path
