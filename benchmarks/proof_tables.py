"""The proof's stages that make importance tables, and what the tables say of the random policies."""

import dataclasses
import itertools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks.proof_lines import BUDGETS, COMBINED, LEVELS, PREDICTED, TABLES, Lines, as_policy, finetuned
from benchmarks.proof_run import SAMPLED, THIRDS, Bench
from mpq_jax import build, costs, data, importance, joint
from mpq_jax import config as config_lib
from mpq_jax import workdir as workdirs
from mpq_jax.criteria import CRITERIA, files
from mpq_jax.criteria.compute import measure
from mpq_jax.criteria.coupling import coupled_pairs, searched_pairs
from mpq_jax.criteria.learned import RowLog, load_rows
from mpq_jax.search import random_policies, solve
from mpq_jax.types import Budget, Importance, QuantizedModel

HESSIAN = ("hawq", "hawq_v2")  # the criteria that take longest
FEWER = (30, 60, 120)
# Also of the loss, of policies all over, and of the first few policies.
TRIED = (*SAMPLED, "sampled_loss", "sampled_all", "sampled_all_loss", *(f"sampled_{count}" for count in FEWER))


def criteria(bench: Bench, names: Sequence[str]) -> None:
    """importance_<name>.json of these criteria, and what they cost."""
    config = bench.run.config
    settings = dataclasses.replace(config.criteria, max_draws=bench.settings.max_draws)
    size = min(settings.batch_size, bench.run.dataset.sizes["train"])
    stream = data.train_batches(bench.run.dataset, size, seed=config.seed * 1000 + 999)
    log, alpha_log = (
        load_rows(file(bench.workdir), bench.run.model.layers) for file in (files.rows_file, files.alpha_rows_file)
    )
    given = {
        "model": bench.run.model,
        "task": joint.classification(),
        "variables": bench.calibrated,
        "batches": list(itertools.islice(stream, settings.samples // size)),
        "rows": log,
        "log": alpha_log,
        "base": bench.table,
        "pairs": pairs_of(bench.run.model, bench.run.variables, bench.run.example()),
        "seed": config.seed,
        **config_lib.to_json(dataclasses.replace(config, criteria=settings))["criteria"],
    }
    for name in names:
        if name == "learned" or f"criterion {name}" in bench.lines:
            continue
        began = time.perf_counter()
        result = measure(name, **given)
        about = {"notes": list(result.notes)}
        importance.save_importance(files.path_of(bench.workdir, name), result.importance, about)
        seconds, passes = time.perf_counter() - began, result.sample_passes / bench.run.dataset.sizes["train"]
        bench.lines.add(f"criterion {name}", seconds=seconds, passes=passes, **about)
        print(f"{bench.net} seed {bench.seed}: {name} in {seconds:.1f} s", flush=True)


def pairs_of(model: QuantizedModel, variables: Any, inputs: Sequence[Any]) -> Any:
    """The coupled pairs of searched layers; `variables` may be shapes."""
    return searched_pairs(model, coupled_pairs(model, jax.eval_shape(lambda: variables), *inputs, train=False))


def sampled_table(model: QuantizedModel, pairs: Any, lines: Lines, name: str, budget: str) -> Importance:
    """Ridge regression on the samples: near the budget, of the divergence, additive, unless `name` says otherwise.

    Budgets that no samples were drawn near take those near W3A3.
    """
    near = "all" if "all" in name else budget if f"samples {budget}" in lines else "W3A3"
    one = lines[f"samples {near}"]
    last = name.rpartition("_")[2]
    count = min(int(last), len(one["loss"])) if last.isdigit() else len(one["loss"])
    harm = np.array(one["loss" if "loss" in name else "divergence"][:count])
    log = RowLog(np.arange(count), np.array(one["policies"][:count], np.int32), harm, np.ones(count))
    fitted = "regression_pairwise" if name.endswith("pairwise") else "regression"
    return measure(fitted, model=model, rows=log, pairs=pairs, settled=1.0).importance


def table_of(workdir: Path, name: str) -> Importance:
    """A criterion's table in a run's folder, repaired; of THIRDS, one with a third of the weights' factor.

    "output_fisher" is of the model as it is, whatever factor its file has.
    """
    source = THIRDS.get(name, name)
    table, _ = importance.repair(importance.load_importance(files.path_of(workdir, source)))
    alpha = 1.0 if source == "output_fisher" else table.alpha
    return table._replace(alpha=alpha / 3 if name in THIRDS and alpha is not None else alpha)


def combined_table(workdir: Path, name: str, budgets: Sequence[Budget], seed: int) -> Importance:
    """One of COMBINED, for these budgets."""
    tables = [table_of(workdir, each) for each in COMBINED[name]]
    policies = random_policies(tables[0], budgets, 60, seed=seed)
    weight, activation = np.zeros_like(tables[0].weight), np.zeros_like(tables[0].activation)
    for each in tables:
        deviation = np.std([importance.total(each, policy) for policy in policies])
        weight += (1.0 if each.alpha is None else each.alpha) * each.weight / deviation
        activation += each.activation / deviation
    return tables[0]._replace(criterion=name, alpha=1.0, weight=weight, activation=activation)


def parts(workdir: Path) -> None:
    """The lines "parts NAME": W and A of every fine-tuned policy, by the tables of TABLES in a run's folder."""
    lines = Lines(workdir / "lines.jsonl")
    policies = finetuned(lines.lines)
    for name in TABLES:
        there = lines.lines.get(f"parts {name}", {"policies": {}})["policies"]
        if policies.keys() <= there.keys() or not files.path_of(workdir, name).exists():
            continue
        both = table_of(workdir, name)._replace(alpha=1.0)
        nothing = {kind: np.zeros_like(getattr(both, kind)) for kind in ("weight", "activation")}
        found = {
            key: [
                importance.total(both._replace(**{other: nothing[other]}), as_policy(bits, both))
                for other in ("activation", "weight")
            ]
            for key, bits in policies.items()
        }
        lines.add(f"parts {name}", alpha=table_of(workdir, name).alpha, policies=found)


def predicted(workdir: Path) -> None:
    """What every criterion says of the random policies, from the tables and lines in a run's folder; nothing is trained.

    Tables that follow from joint training alone are made here where they are not there.
    """
    config, lines = workdirs.load_config(workdir), Lines(workdir / "lines.jsonl")
    features, classes = build.features(config)
    source = build.float_model(config, classes)
    model = build.quantized(config, source, features)
    variables = jax.eval_shape(lambda: build.float_variables(config, source, model, features))
    base, _ = importance.repair(importance.load_importance(workdir / "importance.json"))
    given = {
        "model": model,
        "base": base,
        "pairs": pairs_of(model, variables, build.example(source, features)),
        "seed": config.seed,
    }
    given |= config_lib.to_json(config)["criteria"]
    if files.rows_file(workdir).exists():
        given["rows"] = load_rows(files.rows_file(workdir), model.layers)
        given["log"] = load_rows(files.alpha_rows_file(workdir), model.layers)
    for name in CRITERIA:
        path = files.path_of(workdir, name)
        if not path.exists() and set(CRITERIA[name].needs) <= {"indicators"} | ({"rows"} if "rows" in given else set()):
            importance.save_importance(path, measure(name, **given).importance)
    for budget in LEVELS:
        text, rules = BUDGETS[budget]
        if f"solve {budget}" not in lines:
            table = base._replace(rules=(*base.rules, *rules))
            budgets = costs.parse_budgets([text], table.layers, table.bit_widths, table.activation_bit_widths)
            seconds = []
            for _ in range(5):
                began = time.process_time()
                solve(table, budgets)
                seconds.append(time.process_time() - began)
            lines.add(f"solve {budget}", cpu_seconds=sorted(seconds)[2])
    for budget, name in itertools.product(PREDICTED, (*CRITERIA, *THIRDS, *TRIED)):
        if f"predicted {budget} {name}" in lines or f"random {budget}" not in lines:
            continue
        if name in TRIED and "samples W3A3" not in lines:
            continue
        if name in TRIED:
            table = sampled_table(model, given["pairs"], lines, name, budget)
        elif files.path_of(workdir, THIRDS.get(name, name)).exists():
            table = table_of(workdir, name)
        else:
            continue
        policies = [as_policy(bits, table) for bits in lines[f"random {budget}"]["policies"]]
        lines.add(f"predicted {budget} {name}", values=[importance.total(table, each) for each in policies])
