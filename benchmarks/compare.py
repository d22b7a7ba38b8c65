"""Every system on the same model, data, costs, fine-tuning and table: what each search cost, and what its bits are worth.

  python -m benchmarks.compare --config configs/digits.py --budget bitops=W3A3 --systems all --seeds 3

A system is a criterion whose table the integer program searches, a search that measures policies, or a control: the best
uniform policy that fits, random policies of the same budget. For each seed one run is trained (float, joint); every
system finds its policy on it; policies are measured on the validation split with normalisation statistics re-estimated,
then fine-tuned, all alike, and measured again. The test set is not read.

One JSON line a system and seed is added to <root>/results.jsonl; a second call goes on from there. Policies that two
systems agree on are fine-tuned once. `--out` writes the table as Markdown.

Costs are passes over the training set: one pass is forward and backward of every training image once; a forward pass
alone counts a third. What a system needs from joint training counts for it too.
"""

import argparse
import dataclasses
import hashlib
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.cheaper import samples_seen
from mpq_jax import command_line, costs, importance, policy, stages
from mpq_jax import config as config_lib
from mpq_jax.config import Config
from mpq_jax.criteria import CRITERIA, files
from mpq_jax.files import write_json, write_text
from mpq_jax.search import best_uniform, methods, random_policies, run, solve
from mpq_jax.stages.run import row_names
from mpq_jax.types import Bits, Budget, Importance, Refusal

CONTROLS = ("uniform", "random_policies")
SYSTEMS = (*CONTROLS, *CRITERIA, *methods.SETTINGS)
FORWARD = 1 / 3  # of a forward and backward pass
RANDOM_POLICIES = 3


class Bench(NamedTuple):
    """One seed's run, trained: what all systems work on."""

    config: Config
    workdir: Path
    run: stages.Run
    table: Importance
    budgets: list[Budget]
    measured: Callable[[Mapping[str, Bits]], Any]
    finetuned: Callable[[Mapping[str, Bits]], tuple[float, float]]
    joint_passes: float


class Found(NamedTuple):
    """What a system ends with: policies (one, but for random ones), predicted harm, passes, seconds, remarks."""

    policies: list[dict[str, Bits]]
    predicted: float | None
    passes: float
    seconds: float
    notes: Sequence[str] = ()


# ---- one seed -----------------------------------------------------------------------------------------------------


def open_bench(config: Config, workdir: Path, texts: Sequence[str]) -> Bench:
    """Trains what is not trained yet, and opens it."""
    from mpq_jax import workdir as workdirs
    from mpq_jax.pipeline import learn, stage_of, starts
    from mpq_jax.search import measure

    # Every criterion's table is measured, and timed, when it is its turn.
    config = dataclasses.replace(config, search=dataclasses.replace(config.search, criterion="learned"))
    workdirs.claim(workdir, config, finetuning=False)
    if not (workdir / "importance.json").exists():
        learn(config, workdir)
    table, _ = importance.repair(importance.load_importance(workdir / "importance.json"))
    budgets = costs.parse_budgets(texts, table.layers, table.bit_widths, table.activation_bit_widths)
    opened = measure.open_bench(workdir, methods.Measuring())
    float_variables = stages.pretrain(opened.run)
    finetune = stages.finetuner(opened.run, float_variables)
    calibrated = stages.calibrated(opened.run, float_variables)
    start = starts(opened.run, stages.joint_train(opened.run, calibrated)[0], calibrated)

    def finetuned(chosen: Mapping[str, Bits]) -> tuple[float, float]:
        variables = finetune(stage_of(config, chosen), "policy", chosen, start)
        rows = stages.rows_of(variables, 1)
        losses, accuracies = stages.evaluate(
            opened.run, variables["params"], rows, policy.stack([chosen]), "validation"
        )
        return float(losses[0]), float(accuracies[0])

    rows = len(row_names(opened.run.model, config.joint))
    samples = samples_seen(config.joint, rows, stages.steps_of(config.joint, opened.run))
    return Bench(
        config,
        workdir,
        opened.run,
        table,
        budgets,
        measure.evaluator(opened),
        finetuned,
        samples / opened.run.dataset.sizes["train"],
    )


