"""Finds the best bit-widths under budgets, and proves it. `python search.py --help` lists every option.

python search.py --budget bitops=W3A4                              the newest run under runs/
python search.py --workdir runs/digits --budget bitops=W3A4 --budget size=12.2x
python search.py --importance importance.json --budget bitops=55.3G
python search.py --workdir runs/digits --budget bitops=W3A4 --method evolution [--evaluations 200]
python search.py --config configs/digits.py --describe [--json]
"""

import argparse
import difflib
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from mpq_jax.config import Parser
from mpq_jax.search import methods
from mpq_jax.types import Refusal

OPTIONS = [
    "--budget",
    "--workdir",
    "--importance",
    "--alpha",
    "--out",
    "--latency",
    "--time-limit",
    "--random",
    "--method",
    "--evaluations",
    "--seconds",
    "--seed",
    "--config",
    "--describe",
    "--json",
    "--help",
]


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """Arguments; refuses what can be refused before CVXPY or JAX is imported."""
    parser = Parser(prog="search.py", description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add(
        "--budget",
        action="append",
        default=[],
        help="bitops=W3A4 | 55.3G | 76x; size=W3 | 8MB | 12.2x; latency=3ms; repeatable",
    )
    add("--workdir", type=Path, help="a run; default: the newest under runs/")
    add("--importance", type=Path, help="an importance.json of any origin, in place of a run")
    add("--alpha", default="auto", help="factor of the weights' table, or auto: the fitted one (default)")
    add("--out", type=Path, help="where the policy is written; default: policy.json beside the importance")
    add("--latency", type=Path, help="latency.json, for a latency budget")
    add("--time-limit", type=float, default=60.0, help="seconds of wall-clock for the solver (default 60)")
    add("--random", type=int, default=20, help="random policies shown beside (default 20)")
    add("--method", choices=methods.METHODS, default="ilp", help="ilp proves the least importance; the others measure")
    add("--evaluations", type=int, help="of a method that measures: policies measured at most")
    add("--seconds", type=float, help="of a method that measures: seconds after which it stops")
    add("--seed", type=int, help="of a method that measures (default 0)")
    add("--config", type=Path, help="with --describe: the config whose model is described")
    add("--describe", action="store_true", help="layers, parameters, MACs and uniform costs; no data, no training")
    add("--json", action="store_true", help="with --describe: JSON and nothing else")
    parser.formatter_class, parser.epilog = argparse.RawDescriptionHelpFormatter, methods.help_text()
    arguments, rest = parser.parse_known_args(argv)
    if arguments.json and not arguments.describe:
        raise Refusal("--json goes with --describe; leave it out, or add --describe --config …")
    rest = methods.check(arguments, rest)
    if rest and not (arguments.describe and arguments.config):
        near = difflib.get_close_matches(rest[0].partition("=")[0], OPTIONS, n=1, cutoff=0.0)
        raise Refusal(f"unknown option {rest[0]}; the nearest is {near[0]} (search.py --help lists all)")
    if arguments.alpha != "auto":
        try:
            alpha = float(arguments.alpha)
        except ValueError:
            alpha = -1.0
        if not 0 < alpha < math.inf:
            raise Refusal(f"--alpha is {arguments.alpha!r}; write auto or a positive number")
    if not 0 < arguments.time_limit < math.inf:
        raise Refusal(f"--time-limit is {arguments.time_limit:g}; write a positive number of seconds")
    return arguments, rest


def newest_run(root: Path = Path("runs")) -> Path:
    """The folder under runs/ whose importance.json is newest. Raises Refusal where there is none."""
    files = sorted(root.rglob("importance.json"), key=lambda path: path.stat().st_mtime)
    if not files:
        raise Refusal(f"no run under {root}/ has an importance.json; train one, or give --workdir or --importance")
    return files[-1].parent


def check_out(out: Path, read: Sequence[Path | None]) -> None:
    """Raises Refusal for a place where no policy can be written, or where it would replace a file that is read."""
    if out.is_dir():
        raise Refusal(f"--out {out} is a folder; name a file, e.g. --out {out / 'policy.json'}")
    if any(path is not None and path.exists() and out.exists() and out.samefile(path) for path in read):
        raise Refusal(f"--out {out} would replace a file that this search reads; give another --out")
    above = next((parent for parent in out.parents if parent.exists()), None)
    if above is not None and not above.is_dir():
        raise Refusal(f"--out {out} cannot be written: {above} is no folder; give another --out")


def describe(arguments: argparse.Namespace, overrides: Sequence[str]) -> None:
    if arguments.config is None:
        raise Refusal("--describe needs --config, e.g. --config configs/digits.py")
    from mpq_jax import config as config_lib
    from mpq_jax import costs

    config = config_lib.load(arguments.config, overrides)
    from mpq_jax.build import layer_table

    layers = layer_table(config)
    print(json.dumps(costs.describe(layers)) if arguments.json else costs.describe_text(layers))


def search(arguments: argparse.Namespace) -> None:
    from mpq_jax import costs
    from mpq_jax import importance as importances
    from mpq_jax.policy import save_policy

    for text in arguments.budget:
        costs.check_text(text)
    path = arguments.importance
    if path is None:
        workdir = arguments.workdir
        if workdir is None:
            workdir = newest_run()
            print(f"run: {workdir} (the newest)")
        path = workdir / "importance.json"
        if not path.exists():
            raise Refusal(
                f"{path} does not exist; finish joint training with: python train.py --config … --workdir {workdir}"
            )
    elif arguments.workdir is not None:
        raise Refusal("--workdir and --importance both name a table; give one of them")
    out = arguments.out or path.parent / "policy.json"
    check_out(out, (path, arguments.latency))
    importance = importances.load_importance(path)
    latency = costs.load_latency(arguments.latency) if arguments.latency else None
    budgets = costs.parse_budgets(
        arguments.budget, importance.layers, importance.bit_widths, importance.activation_bit_widths, latency
    )
    if arguments.method != "ilp":
        from mpq_jax.search import run

        return run.command(arguments, path, importance, budgets, out)
    importance, outliers = importances.repair(importance)
    for layer, kind, bits in outliers:
        print(f"repaired: {kind} importance of {layer} at {bits} bits lay below that of more bits")
    alpha = None if arguments.alpha == "auto" else float(arguments.alpha)
    if importance.pair is None:
        source = (
            "as given"
            if alpha is not None
            else "fitted in training"
            if importance.alpha is not None
            else "1: the file has none"
        )
        print(f"alpha: {alpha or importance.alpha or 1.0:g} ({source})")
    elif alpha is not None:
        raise Refusal(f"{path} holds a pair table, which has no alpha; leave --alpha out")
    # Only now: what can be refused has been.
    from mpq_jax.search import solve

    solution = solve(importance, budgets, alpha=alpha, time_limit=arguments.time_limit)
    try:
        save_policy(out, solution, importances.sha256(path))
    except OSError as error:
        raise Refusal(f"{out} cannot be written: {error.strerror}; give another --out") from None
    show(importance, budgets, solution, alpha, arguments.random)
    print(f"policy: {out}")


def show(importance, budgets, solution, alpha, count: int) -> None:
    """Prints bits per layer, what was achieved, and what stands beside it."""
    import numpy as np

    from mpq_jax import costs
    from mpq_jax.importance import reversed_importance, total
    from mpq_jax.search import best_uniform, random_policies, solve

    width = max(len(layer.path) for layer in importance.layers)
    print(f"\n{'layer':{width}}  bits    {'params':>11}  {'BitOps':>10}")
    for layer in importance.layers:
        bits = solution.policy[layer.path]
        fixed = "" if layer.searched else "  fixed"
        cost = costs.human(costs.layer_bitops(layer, bits), "BitOps")
        print(f"{layer.path:{width}}  W{bits.w}A{bits.a:<4} {layer.params:11,}  {cost:>10}{fixed}")
    print()
    for budget in budgets:
        spent, limit = solution.used[budget.name]
        print(
            f"{budget.text}: {costs.human(spent, budget.unit)} of {costs.human(limit, budget.unit)} "
            f"({100 * spent / limit:.2f} %)"
        )
    print(
        f"objective {solution.objective:.6g}, bound {solution.bound:.6g}: {solution.status} "
        f"({solution.solver}, {solution.seconds:.3f} s)"
    )
    print("\nimportance of others within the same budgets:")
    uniform = best_uniform(importance, budgets, alpha)
    if uniform is None:
        print("  best uniform   none fits")
    else:
        print(f"  best uniform   {total(importance, uniform[1], alpha):.6g}  ({uniform[0]})")
    others = random_policies(importance, budgets, count)
    if others:
        values = [total(importance, other, alpha) for other in others]
        print(f"  random         {np.mean(values):.6g}  (mean of {len(values)} within 2 % of {budgets[0].text})")
    elif count > 0:
        print(f"  random         none found within 2 % of {budgets[0].text}")
    try:
        wrong = solve(reversed_importance(importance), budgets, alpha=alpha, time_limit=10.0)
        print(f"  reversed       {total(importance, wrong.policy, alpha):.6g}  (important layers get fewer bits)")
    except Refusal:
        print("  reversed       none found")


def main(argv: Sequence[str] | None = None) -> int:
    try:
        arguments, rest = parse(argv)
        if arguments.describe:
            describe(arguments, rest)
        else:
            if not arguments.budget:
                raise Refusal("no budget given; write e.g. --budget bitops=W3A4")
            search(arguments)
    except Refusal as refusal:
        print(f"error: {refusal}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
