"""The model with shares of all bit-widths in every layer, in the two forms of differentiable search, and its training.

Both are walks of the unmodified model with another handler; the quantizers' step sizes are leaves of the model's own
tree, the shares come from theta, a pytree of its own.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mpq_jax import ops
from mpq_jax.interpret import Call, Handler
from mpq_jax.joint import Task
from mpq_jax.layers import LayerSpec
from mpq_jax.mixture import mixture, on_grid
from mpq_jax.operands import place_on_channels
from mpq_jax.quantized_model import learned_leaves
from mpq_jax.search.methods import Supernet
from mpq_jax.search.problem import Problem
from mpq_jax.tasks import random_streams
from mpq_jax.types import QuantizedModel

NEVER = -1e9  # logit of bits that are not allowed
# shares float32 [L, Kw, Ka] of the problem's rows: how much of each pair of bits a layer is
Shares = jax.Array
Metrics = dict[str, jax.Array]


def supernet_layer(model: QuantizedModel) -> Handler:
    """Handler of DNAS's form: y = sum_ij m_ij conv(Q_i(w), Q_j(x)).

    A product is linear in its weight, so the sum over i is taken before it: Ka products in place of Kw Ka.
    """

    def handler(call: Call, lhs: jax.Array, rhs: jax.Array, value: Any) -> tuple[jax.Array, None]:
        layer = _Layer(model, call, lhs, rhs, value)
        if value is None:
            return layer.product(layer.weight, layer.activation), None
        shares = value["shares"]
        y: Any = sum(layer.product(layer.weights(shares[:, j]), layer.activation_at(j)) for j in range(shares.shape[1]))
        if any(layer.spec.in_float):
            y = jnp.where(value["in_float"], layer.product(layer.weight, layer.activation), y)
        return y, None

    return handler


def one_branch_layer(model: QuantizedModel) -> Handler:
    """Handler of EdMIPS's form: y = conv(sum_i p_i Q_i(w), sum_j q_j Q_j(x)), p and q the sums of the shares over the
    other's bits."""

    def handler(call: Call, lhs: jax.Array, rhs: jax.Array, value: Any) -> tuple[jax.Array, None]:
        layer = _Layer(model, call, lhs, rhs, value)
        if value is None:
            return layer.product(layer.weight, layer.activation), None
        w, a = layer.weights(value["shares"].sum(1)), layer.activations(value["shares"].sum(0))
        if any(layer.spec.in_float):
            w, a = (jnp.where(value["in_float"], x, x_hat) for x, x_hat in ((layer.weight, w), (layer.activation, a)))
        return layer.product(w, a), None

    return handler


class _Layer:
    """The two operands of a product, and their grids."""

    def __init__(self, model: QuantizedModel, call: Call, lhs: jax.Array, rhs: jax.Array, value: Any):
        self.spec: LayerSpec = model.specs[call.leaf]
        self._call, self._value, self._quantizer = call, value, model.quantizer
        self._product = ops.contract(call.primitive, call.params)
        self.weight, self.activation = (lhs, rhs) if call.weight_side == 0 else (rhs, lhs)

    def product(self, weight: jax.Array, activation: jax.Array) -> jax.Array:
        """The layer's own product of these two in place of its operands."""
        return self._product(*((weight, activation) if self._call.weight_side == 0 else (activation, weight)))

    def _place(self, leaf: jax.Array) -> jax.Array:
        return place_on_channels(leaf, self.weight, self._call.channel_axes)

    def weights(self, shares: jax.Array) -> jax.Array:
        """sum_i m_i Q_i(w); shares [Kw]."""
        widths = self.spec.weight_bit_widths
        return mixture(self._quantizer.weight, self.weight, self._value["weight"], widths, shares, True, self._place)

    def activations(self, shares: jax.Array) -> jax.Array:
        """sum_j m_j Q_j(x); shares [Ka]."""
        spec = self.spec
        return mixture(
            self._quantizer.activation,
            self.activation,
            self._value["activation"],
            spec.activation_bit_widths,
            shares,
            spec.signed,
        )

    def activation_at(self, j: int) -> jax.Array:
        """Q_j(x)."""
        spec, leaves = self.spec, self._value["activation"]
        quantizer = self._quantizer.activation
        return on_grid(quantizer, self.activation, leaves, spec.activation_bit_widths, j, spec.signed)


def layer_values(
    model: QuantizedModel, problem: Problem, variables: Mapping[str, Any], shares: Shares
) -> dict[str, dict[str, Any]]:
    """What the handlers take: each leaf's step sizes, and its layers' shares at the widths that the leaf keeps.

    A fixed layer has all of its share at its bits.
    """
    row_of = {path: row for row, paths in enumerate(problem.paths) for path in paths}
    fixed = {layer.path: layer.bits for layer in model.layers if layer.bits is not None}
    values = learned_leaves(model.specs, model.quantizer, variables)
    for leaf, value in values.items():
        spec = model.specs[leaf]
        w, a = spec.weight_bit_widths, spec.activation_bit_widths
        each = []
        for path in spec.paths:
            if path in row_of:
                every = [
                    _columns(own, widths) for own, widths in ((w, model.bit_widths), (a, model.activation_bit_widths))
                ]
                each.append(every[0] @ shares[row_of[path]] @ every[1].T)
            else:
                hit = np.array([[(i, j) == tuple(fixed[path]) for j in a] for i in w])
                each.append(jnp.asarray(hit, shares.dtype))
        value["shares"] = jnp.stack(each).reshape(*spec.stack, len(w), len(a))
        value["in_float"] = jnp.asarray(spec.in_float).reshape(spec.stack)
    return values


