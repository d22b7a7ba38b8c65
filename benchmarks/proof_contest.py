"""The proof's stages in which contestants choose a policy at every budget, and are fine-tuned alike."""

import itertools
import time
from collections.abc import Sequence

from benchmarks import cheaper
from benchmarks.proof_lines import COMBINED, THIRDS, as_lists, as_policy, best_uniform, digest
from benchmarks.proof_run import SAMPLED, SEARCHES, Bench, held, of_either, tuner
from benchmarks.proof_tables import combined_table, pairs_of, sampled_table, table_of
from mpq_jax import costs, data, importance, joint, stages
from mpq_jax.criteria import CRITERIA, files
from mpq_jax.criteria.learned import learned
from mpq_jax.search import methods, random_policies, run, solve
from mpq_jax.search.others import fits, uniform_policies
from mpq_jax.types import Bits, Budget, Importance


def search(bench: Bench) -> None:
    """What the searches that measure policies choose."""
    for name, method in itertools.product(bench.settings.budgets, SEARCHES):
        if method not in bench.settings.contestants or f"chosen {name} {method}" in bench.lines:
            continue
        table, budgets = bench.budgets(name)
        mine = [word for word in bench.settings.search if word.startswith(f"--{method}.")]
        began = time.perf_counter()
        solution, _, _ = run.find(
            method, bench.workdir, table, budgets, methods.settings(method, mine), seed=bench.seed
        )
        bench.lines.add(
            f"chosen {name} {method}",
            policy=as_lists([solution.policy], table)[0],
            seconds=time.perf_counter() - began,
            used=costs.used(budgets[0], solution.policy, table) / budgets[0].limit,
        )


def sliced(bench: Bench) -> None:
    """What the default joint training chooses, with slices of the batch: of the same float model and calibration.

    Its policies are fine-tuned from the run's own joint model, as everyone's are.
    """
    if all(f"chosen {name} sliced" in bench.lines for name in bench.settings.budgets):
        return
    run_, state, _, _ = cheaper.train(bench, "slices")
    log = stages.measured_rows(run_, state, run_.config.joint.alpha_policies)
    own, _ = importance.repair(learned(run_.model, joint.row_variables(state, 0, averaged=True), log))
    for name in bench.settings.budgets:
        table, budgets = bench.budgets(name)
        choice = solve(own._replace(rules=table.rules), budgets).policy
        used = costs.used(budgets[0], choice, table) / budgets[0].limit
        bench.lines.add(f"chosen {name} sliced", policy=as_lists([choice], table)[0], used=used, alpha=own.alpha)


def uniforms(table: Importance, budgets: Sequence[Budget]) -> dict[str, dict[str, Bits]]:
    """{"uniform W2A3": policy, ...}: the uniform policies that fit and that no other one that fits has all the bits of.

    The best of them, by its validation loss after fine-tuning, is what everyone else has to beat.
    """
    searched = [layer.path for layer in table.layers if layer.searched]
    fitting = {each[searched[0]]: each for _, each in uniform_policies(table) if fits(each, budgets, table)}
    return {
        f"uniform W{w}A{a}": fitting[w, a]
        for w, a in fitting
        if not any((v, b) != (w, a) and v >= w and b >= a for v, b in fitting)
    }


def chosen(bench: Bench, budget: str, name: str) -> list[list[int]]:
    """The policy of one contestant."""
    key = f"chosen {budget} {name}"
    if key in bench.lines:
        return bench.lines[key]["policy"]
    table, budgets = bench.budgets(budget)
    if name.startswith("uniform"):
        choice = uniforms(table, budgets)[name]
    elif name == "random":
        choice = random_policies(table, budgets, 1, seed=bench.seed)[0]
    else:
        if name in SAMPLED:
            pairs = pairs_of(bench.run.model, bench.run.variables, bench.run.example())
            own = sampled_table(bench.run.model, pairs, bench.lines, name, budget)
        elif name in COMBINED:
            own = combined_table(bench.workdir, name, budgets, bench.seed)
        else:
            own = table_of(bench.workdir, name)
        choice = solve(own._replace(rules=table.rules), budgets).policy
    used = costs.used(budgets[0], choice, table) / budgets[0].limit
    return bench.lines.add(key, policy=as_lists([choice], table)[0], used=used)["policy"]


