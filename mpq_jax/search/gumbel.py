"""Differentiable search: theta, the probabilities of every layer's bits, learned by gradients beside the weights.

DNAS (Wu et al. 2018): each layer is y = sum_k m_k y_k over its pairs k of bits, m = GumbelSoftmax(theta, T), T falling.
EdMIPS (Cai and Vasconcelos 2020), see edmips.py: softmax mixtures of quantized weights and of quantized activations,
one product a layer. Both minimise CE * beta (log cost)^gamma; at the end the most likely policy is taken.
"""

import json
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mpq_jax import costs, data, logs, optimizers, stages
from mpq_jax.data.opening import Split
from mpq_jax.files import write_text
from mpq_jax.search import edmips, supernet
from mpq_jax.search.journal import Journal
from mpq_jax.search.likely import measure_policies
from mpq_jax.search.methods import Gumbel, Supernet
from mpq_jax.search.problem import Problem
from mpq_jax.search.supernet import NEVER
from mpq_jax.types import Bits, Refusal

Axes = int | tuple[int, int]
Softmax = Callable[[jax.Array, int, Axes], jax.Array]  # (logits, number of the call, axes) -> shares

# ---- theta --------------------------------------------------------------------------------------------------------


def init_theta(problem: Problem) -> dict[str, jax.Array]:
    """{"pair": [L, Kw, Ka], "shared": [G, Ka]} of zeros: logits of each row's pairs of bits, and of the activation bits
    that each of G tied groups shares (in its rows "pair" then says which weight bits, given the activation bits)."""
    theta = {"pair": jnp.zeros((len(problem.paths), *problem.widths))}
    shared = jnp.zeros((len(problem.tied), problem.widths[1]))
    return theta | ({"shared": shared} if problem.tied else {})


def shares_of(theta: Mapping[str, jax.Array], problem: Problem, softmax: Softmax) -> jax.Array:
    """[L, Kw, Ka]: each row's shares, which add up to 1; those of tied rows agree on the activation bits.

    softmax(logits, number, axes): the softmax over axes; `number` tells the calls apart (for noise).
    """
    allowed = jnp.asarray(problem.allowed).reshape(-1, *problem.widths)
    logits = jnp.where(allowed, theta["pair"], NEVER)
    shares = list(softmax(logits, 0, (1, 2)))
    given = softmax(logits, 1, 1)
    for g, group in enumerate(problem.tied):
        possible = jnp.stack([allowed[row].any(0) for row in group]).all(0)
        bits = softmax(jnp.where(possible, theta["shared"][g], NEVER), 2 + g, 0)
        for row in group:
            shares[row] = given[row] * bits * allowed[row]
    return jnp.stack(shares)


def gumbel_softmax(key: jax.Array, temperature: jax.Array) -> Softmax:
    """softmax((theta + g) / T), g ~ Gumbel(0, 1) (Jang et al. 2017; DNAS)."""

    def softmax(logits: jax.Array, number: int, axes: Axes) -> jax.Array:
        noise = jax.random.gumbel(jax.random.fold_in(key, number), logits.shape)
        return jax.nn.softmax((logits + noise) / temperature, axes)

    return softmax


def plain_softmax(logits: jax.Array, number: int, axes: Axes) -> jax.Array:
    """softmax(theta): no noise, T = 1."""
    del number
    return jax.nn.softmax(logits, axes)


def gumbel_form(problem: Problem, settings: Gumbel) -> supernet.Form:
    """DNAS's form; T falls exponentially over the steps of theta."""
    steps = max(1, settings.steps - settings.warmup_steps)

    def shares(theta: Mapping[str, jax.Array], key: jax.Array, step: jax.Array) -> jax.Array:
        done = jnp.clip((step - settings.warmup_steps) / steps, 0, 1)
        temperature = settings.temperature * (settings.end_temperature / settings.temperature) ** done
        return shares_of(theta, problem, gumbel_softmax(key, temperature))

    return supernet.Form(supernet.supernet_layer, shares)


# ---- training -----------------------------------------------------------------------------------------------------


