"""The proof's stages that measure policies nobody chose: what tables are compared with, or fitted to."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.proof_lines import PREDICTED, as_lists, as_policy
from benchmarks.proof_run import Bench, held, in_stacks, measured, of_either, tuner
from mpq_jax import data, joint, pipeline, policy, row_policies
from mpq_jax.search import random_policies
from mpq_jax.types import Bits

PAIRS, ALONE = 5, (4, 2)  # stage alone: so many pairs of layers, at these bits


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


def tune(bench: Bench) -> None:
    """Some of the random policies after a short fine-tuning."""
    tuned = None
    for name in PREDICTED:
        for number, bits in enumerate(bench.lines[f"random {name}"]["policies"][: bench.settings.tuned]):
            key = f"tuned {name} {number}"
            if "running" not in bench.lines.lines.get(key, {}):
                tuned = tuned or tuner(bench, bench.settings.tune_steps)
                each = as_policy(bits, bench.table)
                found = of_either(bench, tuned(each), each)
                bench.lines.add(key, **found["restated"], running=found["running"])


def repeats(bench: Bench) -> None:
    """The first of those once more, from the same start on other batches: what fine-tuning itself adds."""
    tuned = None
    for name in PREDICTED:
        for number, bits in enumerate(bench.lines[f"random {name}"]["policies"][: bench.settings.repeated]):
            if "running" not in bench.lines.lines.get(key := f"repeat {name} {number}", {}):
                tuned = tuned or tuner(bench, bench.settings.tune_steps, order=1)
                each = as_policy(bits, bench.table)
                found = of_either(bench, tuned(each), each)
                bench.lines.add(key, **found["restated"], running=found["running"])


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
