"""Are the bits it chooses better than those anyone else would choose? What docs/results.md is made from.

  python -m benchmarks.proof --net resnet8 --seed 0 --stages learn random
  python -m benchmarks.proof_document            lines -> docs/results.md and its figures

A net and a seed are one run under <root>/<net>/seed<k>; every finished measurement is one JSON line of the run's
lines.jsonl, keyed by what it is of, and a second call goes on from there. Stages, each needing those before it:

  learn      float and joint training, as train.py does them
  random     random policies within 2 % of a budget: validation loss of the joint model, statistics re-estimated
  samples    many more of them, and some all over, on a few training batches: what regressions are fitted to
  tune       some of the random policies after a short fine-tuning: validation loss
  repeats    a few of those, each in two orders of the batches
  alone      depthwise and pointwise layers, one at a time at few bits: what they cost, and their step sizes
  criteria   the importance table of every criterion but those of stage hessian
  hessian    those of HAWQ and HAWQ-v2
  search     what evolution and DNAS choose at every budget
  predicted  what every table says of the random policies
  accuracy   every contestant at every budget, fine-tuned alike: validation and test loss and accuracy

Nothing is chosen on the test set: it is read after a policy has been chosen, by the tables that training images made.
"""

import dataclasses
import itertools
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.proof_lines import BUDGETS, LEVELS, PREDICTED, Lines, as_lists, as_policy, digest
from mpq_jax import build, command_line, costs, data, importance, joint, pipeline, policy, row_policies, stages
from mpq_jax import config as config_lib
from mpq_jax import workdir as workdirs
from mpq_jax.criteria import CRITERIA, files
from mpq_jax.criteria.compute import measure
from mpq_jax.criteria.coupling import coupled_pairs, searched_pairs
from mpq_jax.criteria.learned import RowLog, load_rows
from mpq_jax.search import methods, random_policies, run, solve
from mpq_jax.search.others import fits, uniform_policies
from mpq_jax.types import Bits, Budget, Importance, QuantizedModel

NETS = {
    "digits": "configs/digits.py",
    "resnet8": "configs/fashion_mnist_resnet8.py",
    "mobilenetv1": "configs/fashion_mnist_mobilenetv1.py",
}
HESSIAN = ("hawq", "hawq_v2")  # the criteria that take longest
SEARCHES = ("evolution", "gumbel")
PAIRS, ALONE = 5, (4, 2)  # stage alone: so many pairs of layers, at these bits
SAMPLED = ("sampled", "sampled_pairwise")  # regressions on the stage `samples`
FEWER = (30, 60, 120)
# Also of the loss, of policies all over, and of the first few policies.
TRIED = (*SAMPLED, "sampled_loss", "sampled_all", "sampled_all_loss", *(f"sampled_{count}" for count in FEWER))
CONTESTANTS = (
    *SAMPLED,
    *("random", "reversed", "initial", "constant", "power_law", "learned"),
    *("hawq", "hawq_v2", "mpqco", "output_fisher", "one_at_a_time", "regression", "regression_pairwise"),
    *SEARCHES,
)


@dataclasses.dataclass(frozen=True)
class Settings:
    """How much is measured."""

    policies: int = 60  # random ones near each budget of PREDICTED
    samples: int = 400  # policies near each of them that regressions are fitted to, and as many all over
    sample_batches: int = 8  # training batches of `sample_size` that those are measured on
    sample_size: int = 256
    tuned: int = 20  # of the random policies near each budget, fine-tuned
    tune_steps: int = 100
    repeated: int = 10  # of them, in two orders of the batches
    finetune_steps: int = 500
    max_draws: int = 100  # of the Hessian criteria
    rows: int = 4  # policies measured at once
    budgets: tuple[str, ...] = LEVELS  # of the stages search and accuracy
    contestants: tuple[str, ...] = CONTESTANTS  # beside uniform policies
    search: tuple[str, ...] = (
        *("--evolution.generations=5", "--evolution.population=30", "--evolution.top=10"),
        *("--evolution.mutations=15", "--evolution.crossovers=15", "--evolution.statistics_batches=10"),
        *("--gumbel.steps=200", "--gumbel.warmup_steps=50", "--gumbel.statistics_batches=10"),
    )