def search(method: str, problem: Problem, journal: Journal, settings: Supernet, seed: int, bench: Any) -> None:
    """Trains theta on the run's joint model, then measures policies. method: "gumbel" or "edmips".

    The weights that are trained along are thrown away: policies are measured on the joint model, like everyone's.
    journal.evaluations policies are measured at the end (1 without that limit); its seconds end the training too.
    """
    run = bench.run
    if isinstance(settings, Gumbel):
        theta, form = init_theta(problem), gumbel_form(problem, settings)
    else:
        theta, form = edmips.init_theta(problem), edmips.form(problem)
    cost, fixed_cost = _cost(problem, run.model)
    weights = optimizers.partition(
        run.model,
        optimizers.sgd(optimizers.schedule(settings.learning_rate, settings.steps), 0.9, 0.0),
        optimizers.log_space(optax.adam(optimizers.schedule(settings.step_size_learning_rate, settings.steps))),
    )
    thetas = optax.adam(settings.theta_learning_rate)
    step = supernet.make_step(
        run.model,
        run.task(),
        problem,
        cost,
        fixed_cost,
        form,
        weights,
        thetas,
        settings,
        seed,
        dropout=run.model.variables is None,
    )
    folder = journal.path.parent
    log = TrainingLog(folder / "training.jsonl")
    state = stages.train(
        run,
        str(folder.relative_to(run.workdir) / "supernet"),
        supernet.init_state(bench.variables, theta, weights, thetas),
        stages.compile_step(step),
        settings.steps,
        batches_of(run, settings, seed),
        ["weights", "theta"],
        recorder=logs.Recorder(log.load, log.add, log.flush),
        stop=lambda *_: journal.seconds is not None and log.seconds() >= journal.seconds,
    )
    if (trained := int(state.step)) <= settings.warmup_steps:
        raise Refusal(
            f"{journal.seconds:g} s ended the training after {trained} steps, and theta moves after {settings.warmup_steps} alone: "
            f"all bits are as likely; give --seconds more, or fewer --{method}.warmup_steps"
        )
    journal.begin_at(log.seconds())
    shares = edmips.probabilities(state.theta, problem) if method == "edmips" else final_shares(state.theta, problem)
    measure_policies(problem, np.asarray(shares), journal, journal.evaluations or 1, np.random.default_rng(seed))


def final_shares(theta: Mapping[str, jax.Array], problem: Problem) -> jax.Array:
    """The probabilities of the bits: softmax(theta), without noise and at T = 1."""
    return shares_of(theta, problem, plain_softmax)


def _cost(problem: Problem, model: Any) -> tuple[np.ndarray, float]:
    """[L, C] and what the fixed layers cost: of the first budget that sums over layers, else BitOps.

    Measured latencies in nanoseconds, so that their logarithm is positive.
    """
    if problem.cost:
        unit = 1e6 if problem.names[0] == "latency" else 1.0
        return unit * problem.cost[0], unit * float(problem.fixed[0])
    table = {layer.path: layer for layer in model.layers}
    cost = [
        [
            sum(costs.layer_bitops(table[p], Bits(int(w), int(a))) for p in paths)
            for w, a in zip(problem.w, problem.a, strict=True)
        ]
        for paths in problem.paths
    ]
    return np.array(cost), float(sum(costs.layer_bitops(ly, ly.bits) for ly in model.layers if ly.bits is not None))


def batches_of(run: stages.Run, settings: Supernet, seed: int) -> Callable[[int], Iterator[Any]]:
    """batches(first step) -> {"weights": batch, "theta": batch}, of two parts of the training split that share nothing.

    Raises Refusal for a fraction that leaves one of them empty.
    """
    split = run.dataset.splits["train"]
    order = np.random.default_rng([seed, len(split.numbers)]).permutation(len(split.numbers))
    count = round(settings.theta_fraction * len(order))
    if not 0 < count < len(order):
        raise Refusal(f"theta_fraction {settings.theta_fraction} leaves weights or theta no examples; give e.g. 0.2")
    parts = {"theta": np.sort(order[:count]), "weights": np.sort(order[count:])}
    sets = {
        name: run.dataset._replace(splits={**run.dataset.splits, "train": Split(split.records, split.numbers[part])})
        for name, part in parts.items()
    }

    def batches(first_step: int) -> Iterator[Any]:
        streams = {
            name: data.train_batches(
                part, settings.batch_size, seed=seed, first_step=first_step, workers=run.config.data.workers
            )
            for name, part in sets.items()
        }
        while True:
            yield {name: next(stream) for name, stream in streams.items()}

    return batches


class TrainingLog:
    """training.jsonl: a line a step, {"step", "weights_loss", "theta_loss", "cost", "seconds"}; seconds since the start
    of the search, whatever kills there were."""

    def __init__(self, path: Path, clock: Callable[[], float] = time.monotonic):
        self._path, self._clock, self._began, self._before = path, clock, clock(), 0.0
        self._lines: list[dict[str, float]] = []

    def load(self, step: int) -> None:
        """Takes what the file says of the steps before `step`, where a training goes on."""
        if not step:
            return
        try:
            lines = [json.loads(line) for line in self._path.read_text(encoding="utf-8").splitlines()]
            self._lines = [line for line in lines if line["step"] < step]
            self._before = float(self._lines[-1]["seconds"])
            whole = [line["step"] for line in self._lines] == list(range(step))
        except (OSError, ValueError, KeyError, TypeError, IndexError):
            whole = False
        if not whole:
            raise Refusal(f"{self._path} is damaged; delete {self._path.parent} to start this search again")

    def seconds(self) -> float:
        """Since the start of the search, those before a kill included."""
        return self._before + self._clock() - self._began

    def add(self, step: int, metrics: Mapping[str, np.ndarray]) -> None:
        """Notes one step, in memory."""
        weights, theta = (float(loss) for loss in metrics["losses"])
        line = {"step": step, "weights_loss": weights, "theta_loss": theta, "cost": float(metrics["cost"])}
        self._lines.append({**line, "seconds": round(self.seconds(), 3)})

    def flush(self) -> None:
        """Writes the file, whole or not at all."""
        write_text(self._path, "".join(json.dumps(line) + "\n" for line in self._lines))
