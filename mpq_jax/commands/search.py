"""What mpq-search does with its options (search_options.py): tables in, a policy, a frontier or a check out."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mpq_jax.command_line import command
from mpq_jax.commands.search_options import parse
from mpq_jax.files import check_out
from mpq_jax.types import Refusal
from mpq_jax.workdir import importance_of

FRONTIER = ("frontier.json", "frontier.png")


class Table(NamedTuple):
    """What is searched: the importance, the file that it came from, and the alpha that was asked for."""

    importance: Any
    path: Path
    alpha: float | None


def newest_run(root: Path = Path("runs")) -> Path:
    """The folder under runs/ whose importance table is newest. Raises Refusal where there is none."""
    files = sorted(root.rglob("importance*.json"), key=lambda path: path.stat().st_mtime)
    if not files:
        raise Refusal(f"no run under {root}/ has an importance table; train one, or give --workdir or --importance")
    return files[-1].parent


# ---- tables -------------------------------------------------------------------------------------------------------


def importance_path(arguments: argparse.Namespace, overrides: Sequence[str]) -> Path:
    """The importance.json to search; what --import-limpq and --criterion make is made first."""
    if arguments.import_limpq is not None:
        return import_limpq(arguments, overrides)
    if arguments.importance is not None:
        return arguments.importance
    workdir = arguments.workdir
    if workdir is None:
        workdir = newest_run()
        print(f"run: {workdir} (the newest)")
    from mpq_jax.criteria import files as criteria

    learned = workdir / "importance.json"
    if arguments.method != "ilp":
        # Such a search reads the layers of a table, not the numbers, and measures policies on the joint model.
        if learned.is_file():
            return learned
        if not (workdir / "joint").is_dir():
            raise Refusal(
                f"{workdir} has no joint model (its folder joint/ is not there), which --method {arguments.method} measures "
                f"policies on; train it with: python train.py --config … --workdir {workdir}"
            )
    if arguments.criterion is None and not (workdir / "config.json").is_file():
        if not learned.is_file():
            raise Refusal(
                f"{workdir} holds no run and no importance.json; train one with: python train.py --config … --workdir "
                f"{workdir}, or give another --workdir"
            )
        return learned
    name = arguments.criterion or criteria.default(workdir)
    near = criteria.near(name, arguments.budget)
    if arguments.criterion is None:
        other = name != "learned" and learned.is_file()
        print(f"criterion: {name}" + (" (LIMPQ's learned step sizes: --criterion learned)" if other else ""))
    try:
        return criteria.ensure(workdir, name, [*near, *overrides])
    except Refusal as refusal:
        if arguments.criterion is not None:
            raise
        advice, table = [str(refusal)], criteria.path_of(workdir, name)
        if table.is_file():
            advice.append(f"search the table that is there: --importance {table}")
        if learned.is_file() and name != "learned":
            advice.append("search the learned step sizes: --criterion learned")
        raise Refusal("; or ".join(advice)) from None


def checked_path(arguments: argparse.Namespace, overrides: Sequence[str]) -> Path:
    """The importance.json that --check takes: the one in the run that the policy was found with, unless one is named."""
    if arguments.importance is None and arguments.import_limpq is None and arguments.criterion is None:
        arguments.workdir = arguments.workdir or newest_run()
        path = importance_of(arguments.workdir, arguments.policy)
        print(f"importance: {path}")
        return path
    return importance_path(arguments, overrides)


def load_table(arguments: argparse.Namespace, path: Path) -> Table:
    """Reads the table, binds the rules to it, settles alpha."""
    from mpq_jax.importance import load_importance
    from mpq_jax.search.constraints import check_search_rules

    importance = load_importance(path)
    rules = (*importance.rules, *arguments.rule)
    check_search_rules(rules, importance)
    alpha = None if arguments.alpha == "auto" else float(arguments.alpha)
    if importance.pair is not None:
        if alpha is not None:
            raise Refusal(f"{path} holds a pair table, which has no alpha; leave --alpha out")
    elif arguments.method == "ilp":
        fitted = "of the table" if importance.alpha is not None else "1: the file has none"
        print(f"alpha: {alpha or importance.alpha or 1.0:.4g} ({'as given' if alpha is not None else fitted})")
    if rules:
        print(f"rules: {'; '.join(rules)}")
    importance = importance._replace(rules=rules)
    if arguments.psd:
        from mpq_jax.search.psd import projected

        importance, alpha = projected(importance, alpha), None
        print("projected to a positive semi-definite form: objectives are not those of the table")
    return Table(importance, path, alpha)


def repaired(table: Table) -> Table:
    """The table without outliers (harm that falls when bits are taken away), which are named."""
    from mpq_jax.importance import repair

    importance, outliers = repair(table.importance)
    for layer, kind, bits in outliers:
        print(f"repaired: {kind} importance of {layer} at {bits} bits lay below that of more bits")
    return table._replace(importance=importance)


def parse_budgets(arguments: argparse.Namespace, importance, texts: Sequence[str]):
    """`costs.parse_budgets` for this table, with the measured latencies of --latency."""
    from mpq_jax import costs

    latency = costs.load_latency(arguments.latency) if arguments.latency else None
    return costs.parse_budgets(
        texts, importance.layers, importance.bit_widths, importance.activation_bit_widths, latency
    )


def import_limpq(arguments: argparse.Namespace, overrides: Sequence[str]) -> Path:
    """Makes an importance.json of LIMPQ's own indicators. -> where it is: beside them, or --out where nothing else is asked

    Raises Refusal where they are not those of the config's model.
    """
    from mpq_jax import config as config_lib
    from mpq_jax import limpq
    from mpq_jax.importance import load_importance, save_importance

    indicators = limpq.read(arguments.import_limpq)
    config = config_lib.load(arguments.config, overrides)
    importance, ignored = limpq.to_importance(indicators, config, str(arguments.import_limpq))
    for name in ignored:
        print(f"not searched here, its indicators are left aside: {name}")
    path = arguments.import_limpq.with_name("importance.json")
    if arguments.out is not None and not (arguments.budget or arguments.frontier or arguments.check):
        path = arguments.out
    check_out(path, (arguments.import_limpq,))
    if path != arguments.out and path.exists() and load_importance(path).criterion != importance.criterion:
        raise Refusal(
            f"{path} is another table, of a run it seems; put {arguments.import_limpq.name} in a folder of its own"
        )
    save_importance(path, importance)
    print(f"importance of {sum(layer.searched for layer in importance.layers)} layers: {path}")
    return path


# ---- what can be asked --------------------------------------------------------------------------------------------


def answer_describe(arguments: argparse.Namespace, overrides: Sequence[str]) -> None:
    """Prints layers, and what uniform policies cost: nothing is trained, and no data are read but a user's own."""
    if arguments.config is None and arguments.model is None:
        raise Refusal(
            "--describe needs --config, e.g. --config configs/digits.py, or --model my_package.module:factory"
        )
    from mpq_jax import config as config_lib
    from mpq_jax import costs

    config = config_lib.load(arguments.config, overrides)
    from mpq_jax.build import layer_table

    layers = layer_table(config)
    print(json.dumps(costs.describe(layers)) if arguments.json else costs.describe_text(layers))


