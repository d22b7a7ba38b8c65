"""The searches that measure policies, from the command's options to a Solution. JAX is imported where one is run."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mpq_jax import costs, lock
from mpq_jax import policy as policies
from mpq_jax.files import write_json
from mpq_jax.importance import layer_to_json, sha256
from mpq_jax.search.journal import Ended, Evaluation, Journal, Outcome
from mpq_jax.search.methods import Measuring
from mpq_jax.search.others import best_uniform
from mpq_jax.search.problem import Problem, build, check_reachable
from mpq_jax.search.show import achieved, table, written
from mpq_jax.types import Budget, Importance, Policy, QuantizedModel, Refusal, Solution

Evaluate = Callable[[Policy], Outcome]


def command(arguments: Any, source: Path, importance: Importance, budgets: Sequence[Budget], out: Path) -> None:
    """What search.py does for a method that measures. source: the importance.json of the run."""
    found, measured, evaluate = find(
        arguments.method,
        source.parent,
        importance,
        budgets,
        arguments.settings,
        seed=arguments.seed,
        evaluations=arguments.evaluations,
        seconds=arguments.seconds,
    )
    before = policies.replaced(out, found)
    try:
        policies.save_policy(out, found, sha256(source))
    except OSError as error:
        raise Refusal(f"{out} cannot be written: {error.strerror}; give another --out") from None
    show(importance, budgets, found, measured, evaluate)
    print(written(out, before))


def find(
    method: str,
    workdir: Path,
    importance: Importance,
    budgets: Sequence[Budget],
    settings: Any,
    *,
    seed: int = 0,
    evaluations: int | None = None,
    seconds: float | None = None,
) -> tuple[Solution, Outcome, Evaluate]:
    """Runs a method on a finished run. -> (solution, what it measured, the function that measures)

    importance: the run's table; its layers, candidates and rules are used, its numbers are not.
    evaluations, seconds: when to stop; None: as the method's settings say.
    Everything is kept under <workdir>/search_<method>/<request>/, where the same request goes on after a kill: the same
    settings, seed, budgets, layers and rules. Evaluations may differ, and seconds, but for those that train theta.
    """
    if method == "autoq":
        costs.check_by_channel(budgets)
    problem = build(importance, budgets)
    check_reachable(problem, budgets)
    folder = workdir / f"search_{method}" / _request(method, importance, budgets, settings, seed, seconds)
    # Only now: what can be refused has been.
    from mpq_jax.search import measure

    bench = measure.open_bench(workdir, settings)
    _check_table(importance, bench.run.model, workdir)
    evaluate = measure.evaluator(bench)
    request = {"method": method, "seed": seed, "settings": dataclasses.asdict(settings)}
    with lock.only_one(folder):
        write_json(
            folder / "search.json",
            {"format": "mpq-search", "version": 1, **request, "budgets": {b.text: b.limit for b in budgets}},
        )
        journal = Journal(folder / "evaluations.jsonl", importance, budgets, evaluate, evaluations, seconds)
        _run(method, problem, journal, settings, seed, bench)
    best = best_of(method, journal.evaluated)
    return solution(method, budgets, best, journal.elapsed), best.measured, evaluate


def _check_table(importance: Importance, model: QuantizedModel, workdir: Path) -> None:
    """Raises Refusal for a table that asks for what the run's model does not have."""
    layers = {layer.path: layer for layer in model.layers}
    for layer in importance.layers:
        own = layers.get(layer.path)
        if own is None or own.searched != layer.searched or own.bits != layer.bits:
            raise Refusal(
                f"the importance has layer {layer.path!r} otherwise than the model of {workdir}; take that run's table"
            )
        for kind, widths, asked in (
            ("weight", model.bit_widths, importance.bit_widths),
            ("activation", model.activation_bit_widths, importance.activation_bit_widths),
        ):
            odd = set(layer.candidates(kind, asked)) - set(own.candidates(kind, widths)) if layer.searched else ()
            if odd:
                raise Refusal(
                    f"the importance has layer {layer.path!r} at {min(odd)} {kind} bits, which the model of {workdir} was not "
                    "trained at; take that run's table"
                )


