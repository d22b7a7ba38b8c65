"""How cheap may joint training be? The lines that docs/results.md's table of cheaper joint trainings is made of.

  python -m benchmarks.cheaper --net resnet8 --seed 0 [--variants slices widths ...]

From one float model, one calibration: joint training as the config has it (`full`), and variants of it. Each finished
variant is a line of <root>/<net>/seed<k>/cheaper.jsonl: what it cost, its step sizes, its alpha (fitted to its rows' log,
and to policies measured after training), and the policy that its table chooses at every budget with that alpha, with the
measured one, and with full's. Lines "loss <policy>": validation loss of full's joint model, statistics re-estimated.
"""

import dataclasses
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.proof_lines import BUDGETS, LEVELS, Lines, as_lists, as_policy, digest
from benchmarks.proof_run import NETS, Bench, Settings, measured, open_bench
from mpq_jax import command_line, costs, importance, joint, stages
from mpq_jax import config as config_lib
from mpq_jax.config import Joint
from mpq_jax.criteria.learned import RowLog, fit_alpha, learned
from mpq_jax.search import solve
from mpq_jax.stages.run import sliced
from mpq_jax.types import Importance
from mpq_jax.workdir import latest_step

ALPHA_POLICIES = 128
FEWER = "--joint.bit_widths=2,4,6"
WHOLE, SLICES, SETTLED = "--joint.slices=false", "--joint.slices=true", "--joint.settled=0.1"
# name -> overrides of the config. "again": the same with other batches, what any of the others can be expected to reach.
VARIANTS: Mapping[str, tuple[str, ...]] = {
    "full": (WHOLE,),
    "again": (WHOLE,),
    "half": (WHOLE, "--joint.steps=150"),
    "sixth": (WHOLE, "--joint.steps=50"),
    "settled": (WHOLE, SETTLED),
    "widths": (WHOLE, FEWER),
    "slices": (SLICES,),
    "slices half": (SLICES, "--joint.steps=150"),
    "slices settled": (SLICES, SETTLED),
    "slices widths": (SLICES, FEWER),
    "slices widths half": (SLICES, FEWER, "--joint.steps=150"),
    "slices widths sixth": (SLICES, FEWER, "--joint.steps=50"),
    "slices widths settled": (SLICES, FEWER, SETTLED),
}


def train(bench: Bench, name: str) -> tuple[stages.Run, joint.TrainState, RowLog, int]:
    """A variant's joint training. -> (its run, state, log, steps that it took)"""
    config = config_lib.override(bench.run.config, VARIANTS[name])
    if name == "again":  # the data stay as they were opened; only their order and the random rows follow this seed
        config = dataclasses.replace(config, seed=config.seed + 100)
    workdir = bench.workdir if name == "full" else bench.workdir / "cheaper" / name.replace(" ", "_")
    run = bench.run._replace(config=config, workdir=workdir)
    state, log = stages.joint_train(run, bench.calibrated)
    return run, state, log, latest_step(workdir / "joint") or 0


def samples_seen(settings: Joint, rows: int, steps: int) -> int:
    """Forward and backward passes of one sample: with slices a row sees its share of the batch."""
    return steps * rows * (settings.batch_size // rows if sliced(settings, rows) else settings.batch_size)


def choose(table: Importance, bench: Bench) -> dict[str, list[list[int]]]:
    """{budget: bits of the searched layers}."""
    found = {}
    for name in LEVELS:
        text, rules = BUDGETS[name]
        own = table._replace(rules=(*table.rules, *rules))
        budgets = costs.parse_budgets([text], own.layers, own.bit_widths, own.activation_bit_widths)
        found[name] = as_lists([solve(own, budgets).policy], bench.table)[0]
    return found


def one(bench: Bench, lines: Lines, name: str) -> None:
    """Trains a variant, and adds its line."""
    began = time.process_time()
    run, state, log, steps = train(bench, name)
    seconds = time.process_time() - began
    raw = learned(run.model, joint.row_variables(state, 0, averaged=True))
    table, _ = importance.repair(raw)
    assert table.weight is not None and table.activation is not None
    # All variants are asked for alpha with the same policies on the same images: those of the run's own seed.
    rows = stages.measured_rows(run._replace(config=bench.run.config), state, ALPHA_POLICIES)
    alphas = {"log": fit_alpha(raw, log), "measured": fit_alpha(raw, rows)}
    alphas["full"] = alphas["log"] if name == "full" else lines["full"]["alpha"]["log"]
    lines.add(
        name,
        steps=steps,
        rows=len(state.rows["index"]),
        samples=samples_seen(run.config.joint, len(state.rows["index"]), steps),
        alpha_samples=2 * run.config.joint.batch_size * len(rows.loss),
        train=bench.run.dataset.sizes["train"],
        cpu_seconds=seconds,
        alpha=alphas,
        weight=table.weight.tolist(),
        activation=table.activation.tolist(),
        policies={which: choose(table._replace(alpha=alpha), bench) for which, alpha in alphas.items()},
    )
    print(f"{bench.net} seed {bench.seed}: {name}, {steps} steps, alpha {alphas}", flush=True)


def losses(bench: Bench, lines: Lines) -> None:
    """Validation losses of full's joint model at all policies that were chosen."""
    chosen = [
        bits
        for name in VARIANTS
        if name in lines
        for each in lines[name]["policies"].values()
        for bits in each.values()
    ]
    wanted = {digest(bits): bits for bits in chosen if f"loss {digest(bits)}" not in lines}
    todo, size = list(wanted.items()), bench.settings.rows
    for start in range(0, len(todo), size):
        part = todo[start : start + size]
        policies = [as_policy(bits, bench.table) for _, bits in part]
        found = measured(bench, bench.start, policies + [policies[-1]] * (size - len(part)))
        for (key, _), loss, accuracy in zip(part, found["loss"], found["accuracy"], strict=False):
            lines.add(f"loss {key}", loss=loss, accuracy=accuracy)


@command_line.command
def main(argv: Sequence[str] | None = None) -> int:
    parser = command_line.Parser("benchmarks.cheaper", __doc__)
    parser.add_argument("--net", required=True, choices=sorted(NETS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--root", type=Path, default=Path("runs/proof"))
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    arguments, overrides = parser.parse_known_args(argv)
    bench = open_bench(arguments.net, arguments.seed, arguments.root, Settings(), overrides)
    lines = Lines(bench.workdir / "cheaper.jsonl")
    for name in dict.fromkeys(("full", *arguments.variants)):
        if name not in lines:
            one(bench, lines, name)
    losses(bench, lines)
    return 0


if __name__ == "__main__":
    sys.exit(main())
