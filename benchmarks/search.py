"""The search against PuLP with CBC, the peer that LIMPQ's code uses; large problems; the commands.

  python benchmarks/search.py [--only one two frontier large huge commands] [--seeds 10] [--large-seeds 50]

Problems are made from seeds (benchmarks/instances.py). Times go from tables in memory to the checked policy: CBC's
include stating the problem in PuLP, ours include modelling, presolve and any child process. Each problem is solved by
both in turn; medians are printed. Nothing else should run meanwhile.
"""

import argparse
import json
import math
import multiprocessing
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.instances import instance
from mpq_jax import costs
from mpq_jax.importance import combined, save_importance
from mpq_jax.search import solve
from mpq_jax.search.frontier import frontier

FIVE, SEVEN = (2, 3, 4, 5, 6), (2, 3, 4, 5, 6, 7, 8)
NAMES = ("bitops", "size", "latency")


def by_cbc(importance, budgets, limit: float = 60.0) -> tuple[float, float, bool]:
    """(objective, seconds, optimal) by PuLP and its CBC, gap 0, stated as in LIMPQ's search: one variable a choice."""
    import pulp

    began = time.perf_counter()
    table = combined(importance)
    layers = len(table)
    values = table.reshape(layers, -1)
    choices = [(row, column) for row in range(layers) for column in range(values.shape[1])]
    x = {(row, column): pulp.LpVariable(f"x_{row}_{column}", cat="Binary") for row, column in choices}
    problem = pulp.LpProblem("bits", pulp.LpMinimize)
    problem += pulp.lpSum(float(values[choice]) * x[choice] for choice in choices)
    for row in range(layers):
        problem += pulp.lpSum(x[row, column] for column in range(values.shape[1])) == 1
    for budget in budgets:
        cost = budget.table.reshape(layers, -1)
        problem += pulp.lpSum(float(cost[choice]) * x[choice] for choice in choices) <= float(
            budget.limit - budget.fixed
        )
    problem.solve(pulp.PULP_CBC_CMD(msg=0, gapRel=0, timeLimit=limit))
    seconds = time.perf_counter() - began
    return float(pulp.value(problem.objective)), seconds, problem.sol_status == 1 and seconds < limit


def over(solution, importance, budgets) -> int:
    """How many budgets a policy breaks, added up once more in whole numbers."""
    return sum(costs.used(budget, solution.policy, importance) > budget.limit for budget in budgets)


def small(names, seeds: int, label: str) -> dict:
    """52 x 25: ours and CBC's in turn, at equal optimum."""
    ours, theirs, worst = [], [], 0.0
    for seed in range(seeds):
        importance, budgets = instance(seed, 52, FIVE, names)
        found = solve(importance, budgets)
        value, seconds, optimal = by_cbc(importance, budgets)
        assert found.status == "optimal" and optimal and not over(found, importance, budgets)
        worst = max(worst, abs(found.objective / value - 1))
        ours.append(found.seconds)
        theirs.append(seconds)
    ratio = median(theirs) / median(ours)
    print(
        f"{label}: ours {1e3 * median(ours):.1f} ms (slowest {1e3 * max(ours):.0f}), CBC {1e3 * median(theirs):.1f} ms "
        f"(slowest {1e3 * max(theirs):.0f}): {ratio:.1f} times faster; sums {sum(theirs) / sum(ours):.1f}; "
        f"{seeds} seeds, optima apart at most {worst:.1e}"
    )
    return {"ours": ours, "cbc": theirs, "ratio": ratio, "apart": worst}


def whole_frontier(seeds: int) -> dict:
    """64 budgets in one call against 8 single CBC solves of the same problem."""
    ours, theirs = [], []
    for seed in range(seeds):
        importance, budgets = instance(seed, 52, FIVE, NAMES[:1])
        found = frontier(importance, budgets, 64)
        assert len(found.limits) == 64 and all(one.status == "optimal" for one in found.solutions)
        ours.append(found.seconds)
        at = [found.limits[i] for i in np.linspace(4, 59, 8).round().astype(int)]
        theirs.append(sum(by_cbc(importance, [budgets[0]._replace(limit=limit)])[1] for limit in at))
    ratio = median(theirs) / median(ours)
    print(
        f"52 x 25, frontier of 64: ours {median(ours):.2f} s, eight single CBC solves {median(theirs):.2f} s: "
        f"{ratio:.1f} times less; {seeds} seeds"
    )
    return {"ours": ours, "cbc of 8": theirs, "ratio": ratio}