# ---- one run ------------------------------------------------------------------------------------------------------


class Bench(NamedTuple):
    """A trained run. table: its learned importance. start: variables after joint training, where fine-tuning begins.

    calibrated, float_variables: before joint training. statistics, validation, test: batches on the device.
    """

    net: str
    seed: int
    settings: Settings
    workdir: Path
    run: stages.Run
    table: Importance
    float_variables: Mapping[str, Any]
    calibrated: Mapping[str, Any]
    start: Mapping[str, Any]
    statistics: list[Any]
    validation: list[Any]
    lines: Lines

    def budgets(self, name: str) -> tuple[Importance, list[Budget]]:
        """The run's table with the budget's rules, and the budget."""
        text, rules = BUDGETS[name]
        table = self.table._replace(rules=(*self.table.rules, *rules))
        return table, costs.parse_budgets([text], table.layers, table.bit_widths, table.activation_bit_widths)


def open_bench(net: str, seed: int, root: Path, settings: Settings, overrides: Sequence[str]) -> Bench:
    """Trains what is not trained yet, and opens it."""
    config = dataclasses.replace(config_lib.load(NETS[net], overrides), seed=seed)
    workdir = root / net / f"seed{seed}"
    workdirs.claim(workdir, config, finetuning=False)
    if not (workdir / "importance.json").exists():
        pipeline.learn(config, workdir)
    opened = stages.open_run(config, workdir)
    float_variables = stages.pretrain(opened)
    calibrated = stages.calibrated(opened, float_variables)
    state, _ = stages.joint_train(opened, calibrated)
    table, _ = importance.repair(importance.load_importance(workdir / "importance.json"))
    stream = data.train_batches(opened.dataset, config.joint.batch_size, seed=1000 * seed + 500)
    return Bench(
        net,
        seed,
        settings,
        workdir,
        opened,
        table,
        float_variables,
        calibrated,
        pipeline.starts(opened, state, calibrated),
        held(itertools.islice(stream, config.statistics_batches)),
        held(data.eval_batches(opened.dataset, "validation", config.eval_batch_size)),
        Lines(workdir / "lines.jsonl"),
    )


def held(batches: Iterator[Any]) -> list[Any]:
    """Batches, on the device."""
    return [jax.device_put(batch) for batch in batches]


def restated(bench: Bench, variables: Mapping[str, Any], policies: Sequence[Mapping[str, Bits]]) -> tuple[Any, Any]:
    """(rows [P, ...] with statistics re-estimated for each policy, the policies as a stack)."""
    stacked = jax.tree.map(jnp.asarray, policy.stack(policies))
    rows = stages.rows_of(variables, len(policies))
    if "batch_stats" not in rows:
        return rows, stacked
    total = None
    for batch in bench.statistics:
        new = bench.run.statistics(variables["params"], rows, stacked, batch)
        total = new if total is None else jax.tree.map(jnp.add, total, new)
    return {**rows, "batch_stats": jax.tree.map(lambda x: x / len(bench.statistics), total)}, stacked


def scores(
    bench: Bench, variables: Mapping[str, Any], rows: Any, stacked: Any, batches: Sequence[Any]
) -> dict[str, list]:
    """Mean losses and accuracies of P policies on `batches`.

    "halves": mean losses over the even and over the odd batches, for the split-half reliability.
    """
    found = [bench.run.evaluate(variables["params"], rows, stacked, batch) for batch in batches]
    losses, right, counts = (
        np.array([np.asarray(part) for part in parts], np.float64) for parts in zip(*found, strict=True)
    )
    halves = [losses[i::2].sum(0) / max(counts[i::2].sum(), 1) for i in (0, 1)]
    return {
        "loss": (losses.sum(0) / counts.sum()).tolist(),
        "accuracy": (right.sum(0) / counts.sum()).tolist(),
        "halves": np.stack(halves, -1).tolist(),
    }


def measured(bench: Bench, variables: Mapping[str, Any], policies: Sequence[Mapping[str, Bits]]) -> dict[str, list]:
    """The policies' scores on the validation split."""
    return scores(bench, variables, *restated(bench, variables, policies), bench.validation)