def _columns(own: tuple[int, ...], widths: tuple[int, ...]) -> np.ndarray:
    """float32 [own, widths]: picks, of the columns of `widths`, those of `own` (0 for a width that is not there)."""
    return np.array([[float(b == c) for c in widths] for b in own], np.float32)


# ---- training -----------------------------------------------------------------------------------------------------


class State(NamedTuple):
    """params, with step sizes; stats: the collections that training changes; theta; optimizer states; step []."""

    params: Any
    stats: Any
    theta: Any
    weights_optimizer: Any
    theta_optimizer: Any
    step: jax.Array


class Form(NamedTuple):
    """One form of the search: its layer, and shares(theta, key, step) -> [L, Kw, Ka]."""

    layer: Callable[[QuantizedModel], Handler]
    shares: Callable[[Any, jax.Array, jax.Array], Shares]


def init_state(
    variables: Mapping[str, Any],
    theta: Any,
    weights: optax.GradientTransformation,
    thetas: optax.GradientTransformation,
) -> State:
    """The state before the first step, from variables with step sizes."""
    params = variables["params"]
    stats = {name: tree for name, tree in variables.items() if name != "params"}
    return State(params, stats, theta, weights.init((params, {})), thetas.init(theta), jnp.zeros((), jnp.int32))


def make_step(
    model: QuantizedModel,
    task: Task,
    problem: Problem,
    cost: np.ndarray,
    fixed_cost: float,
    form: Form,
    weights: optax.GradientTransformation,
    thetas: optax.GradientTransformation,
    settings: Supernet,
    seed: int,
    dropout: bool = False,
) -> Callable[..., tuple[State, Metrics]]:
    """step(state, batches, key, fixed) -> (state, {"losses": [CE of the weights, loss of theta], "cost": []}).

    batches: {"weights": batch, "theta": batch}, of separate splits: the weights and step sizes take a step on the one,
    then theta on the other, with loss CE * beta (log cost)^gamma. cost: [L, Kw * Ka] of the rows; fixed_cost: of all
    other layers. seed: of all noise. key, fixed: not used (the signature of joint's step).
    """
    handler = form.layer(model)
    table = jnp.asarray(cost, jnp.float32).reshape(-1, *problem.widths)

    def cross_entropy(params: Any, stats: Any, shares: Shares, batch: Any, rngs: Any) -> tuple[jax.Array, Any]:
        variables = {"params": params, **stats}
        values = layer_values(model, problem, variables, shares)
        outputs, updates, _ = model.walk(
            variables, values, handler, task.inputs(batch), task.train_kwargs, list(stats), rngs
        )
        return task.loss(outputs, batch), updates

    def step(state: State, batches: Mapping[str, Any], key: jax.Array, fixed: Any = None) -> tuple[State, Metrics]:
        del key, fixed
        keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), state.step), 4)
        rngs = [random_streams(task, k) if dropout else None for k in keys[2:]]
        shares = form.shares(state.theta, keys[0], state.step)
        (loss, stats), grads = jax.value_and_grad(cross_entropy, has_aux=True)(
            state.params, state.stats, shares, batches["weights"], rngs[0]
        )
        trained: tuple[Any, Any] = (state.params, {})
        moves, weights_optimizer = weights.update((grads, {}), state.weights_optimizer, trained)
        params, _ = optax.apply_updates(trained, moves)

        def theta_loss(theta: Any) -> tuple[jax.Array, jax.Array]:
            shares = form.shares(theta, keys[1], state.step)
            ce, _ = cross_entropy(params, stats, shares, batches["theta"], rngs[1])
            spent = (table * shares).sum() + fixed_cost
            return ce * settings.beta * jnp.log(spent) ** settings.gamma, spent

        (weighed, spent), grads = jax.value_and_grad(theta_loss, has_aux=True)(state.theta)
        moves, theta_optimizer = thetas.update(grads, state.theta_optimizer, state.theta)
        moved = (optax.apply_updates(state.theta, moves), theta_optimizer)
        learning = state.step >= settings.warmup_steps
        theta, theta_optimizer = jax.tree.map(
            lambda new, old: jnp.where(learning, new, old), moved, (state.theta, state.theta_optimizer)
        )
        after = State(params, stats, theta, weights_optimizer, theta_optimizer, state.step + 1)
        return after, {"losses": jnp.stack([loss, weighed]), "cost": spent}

    return step