def answer_search(arguments: argparse.Namespace, overrides: Sequence[str]) -> None:
    """One policy for the budgets, and the frontier if asked."""
    from mpq_jax import costs

    for text in arguments.budget:
        costs.check_text(text)
    path = importance_path(arguments, overrides)
    if not (arguments.budget or arguments.frontier):
        return
    out = arguments.out or path.parent / "policy.json"
    check_out(out, (path, arguments.latency))
    if arguments.frontier and out.name in FRONTIER:
        raise Refusal(f"--out {out} is where the frontier is written; name another file")
    if arguments.report:
        check_out(arguments.report, (path, arguments.latency, out), "--report")
    table = load_table(arguments, path)
    budgets = parse_budgets(arguments, table.importance, arguments.budget) if arguments.budget else []
    if arguments.method != "ilp":
        from mpq_jax.search import run

        return run.command(arguments, path, table.importance, budgets, out)
    if budgets:
        check_budgets(table, budgets, walked=arguments.frontier is not None)
    # Only now: what can be refused has been.
    table = repaired(table)
    chosen = write_policy(arguments, table, budgets, out) if budgets else None
    found = write_frontier(arguments, table, budgets, out.parent, chosen) if arguments.frontier else None
    if arguments.report:
        write_page(arguments.report, table, budgets, chosen, found)


def check_budgets(table: Table, budgets, walked: bool) -> None:
    """Refuses a budget that no policy keeps, before anything slow is imported or written."""
    from mpq_jax.search.frontier import check_walkable
    from mpq_jax.search.problem import build, check_reachable

    if walked:
        check_walkable(budgets[0])
    check_reachable(build(table.importance, budgets, table.alpha), budgets)