def in_stacks(bench: Bench, policies: Sequence[Mapping[str, Bits]], function: Callable[..., Any]) -> list[Any]:
    """function(P policies), P always the same so that it compiles once, over all of them."""
    size, found = bench.settings.rows, []
    for start in range(0, len(policies), size):
        part = list(policies[start : start + size])
        found.append((len(part), function(part + [part[-1]] * (size - len(part)))))
    return found


# ---- stages -------------------------------------------------------------------------------------------------------


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


def random(bench: Bench) -> None:
    """Random policies near a budget: what predictions are compared with."""
    for name in PREDICTED:
        if f"random {name}" in bench.lines:
            continue
        table, budgets = bench.budgets(name)
        policies = random_policies(table, budgets, bench.settings.policies, seed=10_000 + bench.seed)
        parts = in_stacks(bench, policies, lambda part: measured(bench, bench.start, part))
        joined = {
            field: [value for count, part in parts for value in part[field][:count]]
            for field in ("loss", "accuracy", "halves")
        }
        bench.lines.add(f"random {name}", policies=as_lists(policies, table), **joined)


def samples(bench: Bench) -> None:
    """Policies near the budgets and all over, on the same training batches, with those batches' own statistics.

    "loss": mean loss. "divergence": mean KL divergence of the float model's answers from the policy's.
    """
    run_, settings, task = bench.run, bench.settings, joint.classification()
    stream = data.train_batches(run_.dataset, settings.sample_size, seed=1000 * bench.seed + 600)
    batches = held(itertools.islice(stream, settings.sample_batches))

    @jax.jit
    def harm(variables, float_variables, policies, batch):
        teacher = jax.nn.log_softmax(run_.model.apply(float_variables, None, *task.inputs(batch), **task.eval_kwargs))

        def row(each):
            outputs, _ = run_.model.apply(
                variables, each, *task.inputs(batch), mutable=["batch_stats"], **task.train_kwargs
            )
            mine = jax.nn.log_softmax(outputs)
            return task.loss(outputs, batch), (jnp.exp(teacher) * (teacher - mine)).sum(-1).mean()

        return jax.vmap(row)(policies)

    def over_batches(part):
        stacked = jax.tree.map(jnp.asarray, policy.stack(part))
        found = [harm(bench.start, bench.float_variables, stacked, batch) for batch in batches]
        return np.array([[np.asarray(x) for x in one] for one in found]).mean(0)  # [2, P]

    for name in (*PREDICTED, "all"):
        key = f"samples {name}"
        if key in bench.lines:
            continue
        table, budgets = bench.budgets(name if name != "all" else "W3A3")
        seed = 20_000 + bench.seed
        if name == "all":
            drawn = row_policies.random_rows(
                jax.random.key(seed), run_.model.layers, table.bit_widths, table.activation_bit_widths, settings.samples
            )
            arrays = {path: (np.asarray(bits.w), np.asarray(bits.a)) for path, bits in drawn.items()}
            policies = [
                {path: Bits(int(w[i]), int(a[i])) for path, (w, a) in arrays.items()} for i in range(settings.samples)
            ]
        else:
            policies = random_policies(table, budgets, settings.samples, seed=seed, within=0.05)
        parts = in_stacks(bench, policies, over_batches)
        loss, divergence = np.concatenate([found[:, :count] for count, found in parts], axis=1)
        bench.lines.add(key, policies=as_lists(policies, table), loss=loss.tolist(), divergence=divergence.tolist())


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


def search(bench: Bench) -> None:
    """What the searches that measure policies choose."""
    for name, method in itertools.product(bench.settings.budgets, SEARCHES):
        if f"chosen {name} {method}" in bench.lines:
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
        else:
            own, _ = importance.repair(importance.load_importance(files.path_of(bench.workdir, name)))
        choice = solve(own._replace(rules=table.rules), budgets).policy
    used = costs.used(budgets[0], choice, table) / budgets[0].limit
    return bench.lines.add(key, policy=as_lists([choice], table)[0], used=used)["policy"]