def find(system: str, bench: Bench, settings: Sequence[str]) -> Found:
    """What one system chooses. settings: overrides of the measuring searches' settings, "--evolution.generations" …"""
    began = time.perf_counter()
    if system == "uniform":
        uniform = best_uniform(bench.table, bench.budgets)
        if uniform is None:
            raise Refusal("no uniform policy fits this budget; ask for more")
        return Found([uniform[1]], None, 0.0, time.perf_counter() - began, (uniform[0],))
    if system == "random_policies":
        others: list[dict[str, Bits]] = []
        for within in (0.02, 0.05, 0.1):
            others = others or random_policies(
                bench.table, bench.budgets, RANDOM_POLICIES, seed=bench.config.seed, within=within
            )
        return Found(others, None, 0.0, time.perf_counter() - began)
    if system in CRITERIA:
        return by_criterion(system, bench)
    return by_measuring(system, bench, settings)


def by_criterion(name: str, bench: Bench) -> Found:
    """A criterion's table, then the integer program."""
    path, began = files.path_of(bench.workdir, name), time.perf_counter()
    files.ensure(bench.workdir, name, files.near(name, [budget.text for budget in bench.budgets]))
    computing = time.perf_counter() - began
    table, _ = importance.repair(importance.load_importance(path))
    began = time.perf_counter()
    solution = solve(table, bench.budgets)
    about = {} if name == "learned" else json.loads(path.read_text()).get("about", {})
    joined = bench.joint_passes if {"rows", "joint", "indicators"} & set(CRITERIA[name].needs) else 0.0
    notes = [*about.get("notes", ()), solution.status, solution.solver]
    return Found(
        [solution.policy],
        solution.objective,
        joined + about.get("train_passes", 0.0),
        computing + time.perf_counter() - began,
        notes,
    )


def by_measuring(name: str, bench: Bench, overrides: Sequence[str]) -> Found:
    """A search that measures policies on the joint model."""
    mine = [word for word in overrides if word.startswith(f"--{name}.")]
    settings = methods.settings(name, mine)
    began = time.perf_counter()
    solution, _, _ = run.find(name, bench.workdir, bench.table, bench.budgets, settings, seed=bench.config.seed)
    seconds = max(solution.seconds, time.perf_counter() - began)
    folders = sorted((bench.workdir / f"search_{name}").glob("*/evaluations.jsonl"), key=lambda p: p.stat().st_mtime)
    evaluations = sum(1 for _ in folders[-1].open())
    passes = bench.joint_passes + measuring_samples(settings, evaluations, bench) / bench.run.dataset.sizes["train"]
    return Found([solution.policy], solution.objective, passes, seconds, (f"{evaluations} policies measured",))


def measuring_samples(settings: methods.Measuring, evaluations: int, bench: Bench) -> float:
    """Forward-and-backward passes of one sample: of the evaluations, and of what trains the choice itself."""
    config, sizes = bench.config, bench.run.dataset.sizes
    batches = settings.statistics_batches or config.statistics_batches
    each = 2 * FORWARD * batches * config.joint.batch_size  # statistics from two starting values
    each += FORWARD * (settings.examples or sizes["validation"])
    each += settings.finetune_steps * config.finetune.batch_size
    total = evaluations * each
    if isinstance(settings, methods.Supernet):
        branches = len(bench.table.bit_widths) if isinstance(settings, methods.Gumbel) else 1
        total += branches * settings.batch_size * (settings.warmup_steps + 2 * settings.steps)
    return total


# ---- lines --------------------------------------------------------------------------------------------------------


def line(system: str, seed: int, key: str, bench: Bench, found: Found) -> dict[str, Any]:
    """One finished run: measured before and after fine-tuning, means over its policies."""
    before = [bench.measured(each) for each in found.policies]
    after = [bench.finetuned(each) for each in found.policies]
    used = [
        {b.name: costs.shown(b, costs.used(b, each, bench.table)) for b in bench.budgets} for each in found.policies
    ]
    return {
        "key": key,
        "system": system,
        "seed": seed,
        "predicted": found.predicted,
        "passes": found.passes,
        "seconds": found.seconds,
        "loss_before": float(np.mean([m.loss for m in before])),
        "accuracy_before": float(np.mean([m.accuracy for m in before])),
        "loss": float(np.mean([loss for loss, _ in after])),
        "accuracy": float(np.mean([accuracy for _, accuracy in after])),
        "used": used,
        "limits": {b.name: costs.shown(b, b.limit) for b in bench.budgets},
        "policies": [{path: list(bits) for path, bits in each.items()} for each in found.policies],
        "notes": list(found.notes),
    }