def write_policy(arguments: argparse.Namespace, table: Table, budgets, out: Path):
    """Searches, writes policy.json, and prints it beside others. -> the Solution. Raises Refusal as `search.solve` does."""
    from mpq_jax import importance as importances
    from mpq_jax.policy import replaced, save_policy
    from mpq_jax.search import show, solve

    solution = solve(table.importance, budgets, alpha=table.alpha, time_limit=arguments.time_limit)
    before = replaced(out, solution)
    try:
        save_policy(out, solution, importances.sha256(table.path))
    except OSError as error:
        raise Refusal(f"{out} cannot be written: {error.strerror}; give another --out") from None
    print(f"\n{show.table(table.importance, solution.policy)}\n")
    print(show.achieved(budgets, solution.used))
    print(f"{show.certificate(solution)}\n")
    print(show.beside(table.importance, budgets, table.alpha, arguments.random))
    print(show.written(out, before))
    return solution


def write_frontier(arguments: argparse.Namespace, table: Table, budgets, folder: Path, chosen):
    """Walks the first budget's limit; writes frontier.json and frontier.png. chosen: a Solution to mark, or None."""
    from mpq_jax.importance import sha256
    from mpq_jax.search import frontier as frontiers
    from mpq_jax.search import show

    # Without a budget the frontier is that of BitOps; the text only names the kind, its limit is walked.
    walked = budgets or parse_budgets(arguments, table.importance, ["bitops=W8A8"])
    found = frontiers.frontier(
        table.importance, walked, arguments.frontier, alpha=table.alpha, time_limit=arguments.time_limit
    )
    print(f"\n{show.frontier_table(found)}")
    files = [folder / name for name in FRONTIER]
    try:
        frontiers.save_frontier(files[0], found, sha256(table.path))
        frontiers.draw_frontier(files[1], found, chosen)
    except OSError as error:
        raise Refusal(f"{folder} cannot be written to: {error.strerror}; give another --out") from None
    print(f"frontier: {files[0]}, {files[1]}")
    return found


def write_page(path: Path, table: Table, budgets, solution, found) -> None:
    """The search as one HTML file. found: the frontier, where it was asked for."""
    from mpq_jax import report
    from mpq_jax.files import write_text

    alpha = table.alpha if table.alpha is not None else table.importance.alpha
    made = report.searched(table.path, table.importance._replace(alpha=alpha), budgets, solution, found)
    try:
        write_text(path, report.html(made))
    except OSError as error:
        raise Refusal(f"{path} cannot be written: {error.strerror}; give another --report") from None
    print(f"report: {path}")


def answer_check(arguments: argparse.Namespace, overrides: Sequence[str]) -> int:
    """What --policy costs and loses. -> exit code: 0, or 1 where it breaks a budget or a rule"""
    from mpq_jax import costs
    from mpq_jax.files import read_json
    from mpq_jax.policy import MADE_BY, load_policy
    from mpq_jax.search import show
    from mpq_jax.search.check import check

    for text in arguments.budget:
        costs.check_text(text)
    table = repaired(load_table(arguments, checked_path(arguments, overrides)))
    importance = table.importance
    policy = load_policy(arguments.policy, importance.layers, importance.bit_widths, importance.activation_bit_widths)
    budgets = parse_budgets(arguments, importance, arguments.budget) if arguments.budget else []
    if not budgets:
        saved = read_json(arguments.policy, "mpq-policy", 1, MADE_BY).get("budgets")
        limits = costs.saved_limits(saved, str(arguments.policy))
        if "latency" in limits and not arguments.latency:
            raise Refusal(
                f"{arguments.policy} was found within a latency, which needs its table to be checked; add --latency "
                "latency.json, or name other budgets with --budget"
            )
        latency = costs.load_latency(arguments.latency) if arguments.latency else None
        budgets = costs.restore_budgets(limits, importance, latency)
    if not budgets:
        spent = {"bitops": costs.bitops(importance.layers, policy), "size": costs.size(importance.layers, policy)}
        budgets = costs.restore_budgets(spent, importance)
        print("no budgets given, and none in the policy: compared within what it costs itself")
    result = check(importance, policy, budgets, alpha=table.alpha, time_limit=arguments.time_limit)
    print(f"\n{show.table(importance, policy)}\n")
    print(show.check_text(budgets, result))
    return 1 if result.over or result.broken else 0


@command
def main(argv: Sequence[str] | None = None) -> int:
    """search.py: searches, or with --describe or --check answers without a search. -> exit code"""
    arguments, rest = parse(argv)
    if arguments.describe:
        answer_describe(arguments, rest)
    elif arguments.check:
        return answer_check(arguments, rest)
    else:
        answer_search(arguments, rest)
    return 0