def tuner(bench: Bench, steps: int, order: int = 0) -> Callable[[Mapping[str, Bits]], Mapping[str, Any]]:
    """tuned(policy) -> variables after `steps` of the run's fine-tuning, always on the same batches: those of `order`."""
    settings, model = bench.run.config.finetune, bench.run.model
    optimizer = stages.finetune_optimizer(model, settings, steps)
    task = joint.classification(settings.label_smoothing)
    step = stages.compile_step(joint.make_step(model, task, optimizer, dropout=model.variables is None))
    stream = data.train_batches(bench.run.dataset, settings.batch_size, seed=1000 * bench.seed + 700 + order)
    batches = held(itertools.islice(stream, steps))
    key = jax.random.key(bench.seed)

    def tuned(each: Mapping[str, Bits]) -> Mapping[str, Any]:
        policies = jax.tree.map(jnp.asarray, policy.stack([each]))
        state = jax.tree.map(jnp.copy, joint.init_state(bench.start, optimizer, 1))
        for batch in batches:
            state, _ = step(state, batch, key, policies)
        return joint.row_variables(state, 0)

    return tuned


def tune(bench: Bench) -> None:
    """Some of the random policies after a short fine-tuning."""
    tuned = None
    for name in PREDICTED:
        for number, bits in enumerate(bench.lines[f"random {name}"]["policies"][: bench.settings.tuned]):
            key = f"tuned {name} {number}"
            if key not in bench.lines:
                tuned = tuned or tuner(bench, bench.settings.tune_steps)
                each = as_policy(bits, bench.table)
                found = measured(bench, tuned(each), [each])
                bench.lines.add(key, **{field: value[0] for field, value in found.items()})


def repeats(bench: Bench) -> None:
    """The first of the random policies, fine-tuned in two orders of the batches: what fine-tuning itself adds."""
    for name, order in itertools.product(PREDICTED, range(2)):
        tuned = None
        for number, bits in enumerate(bench.lines[f"random {name}"]["policies"][: bench.settings.repeated]):
            if (key := f"repeat {name} {number} {order}") not in bench.lines:
                tuned = tuned or tuner(bench, bench.settings.tune_steps, order)
                each = as_policy(bits, bench.table)
                found = measured(bench, tuned(each), [each])
                bench.lines.add(key, **{field: value[0] for field, value in found.items()})


def accuracy(bench: Bench) -> None:
    """Every contestant, fine-tuned. Policies that two contestants agree on are fine-tuned once."""
    test = held(data.eval_batches(bench.run.dataset, "test", bench.run.config.eval_batch_size))
    if "float" not in bench.lines:
        rows = stages.rows_of(bench.float_variables, 1)
        found = [bench.run.evaluate(bench.float_variables["params"], rows, None, batch) for batch in test]
        right, count = sum(int(one[1][0]) for one in found), sum(int(one[2]) for one in found)
        bench.lines.add("float", test_accuracy=right / count)
    tuned = tuner(bench, bench.settings.finetune_steps)
    # Those that the main question is about first.
    asked = bench.settings.budgets
    tasks = [(budget, name) for budget in asked for name in uniforms(*bench.budgets(budget))]
    for budget, name in (*tasks, *itertools.product(asked, bench.settings.contestants)):
        made = name in (*SAMPLED, "random") or name.startswith("uniform")
        made = made or (name in CRITERIA and files.path_of(bench.workdir, name).exists())
        if not made and f"chosen {budget} {name}" not in bench.lines:
            continue
        bits = chosen(bench, budget, name)
        key = f"finetuned {digest(bits)}"
        if key in bench.lines:
            continue
        each = as_policy(bits, bench.table)
        variables = tuned(each)
        rows, stacked = restated(bench, variables, [each])
        validation, tested = (scores(bench, variables, rows, stacked, batches) for batches in (bench.validation, test))
        bench.lines.add(
            key,
            steps=bench.settings.finetune_steps,
            loss=validation["loss"][0],
            accuracy=validation["accuracy"][0],
            test_loss=tested["loss"][0],
            test_accuracy=tested["accuracy"][0],
        )
        print(f"{bench.net} seed {bench.seed}: {budget} {name} {tested['accuracy'][0]:.4f}", flush=True)