def large(seeds: int, cbc_seeds: int, limit: float = 60.0) -> dict:
    """150 x 49, three budgets."""
    proven, overshoot, hung, seconds, gaps = 0, 0, 0, [], []
    cbc = []
    for seed in range(seeds):
        importance, budgets = instance(seed, 150, SEVEN, NAMES)
        began = time.perf_counter()
        found = solve(importance, budgets, time_limit=limit)
        wall = time.perf_counter() - began
        proven += found.status == "optimal"
        overshoot += over(found, importance, budgets)
        hung += wall > limit + 5
        seconds.append(wall)
        gaps.append(found.gap)
        note = ""
        if seed < cbc_seeds:
            value, took, optimal = by_cbc(importance, budgets, limit)
            cbc.append(took)
            note = (
                f"; CBC {took:.2f} s{'' if optimal else ', not proven'}, apart {abs(found.objective / value - 1):.1e}"
            )
        print(f"  seed {seed}: {found.status}, {wall:.2f} s, gap {found.gap:.1e}, {found.solver}{note}", flush=True)
    print(
        f"150 x 49, three budgets: {proven} of {seeds} proven within {limit:.0f} s (median {median(seconds):.2f}, slowest "
        f"{max(seconds):.2f} s), largest gap {max(gaps):.1e}, {overshoot} over a limit, {hung} hung"
    )
    return {"proven": proven, "over": overshoot, "hung": hung, "seconds": seconds, "gaps": gaps, "cbc": cbc}


def _huge(seed: int, sender) -> None:
    importance, budgets = instance(seed, 1000, SEVEN, NAMES[:2])
    began = time.perf_counter()
    found = solve(importance, budgets, time_limit=20.0)
    wall = time.perf_counter() - began
    peaks = (resource.getrusage(who).ru_maxrss / 2**20 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    sender.send((found.status, found.solver, wall, found.gap, sum(peaks), over(found, importance, budgets)))


def huge(seeds: int) -> dict:
    """1,000 x 49, two budgets, each in a process of its own: peak memory with that of its children."""
    results = []
    context = multiprocessing.get_context("spawn")
    for seed in range(seeds):
        receiver, sender = context.Pipe(duplex=False)
        child = context.Process(target=_huge, args=(seed, sender))
        child.start()
        results.append(receiver.recv())
        child.join()
    walls, gaps, peaks = ([result[i] for result in results] for i in (2, 3, 4))
    print(
        f"1,000 x 49, two budgets: median {median(walls):.2f} s, slowest {max(walls):.2f} s; largest gap {max(gaps):.1e}, "
        f"{sum(r[0] == 'optimal' for r in results)} of {seeds} proven; peak memory {max(peaks):.2f} GiB; "
        f"{sum(r[5] for r in results)} over a limit"
    )
    return {"results": results}


def commands(repeats: int = 5) -> dict:
    """Whole commands, from the shell: help, refusals, one search."""
    root = Path(__file__).resolve().parent.parent
    times = {}
    with tempfile.TemporaryDirectory() as folder:
        importance, _ = instance(0, 52, FIVE, NAMES[:1])
        save_importance(Path(folder) / "importance.json", importance)
        table = ["--importance", f"{folder}/importance.json"]
        for name, arguments, code in (
            ("--help", ["--help"], 0),
            ("refused: budget not understood", ["--budget", "bitops=W3"], 2),
            ("refused: unknown option", ["--budgt", "x"], 2),
            ("refused: out of reach", [*table, "--budget", "bitops=1K"], 2),
            ("one budget, to the file", [*table, "--budget", "bitops=W3A4"], 0),
            ("two budgets, to the file", [*table, "--budget", "bitops=W3A4", "--budget", "size=10x"], 0),
        ):
            each = []
            for _ in range(repeats):
                began = time.perf_counter()
                done = subprocess.run([sys.executable, "search.py", *arguments], cwd=root, capture_output=True)
                each.append(time.perf_counter() - began)
                assert done.returncode == code, done.stderr
            times[name] = each
            print(f"search.py, {name}: {median(each):.2f} s (slowest {max(each):.2f})")
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    every = ["one", "two", "frontier", "large", "huge", "commands"]
    parser.add_argument("--only", nargs="+", choices=every, default=every)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--large-seeds", type=int, default=50)
    parser.add_argument("--cbc-large-seeds", type=int, default=3, help="large problems that CBC solves too")
    parser.add_argument("--out", type=Path, help="also write every figure as JSON")
    arguments = parser.parse_args()
    # What a warm process has loaded: the first import is not the search.
    import cvxpy  # noqa: F401
    import pulp  # noqa: F401

    runs = {
        "one": lambda: small(NAMES[:1], arguments.seeds, "52 x 25, one budget"),
        "two": lambda: small(NAMES[:2], arguments.seeds, "52 x 25, two budgets"),
        "frontier": lambda: whole_frontier(min(5, arguments.seeds)),
        "large": lambda: large(arguments.large_seeds, arguments.cbc_large_seeds),
        "huge": lambda: huge(min(5, arguments.seeds)),
        "commands": commands,
    }
    results = {name: runs[name]() for name in arguments.only}
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(results, default=lambda x: None if not math.isfinite(x) else float(x)))


if __name__ == "__main__":
    main()