def key_of(config: Config, texts: Sequence[str], settings: Sequence[str], system: str) -> str:
    """What a line depends on: the config (seed included), the budgets, the system and its settings."""
    mine = [word for word in settings if word.startswith(f"--{system}.")]
    asked = [config_lib.to_json(config), list(texts), system, mine]
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:16]


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a results file; one that was cut off by a kill is left out."""
    if not path.exists():
        return []
    lines = []
    for text in path.read_text().splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            continue
    return lines


def markdown(lines: Sequence[Mapping[str, Any]], title: str) -> str:
    """The table: means over seeds, standard deviations where there are several."""

    def cell(values: Sequence[float], digits: int, scale: float = 1.0) -> str:
        scaled = scale * np.array(values)
        spread = f" ± {scaled.std(ddof=1):.{digits}f}" if len(scaled) > 1 else ""
        return f"{scaled.mean():.{digits}f}{spread}"

    head = "system | seeds | passes | seconds | predicted harm | loss before | loss after | accuracy after, % | of budget, %"
    rows = [f"# {title}", "", f"| {head} |", "|---|" + "--:|" * 8]
    for system in dict.fromkeys(one["system"] for one in lines):
        mine = [one for one in lines if one["system"] == system]
        first = next(iter(mine[0]["limits"]))
        used = [np.mean([u[first] for u in one["used"]]) / one["limits"][first] for one in mine]
        predicted = "" if mine[0]["predicted"] is None else f"{np.mean([one['predicted'] for one in mine]):.4g}"
        passes, seconds = (np.mean([one[name] for one in mine]) for name in ("passes", "seconds"))
        cells = [
            system,
            str(len(mine)),
            f"{passes:.3g}",
            f"{seconds:.2f}" if seconds < 10 else f"{seconds:.0f}",
            predicted,
            cell([one["loss_before"] for one in mine], 4),
            cell([one["loss"] for one in mine], 4),
            cell([one["accuracy"] for one in mine], 2, 100),
            f"{100 * np.mean(used):.1f}",
        ]
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows) + "\n"


# ---- command ------------------------------------------------------------------------------------------------------


def chosen_systems(names: Sequence[str]) -> list[str]:
    """The systems asked for, in the order of SYSTEMS. Raises Refusal for a name that does not exist."""
    wanted = set(names)
    if "all" in wanted:
        return list(SYSTEMS)
    if unknown := wanted - set(SYSTEMS):
        raise Refusal(f"system {min(unknown)!r} is not known; there are: all, {', '.join(SYSTEMS)}")
    return [name for name in SYSTEMS if name in wanted]


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str], list[str]]:
    """Arguments, overrides of the config, settings of the measuring searches."""
    parser = command_line.Parser("benchmarks.compare", __doc__)
    parser.add_argument("--config", required=True)
    parser.add_argument("--budget", action="append", required=True)
    parser.add_argument("--systems", nargs="+", default=["all"], help=f"all, or of: {', '.join(SYSTEMS)}")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--root", type=Path, help="default: runs/compare/<config>")
    parser.add_argument("--out", type=Path, help="the table as Markdown")
    arguments, rest = parser.parse_known_args(argv)
    overrides: list[str] = []
    settings: list[str] = []
    while rest:
        word = rest.pop(0)
        if "=" not in word and rest and not rest[0].startswith("--"):
            word = f"{word}={rest.pop(0)}"
        (settings if word[2:].partition(".")[0] in methods.SETTINGS else overrides).append(word)
    return arguments, overrides, settings


@command_line.command
def main(argv: Sequence[str] | None = None) -> int:
    arguments, overrides, settings = parse(argv)
    systems = chosen_systems(arguments.systems)
    for text in arguments.budget:
        costs.check_text(text)
    base = config_lib.load(arguments.config, overrides)
    root = arguments.root or Path("runs/compare") / Path(arguments.config).stem
    results = root / "results.jsonl"
    known = {one["key"]: one for one in read_lines(results)}
    shown = []
    for seed in range(arguments.seeds):
        config = dataclasses.replace(base, seed=seed)
        bench = None
        for system in systems:
            key = key_of(config, arguments.budget, settings, system)
            if key not in known:
                bench = bench or open_bench(config, root / f"seed{seed}", arguments.budget)
                print(f"seed {seed}: {system}", flush=True)
                known[key] = line(system, seed, key, bench, find(system, bench, settings))
                results.parent.mkdir(parents=True, exist_ok=True)
                with results.open("a") as file:
                    file.write(json.dumps(known[key]) + "\n")
            shown.append(known[key])
    shown.sort(key=lambda one: SYSTEMS.index(one["system"]))
    title = f"{base.model.name} on {base.data.name}, {', '.join(arguments.budget)}"
    table = markdown(shown, title)
    print(f"\n{table}")
    if arguments.out:
        write_text(arguments.out, table)
        write_json(arguments.out.with_suffix(".json"), {"command": [*(argv or sys.argv[1:])], "lines": shown})
    return 0


if __name__ == "__main__":
    sys.exit(main())