def alone(bench: Bench) -> None:
    """Each depthwise convolution and the pointwise one behind it, of the first pairs, alone at few bits.

    All other layers are at their widest (LIMPQ's figure 2, which has them in float). Joint model, no fine-tuning.
    """
    if "alone" in bench.lines:
        return
    table = bench.table
    assert table.weight is not None and table.activation is not None
    model, most = bench.run.model, max(table.bit_widths)
    widest = policy.uniform(model.layers, most, most, table.bit_widths, table.activation_bit_widths)
    paths = [path for pair in pipeline.depthwise_pairs(model)[:PAIRS] for path in pair]
    cases = [(path, bits) for path in paths for bits in ALONE]
    policies = [widest, *({**widest, path: Bits(bits, bits)} for path, bits in cases)]
    parts = in_stacks(bench, policies, lambda part: measured(bench, bench.start, part))
    loss, accuracy = (
        [value for count, part in parts for value in part[field][:count]] for field in ("loss", "accuracy")
    )
    searched = [layer.path for layer in table.layers if layer.searched]
    kinds = {path: spec.kind for spec in model.specs.values() for path in spec.paths}
    rows = [
        {
            "path": path,
            "kind": "depthwise" if kinds[path] == "depthwise" else "pointwise",
            "bits": bits,
            "weight": float(table.weight[searched.index(path), table.bit_widths.index(bits)]),
            "activation": float(table.activation[searched.index(path), table.activation_bit_widths.index(bits)]),
            "loss": loss[number],
            "accuracy": accuracy[number],
        }
        for number, (path, bits) in enumerate(cases, start=1)
    ]
    bench.lines.add("alone", rows=rows, loss=loss[0], accuracy=accuracy[0], others=most)


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
    for budget, name in itertools.product(PREDICTED, (*CRITERIA, *TRIED)):
        if f"predicted {budget} {name}" in lines or f"random {budget}" not in lines:
            continue
        if name in TRIED:
            table = sampled_table(model, given["pairs"], lines, name, budget)
        elif files.path_of(workdir, name).exists():
            table, _ = importance.repair(importance.load_importance(files.path_of(workdir, name)))
        else:
            continue
        policies = [as_policy(bits, table) for bits in lines[f"random {budget}"]["policies"]]
        lines.add(f"predicted {budget} {name}", values=[importance.total(table, each) for each in policies])


# ---- command ------------------------------------------------------------------------------------------------------

FUNCTIONS: Mapping[str, Callable[[Bench], None]] = {
    "learn": lambda bench: None,  # opening it has done it
    "random": random,
    "samples": samples,
    "tune": tune,
    "repeats": repeats,
    "alone": alone,
    "criteria": lambda bench: criteria(bench, [name for name in CRITERIA if name not in HESSIAN]),
    "hessian": lambda bench: criteria(bench, HESSIAN),
    "search": search,
    "predicted": lambda bench: predicted(bench.workdir),
    "accuracy": accuracy,
}


@command_line.command
def main(argv: Sequence[str] | None = None) -> int:
    parser = command_line.Parser("benchmarks.proof", __doc__)
    parser.add_argument("--net", required=True, choices=sorted(NETS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stages", nargs="+", choices=sorted(FUNCTIONS), default=list(FUNCTIONS))
    parser.add_argument("--root", type=Path, default=Path("runs/proof"))
    for field in dataclasses.fields(Settings):
        if isinstance(field.default, int):
            parser.add_argument(f"--{field.name}", type=int, default=field.default)
    parser.add_argument("--budgets", nargs="+", choices=list(BUDGETS), default=list(LEVELS))
    parser.add_argument("--contestants", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS))
    arguments, overrides = parser.parse_known_args(argv)
    mine = [word for word in overrides if word[2:].partition(".")[0] in SEARCHES]
    overrides = [word for word in overrides if word not in mine]
    numbers = {f.name: getattr(arguments, f.name) for f in dataclasses.fields(Settings) if f.name != "search"}
    settings = Settings(**numbers, search=(*Settings().search, *mine))
    began = time.perf_counter()
    bench = open_bench(arguments.net, arguments.seed, arguments.root, settings, overrides)
    for name in FUNCTIONS:
        if name in arguments.stages:
            FUNCTIONS[name](bench)
            print(f"{bench.net} seed {bench.seed}: {name}, {time.perf_counter() - began:.0f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
