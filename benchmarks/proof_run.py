"""One trained run of the proof: how much is measured, on what, and a policy's scores, as it is and after fine-tuning."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.proof_lines import BUDGETS, COMBINED, LEVELS, THIRDS, Lines
from mpq_jax import config as config_lib
from mpq_jax import costs, data, importance, joint, pipeline, policy, stages
from mpq_jax import workdir as workdirs
from mpq_jax.types import Bits, Budget, Importance

NETS = {
    "digits": "configs/digits.py",
    "resnet8": "configs/fashion_mnist_resnet8.py",
    "mobilenetv1": "configs/fashion_mnist_mobilenetv1.py",
}
SEARCHES = ("evolution", "gumbel", "edmips")  # gumbel: DNAS
SAMPLED = ("sampled", "sampled_pairwise")  # regressions on the stage `samples`
CONTESTANTS = (  # the default's joint training with slices of the batch is "sliced"
    *("learned", "sliced", "output_fisher", *THIRDS, "random", "reversed", "initial", "constant", "power_law"),
    *("hawq", "hawq_v2", "mpqco", "one_at_a_time", "regression", "regression_pairwise"),
    *COMBINED,
    *SAMPLED,
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
    repeated: int = 20  # of them, once more on other batches
    finetune_steps: int = 500
    longer_steps: int = 1000  # of the stage `longer`
    max_draws: int = 100  # of the Hessian criteria
    rows: int = 4  # policies measured at once
    budgets: tuple[str, ...] = LEVELS  # of the stages search and accuracy
    contestants: tuple[str, ...] = CONTESTANTS  # beside uniform policies
    search: tuple[str, ...] = (
        *("--evolution.generations=5", "--evolution.population=30", "--evolution.top=10"),
        *("--evolution.mutations=15", "--evolution.crossovers=15", "--evolution.statistics_batches=10"),
        *("--gumbel.steps=200", "--gumbel.warmup_steps=50", "--gumbel.statistics_batches=10"),
        "--edmips.statistics_batches=10",
    )


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
    # Whole batches: what cheaper joint training is measured against, and what all lines so far come from. Tables are a
    # stage of their own.
    fixed = ["--joint.slices=false", "--search.criterion=learned"]
    config = dataclasses.replace(config_lib.load(NETS[net], [*fixed, *overrides]), seed=seed)
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


def of_either(
    bench: Bench, variables: Mapping[str, Any], each: Mapping[str, Bits], test: Sequence[Any] = ()
) -> dict[str, dict[str, Any]]:
    """Scores of a policy that was fine-tuned: "restated", with statistics re-estimated, and "running", with its own.

    Of the validation split, "train_loss" of the batches of the statistics (what fine-tuning keeps has less of it), and
    "test_loss" and "test_accuracy" of the batches `test`.
    """
    rows, stacked = restated(bench, variables, [each])
    found = {}
    for word, stats in (("restated", rows), ("running", stages.rows_of(variables, 1))):

        def of(batches: Sequence[Any], stats: Any = stats) -> dict[str, Any]:
            return {name: one[0] for name, one in scores(bench, variables, stats, stacked, batches).items()}

        found[word] = {**of(bench.validation), "train_loss": of(bench.statistics)["loss"]}
        if test:
            tested = of(test)
            found[word] |= {f"test_{name}": tested[name] for name in ("loss", "accuracy")}
    return found


def in_stacks(bench: Bench, policies: Sequence[Mapping[str, Bits]], function: Callable[..., Any]) -> list[Any]:
    """function(P policies), P always the same so that it compiles once, over all of them."""
    size, found = bench.settings.rows, []
    for start in range(0, len(policies), size):
        part = list(policies[start : start + size])
        found.append((len(part), function(part + [part[-1]] * (size - len(part)))))
    return found


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