def contestants(bench: Bench) -> list[tuple[str, str]]:
    """(budget, name) of all that have a table or a policy, uniform ones first: what the main question is about."""
    asked = bench.settings.budgets
    tasks = [(budget, name) for budget in asked for name in uniforms(*bench.budgets(budget))]
    for budget, name in itertools.product(asked, bench.settings.contestants):
        sources = [THIRDS.get(each, each) for each in COMBINED.get(name, (name,))]
        tables = all(each in CRITERIA and files.path_of(bench.workdir, each).exists() for each in sources)
        made = name in (*SAMPLED, "random") or tables
        if made or f"chosen {budget} {name}" in bench.lines:
            tasks.append((budget, name))
    return tasks


def accuracy(bench: Bench) -> None:
    """Every contestant, fine-tuned. Policies that two contestants agree on are fine-tuned once."""
    fine_tuned(bench, contestants(bench), bench.settings.finetune_steps, "finetuned")


def longer(bench: Bench) -> None:
    """Contestants and the best uniform policy, fine-tuned for longer."""
    fine_tuned(bench, asked_longer(bench), bench.settings.longer_steps, "longer")


def statistics(bench: Bench) -> None:
    """The same in two orders of the batches, with either statistics: those measured anew, or those it was trained to."""
    for order in (0, 1):
        tuned = tuner(bench, bench.settings.longer_steps, order=order)
        for budget, name in asked_longer(bench):
            bits = chosen(bench, budget, name)
            if (key := f"statistics {digest(bits)} {order}") in bench.lines:
                continue
            each = as_policy(bits, bench.table)
            bench.lines.add(key, steps=bench.settings.longer_steps, **of_either(bench, tuned(each), each))


def asked_longer(bench: Bench) -> list[tuple[str, str]]:
    """(budget, name) of the contestants, and of the uniform policies the one that was best after `accuracy`."""
    best = {budget: best_uniform(bench.lines.lines, budget) for budget in bench.settings.budgets}
    return [
        (budget, name)
        for budget, name in contestants(bench)
        if not name.startswith("uniform") or (best[budget] and name == f"uniform {best[budget][0]}")
    ]


def fine_tuned(bench: Bench, asked: Sequence[tuple[str, str]], steps: int, word: str) -> None:
    """The lines "WORD DIGEST": scores of the policies of (budget, name) after so many steps, with either statistics.

    Those re-estimated stand in the line itself, as they did before there were others; such a line is measured again.
    """
    test = held(data.eval_batches(bench.run.dataset, "test", bench.run.config.eval_batch_size))
    if "float" not in bench.lines:
        rows = stages.rows_of(bench.float_variables, 1)
        found = [bench.run.evaluate(bench.float_variables["params"], rows, None, batch) for batch in test]
        right, count = sum(int(one[1][0]) for one in found), sum(int(one[2]) for one in found)
        bench.lines.add("float", test_accuracy=right / count)
    tuned = tuner(bench, steps)
    for budget, name in asked:
        bits = chosen(bench, budget, name)
        key = f"{word} {digest(bits)}"
        if "running" in bench.lines.lines.get(key, {}):
            continue
        each = as_policy(bits, bench.table)
        found = of_either(bench, tuned(each), each, test)
        bench.lines.add(key, steps=steps, **found["restated"], running=found["running"])
        print(f"{bench.net} seed {bench.seed}: {budget} {name} {found['running']['test_accuracy']:.4f}", flush=True)