def _run(method: str, problem: Problem, journal: Journal, settings: Any, seed: int, bench: Any) -> None:
    if method in ("haq", "autoq") and not bench.run.has_accuracy:
        raise Refusal(
            f"--method {method} is rewarded by accuracy, and the model's task calls nothing right; give its FloatModel a "
            "correct=…, or take evolution, gumbel or edmips"
        )
    try:
        if method == "evolution":
            from mpq_jax.search.evolution import evolve

            evolve(problem, journal, settings, seed)
        elif method == "haq":
            from mpq_jax.search import features, haq

            states = features.row_features(problem, bench.run.model, bench.variables, *bench.call)
            haq.search(problem, journal, settings, seed, states, bench.float_accuracy)
        elif method == "autoq":
            from mpq_jax.search import autoq, features

            states = features.row_features(problem, bench.run.model, bench.variables, *bench.call)
            spreads = features.channel_spreads(problem, bench.run.model, bench.variables, *bench.call)
            autoq.search(problem, journal, settings, seed, states, spreads, bench.float_accuracy)
        else:
            from mpq_jax.search import gumbel

            gumbel.search(method, problem, journal, settings, seed, bench)
    except Ended:
        return


def best_of(method: str, evaluated: Sequence[Evaluation]) -> Evaluation:
    """The evaluation that a method chooses: of least loss; for those that are rewarded by accuracy, of most accuracy."""
    if method in ("haq", "autoq"):
        # What is not a number is some class's, and right as often as that.
        return min(evaluated, key=lambda e: (not np.isfinite(e.measured.loss), -e.measured.accuracy, e.measured.loss))
    return min(evaluated, key=lambda e: e.measured.loss)


def solution(method: str, budgets: Sequence[Budget], best: Evaluation, seconds: float) -> Solution:
    """What a method chose, as policy.json holds it: the objective is the measured loss, nothing is proved."""
    if not np.isfinite(best.measured.loss):
        raise Refusal(
            "no policy within the budgets gave a finite loss; train the joint model longer, or allow more bits"
        )
    return Solution(
        policy=best.policy,
        objective=best.measured.loss,
        bound=None,
        status="feasible",
        solver=method,
        seconds=seconds,
        used={b.name: (costs.shown(b, best.cost[b.name]), costs.shown(b, b.limit)) for b in budgets},
    )


def _request(
    method: str,
    importance: Importance,
    budgets: Sequence[Budget],
    settings: Measuring,
    seed: int,
    seconds: float | None,
) -> str:
    """A folder's name: what the search's result depends on."""
    asked = {
        # Other methods only stop earlier; theta trained for another time is another theta.
        "seconds": seconds if method in ("gumbel", "edmips") else None,
        "method": method,
        "settings": dataclasses.asdict(settings),
        "seed": seed,
        "budgets": {b.name: [b.limit, hashlib.sha256(b.table.tobytes()).hexdigest()] for b in budgets},
        "layers": [layer_to_json(layer) for layer in importance.layers],
        "bit_widths": [importance.bit_widths, importance.activation_bit_widths],
        "rules": importance.rules,
    }
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:12]


# ---- what is shown ------------------------------------------------------------------------------------------------


def show(
    importance: Importance, budgets: Sequence[Budget], found: Solution, measured: Outcome, evaluate: Evaluate
) -> None:
    """Prints bits per layer, what was achieved, and the best uniform policy measured beside it."""
    print(f"\n{table(importance, found.policy)}\n")
    print(achieved(budgets, found.used))
    seconds = f"({found.solver}, {found.seconds:.1f} s)"
    print(f"validation loss {_shown(measured)}: {found.status}, nothing is proved {seconds}")
    uniform = best_uniform(importance, budgets)
    if uniform is None:
        print("no uniform policy fits")
    else:
        beside = evaluate(uniform[1])
        print(f"the best uniform policy that fits, {uniform[0]}: loss {_shown(beside)}")


def _shown(measured: Outcome) -> str:
    accuracy = "" if np.isnan(measured.accuracy) else f", accuracy {measured.accuracy:.2%}"
    return f"{measured.loss:.6g}{accuracy}"
