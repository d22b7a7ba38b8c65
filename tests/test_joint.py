"""Joint training: the summed loss, rows, optimizers, statistics, against things computed one by one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from mpq_jax import Bits, Layer, Refusal, evaluation, flax_seam, joint, optimizers, row_policies
from mpq_jax.quantized_model import quantize


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.relu(nn.Conv(4, (3, 3), name="stem")(x))
        x = nn.Conv(4, (3, 3), use_bias=False, name="conv")(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9, name="bn")(x))
        return nn.Dense(3, name="head")(x.mean((1, 2)))


pytestmark = pytest.mark.usefixtures("quick_compilation")
WIDTHS = (2, 3, 4)
BATCH = {
    "image": jnp.asarray(np.random.default_rng(0).normal(size=(8, 5, 5, 2)), jnp.float32),
    "label": jnp.asarray(np.arange(8) % 3, jnp.int32),
}
TASK = joint.classification()
SGD = optax.sgd(0.1)


@pytest.fixture(scope="module")
def net():
    model = Net()
    quantized = quantize(model, BATCH["image"], bit_widths=WIDTHS)
    variables = jax.jit(model.init)(jax.random.key(0, impl="rbg"), BATCH["image"])
    return quantized, jax.jit(quantized.calibrate)(variables, BATCH["image"])


@pytest.fixture(scope="module")
def in_training(net):
    """policy -> (logits, new statistics) of the batch, compiled once."""
    quantized, variables = net
    options = {"train": True, "mutable": ["batch_stats"]}
    return jax.jit(lambda policy: quantized.apply(variables, policy, BATCH["image"], **options))


def uniform(quantized):
    return row_policies.uniform_rows(quantized.layers, quantized.bit_widths, quantized.activation_bit_widths)


def test_the_state_of_a_moving_average_can_be_given_away(net):
    """As make_step's docstring has it compiled: no array of the state is there twice."""
    quantized, variables = net
    step = jax.jit(joint.make_step(quantized, TASK, SGD, average=0.9), donate_argnums=0)
    state = joint.init_state(jax.tree.map(jnp.copy, variables), SGD, 1, average=True)
    policies = jax.tree.map(lambda bits: bits[:1], uniform(quantized))
    state, _ = step(state, BATCH, jax.random.key(0), policies)
    moved = [np.abs(a - b).max() for a, b in zip(*map(jax.tree.leaves, (state.params, state.average)), strict=True)]
    assert max(moved) > 0


@pytest.mark.parametrize("weight", [-0.1, 1.1, float("nan")])
def test_distillation_leaves_the_labels_a_share(net, weight):
    with pytest.raises(Refusal, match=r"weight of distillation is .*; give a number from 0 to 1"):
        joint.make_step(net[0], TASK, SGD, distill=joint.Distill(weight))


def test_a_moving_average_is_asked_for_twice_or_not_at_all(net):
    quantized, variables = net
    policies = jax.tree.map(lambda bits: bits[:1], uniform(quantized))
    for average, kept in ((0.9, False), (0.0, True)):
        step = joint.make_step(quantized, TASK, SGD, average=average)
        state = joint.init_state(variables, SGD, 1, average=kept)
        with pytest.raises(Refusal, match="moving average needs both"):
            step(state, BATCH, jax.random.key(0), policies)
    assert joint.row_variables(state, -1)["params"].keys() == variables["params"].keys()
    for row in (-2, 1):
        with pytest.raises(Refusal, match=f"there is no row {row}"):
            joint.row_variables(state, row)


@pytest.mark.parametrize(
    "distill, words",
    [(joint.Distill(0.5), "leave out sliced"), (joint.Distill(0.5, "Given"), "'Given' is not known")],
)
def test_distillation_that_cannot_be(net, distill, words):
    with pytest.raises(Refusal, match=words):
        joint.make_step(net[0], TASK, SGD, distill=distill, sliced=True)


def row_of(policies, i):
    return jax.tree.map(lambda bits: bits[i], policies)


def cross_entropy_numpy(logits, labels, smoothing=0.0):
    logits = np.asarray(logits, np.float64)
    log_p = logits - logits.max(-1, keepdims=True)
    log_p -= np.log(np.exp(log_p).sum(-1, keepdims=True))
    target = np.eye(logits.shape[-1])[labels] * (1 - smoothing) + smoothing / logits.shape[-1]
    return -(target * log_p).sum(-1).mean()


def test_losses_of_rows_equal_numpy(net, in_training):
    quantized, variables = net
    state = joint.init_state(variables, SGD, 3)
    policies = uniform(quantized)
    total, (losses, stats, _) = jax.jit(
        lambda state: joint.joint_loss(quantized, TASK, state.params, state.rows, policies, BATCH)
    )(state)
    for i in range(3):
        logits, updates = in_training(row_of(policies, i))
        np.testing.assert_allclose(losses[i], cross_entropy_numpy(logits, np.asarray(BATCH["label"])), rtol=1e-5)
        for path, leaf in flax_seam.flatten(updates).items():
            np.testing.assert_allclose(flax_seam.flatten(stats)[path][i], leaf, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(total, losses.sum(), rtol=1e-6)


@pytest.fixture(scope="module")
def stepped(net):
    """options of make_step -> (state, metrics) after a step of three uniform rows and a random one."""
    quantized, variables = net
    state = joint.init_state(variables, SGD, 4, affine_per_row=True)

    def run(**options):
        step = joint.make_step(quantized, TASK, SGD, random=1, **options)
        return jax.jit(step)(state, BATCH, jax.random.key(3), uniform(quantized))

    return functools.cache(run)


@pytest.mark.parametrize(
    "options",
    [
        *({"rows_at_a_time": 1}, {"rows_at_a_time": 2}, {"rows_at_a_time": 4}),
        *({"recompute": True}, {"recompute": True, "rows_at_a_time": 1}),
    ],
)
def test_ways_to_run_rows_change_nothing(stepped, options):
    (one, metrics), (other, metrics2) = stepped(), stepped(**options)
    np.testing.assert_array_equal(metrics["policies"], metrics2["policies"])
    for a, b in ((metrics["losses"], metrics2["losses"]), (one.params, other.params), (one.rows, other.rows)):
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-3, atol=2e-5), a, b)


def test_rows_at_a_time_must_divide(net):
    quantized, variables = net
    step = joint.make_step(quantized, TASK, SGD, rows_at_a_time=2)
    state = joint.init_state(variables, SGD, 3)
    with pytest.raises(Refusal, match=r"choose one of \[1, 3\]"):
        step(state, BATCH, jax.random.key(0), uniform(quantized))
    step = joint.make_step(quantized, TASK, SGD, rows_at_a_time=1, distill=joint.Distill(0.3))
    with pytest.raises(Refusal, match="needs all 3 rows at once, not 1 at a time"):
        step(state, BATCH, jax.random.key(0), uniform(quantized))


@pytest.mark.parametrize("rows", [1, 2])
def test_rows_of_a_model_that_returns_a_constant(rows):
    """A number of Python's among the outputs gets a row axis, as everything else."""

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return {"logits": nn.Dense(3)(x), "aux": 0.5}

    x = jnp.ones((rows, 4, 5))
    quantized, variables = quantize(Net(), x[0]), Net().init(jax.random.key(0, impl="rbg"), x[0])
    found = joint._over_rows(rows, lambda x: quantized.apply(variables, None, x), (0,))(x)
    assert found["logits"].shape == (rows, 4, 3) and found["aux"].tolist() == [0.5] * rows


def test_slices(net):
    """Every row sees its own samples: losses and the summed gradient, row by row, each a batch by itself."""
    quantized, variables = net
    state, policies = joint.init_state(variables, SGD, 3), uniform(quantized)
    results = [
        jax.jit(joint.make_step(quantized, TASK, SGD, sliced=True, rows_at_a_time=n))(
            state, BATCH, jax.random.key(0), policies
        )
        for n in (0, 1)
    ]

    @jax.jit
    @jax.value_and_grad
    def alone(params, policy, batch):
        out, _ = quantized.apply(
            {**variables, "params": params}, policy, batch["image"], train=True, mutable=["batch_stats"]
        )
        return TASK.loss(out, batch)

    parts = [{name: leaf[2 * i : 2 * i + 2] for name, leaf in BATCH.items()} for i in range(3)]  # 8 samples: 2 unused
    losses, grads = zip(*(alone(state.params, row_of(policies, i), parts[i]) for i in range(3)), strict=True)
    expected = jax.tree.map(lambda x, *g: x - 0.1 * sum(g), state.params, *grads)
    for after, metrics in results:
        np.testing.assert_allclose(metrics["losses"], losses, rtol=1e-5)
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-3, atol=2e-5), after.params, expected)
    with pytest.raises(Refusal, match=r"no slice for each of the 3 rows; take at least --joint\.batch_size 3"):
        joint.slices({"label": jnp.zeros(2)}, 3)


def test_affine_per_row(net):
    """Each row moves its own scale and bias by its own gradient; the shared copies stay."""
    quantized, variables = net
    state = joint.init_state(variables, SGD, 3, affine_per_row=True)
    assert set(state.rows["affine"]) == {"bn/scale", "bn/bias"}
    policies = uniform(quantized)
    after, _ = jax.jit(joint.make_step(quantized, TASK, SGD))(state, BATCH, jax.random.key(0), policies)

    @jax.jit
    @jax.grad
    def slope(params, policy):
        out, _ = quantized.apply(
            {**variables, "params": params}, policy, BATCH["image"], train=True, mutable=["batch_stats"]
        )
        return TASK.loss(out, BATCH)

    for i in range(3):
        gradient = slope(variables["params"], row_of(policies, i))["bn"]["scale"]
        expected = variables["params"]["bn"]["scale"] - 0.1 * gradient
        np.testing.assert_allclose(after.rows["affine"]["bn/scale"][i], expected, rtol=1e-3, atol=1e-6)
        np.testing.assert_allclose(
            joint.row_variables(after, i)["params"]["bn"]["scale"], expected, rtol=1e-3, atol=1e-6
        )
    np.testing.assert_array_equal(after.params["bn"]["scale"], variables["params"]["bn"]["scale"])


def test_distillation(net, in_training):
    """In place: the widest row teaches; given: the teacher's logits come with the batch. KL in NumPy."""
    quantized, variables = net
    state = joint.init_state(variables, SGD, 3)
    policies = uniform(quantized)

    def losses(batch, **options):
        run = functools.partial(joint.joint_loss, quantized, TASK, **options)
        return jax.jit(run)(state.params, state.rows, policies, batch)[1][0]

    plain = losses(BATCH)
    logits = [np.asarray(in_training(row_of(policies, i))[0], np.float64) for i in range(3)]

    def log_softmax(x):
        x = x - x.max(-1, keepdims=True)
        return x - np.log(np.exp(x).sum(-1, keepdims=True))

    def kl(teacher, student):
        t, s = log_softmax(teacher), log_softmax(student)
        return (np.exp(t) * (t - s)).sum(-1).mean()

    mixed = losses(BATCH, distill=joint.Distill(0.3))
    expected = [0.7 * plain[i] + 0.3 * kl(logits[2], logits[i]) for i in range(2)] + [plain[2]]
    np.testing.assert_allclose(mixed, expected, rtol=1e-4)
    teacher = np.random.default_rng(5).normal(size=logits[0].shape)
    given = {**BATCH, "teacher": jnp.asarray(teacher, jnp.float32)}
    mixed = losses(given, distill=joint.Distill(0.3, "given"))
    np.testing.assert_allclose(mixed, [0.7 * plain[i] + 0.3 * kl(teacher, logits[i]) for i in range(3)], rtol=1e-4)


def test_distillation_of_logits_with_a_time_axis():
    """[P, B, T, V]: the mean over examples and time of the divergence from the teacher, against NumPy."""
    rng = np.random.default_rng(0)
    mine, teacher = rng.normal(size=(2, 3, 4, 5)).astype(np.float32), rng.normal(size=(3, 4, 5)).astype(np.float32)
    losses = np.array([1.0, 2.0], np.float32)
    mixed = joint._distilled(joint.Distill(0.25, "given"), losses, mine, {}, {"teacher": teacher}, None)
    p, q = (np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in (teacher.astype(np.float64), mine.astype(np.float64)))
    divergence = (p * (np.log(p) - np.log(q))).sum(-1).mean((1, 2))
    np.testing.assert_allclose(mixed, 0.75 * losses + 0.25 * divergence, rtol=1e-5)


def test_error_term_in_numpy(net):
    """lambda * sum over layers of relative squared errors, reaching step sizes alone."""
    quantized, variables = net
    policies = uniform(quantized)
    rows = joint.init_state(variables, SGD, 3).rows

    @functools.partial(jax.jit, static_argnums=1)
    def total(params, weight):
        return joint.joint_loss(quantized, TASK, params, rows, policies, BATCH, error_weight=weight)[0]

    params = variables["params"]
    difference = float(total(params, 2.0) - total(params, 0.0)) / 2.0
    policy = [row_of(policies, i) for i in range(3)]

    def error(x, step, bits, signed):
        low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
        x = np.asarray(x, np.float64)
        return np.square(np.round(np.clip(x / step, low, high)) * step - x).mean() / np.square(x).mean()

    expected = 0.0
    seen = []

    def spy(call, lhs, rhs, value):
        seen.append((call.leaf, np.asarray(lhs), np.asarray(rhs)))
        out = real(call, lhs, rhs, value)
        return out

    from mpq_jax import quantized_model as module

    for i in range(3):
        seen.clear()
        real = module._quantizing(quantized.specs, quantized.quantizer, "plain", ())
        values = module.layer_values(quantized.specs, quantized.quantizer, variables, policy[i])
        quantized.walk(variables, values, spy, (BATCH["image"],), {"train": True}, ["batch_stats"])
        for leaf, x, w in seen:
            spec = quantized.specs[leaf]
            layer = params[spec.paths[0]]
            bits = policy[i][spec.paths[0]]
            at = spec.weight_bit_widths.index(int(bits.w)), spec.activation_bit_widths.index(int(bits.a))
            expected += error(w, float(layer["weight_step_size"][at[0]]), int(bits.w), True)
            expected += error(x[:1], float(layer["activation_step_size"][at[1]]), int(bits.a), spec.signed)
    np.testing.assert_allclose(difference, expected, rtol=1e-3)
    gradient = jax.jit(jax.grad(lambda p: total(p, 2.0) - total(p, 0.0)))(params)
    assert float(jnp.abs(gradient["conv"]["weight_step_size"]).max()) > 0
    np.testing.assert_allclose(gradient["conv"]["kernel"], 0, atol=1e-5)


LAYERS = (
    Layer("a", 1, 1, False, Bits(8, 8)),
    Layer("b", 1, 1, True, tied="t"),
    Layer("c", 1, 1, True, tied="t"),
    Layer("d", 1, 1, True, weight_bit_widths=(4, 8), activation_bit_widths=(4,)),
)


def test_the_first_steps_follow_the_error_alone(net):
    """Plain SGD's update is the gradient: of the error term at first, of both from `error_steps` on."""
    quantized, variables = net
    policies, optimizer = uniform(quantized), optax.sgd(1.0)
    step = jax.jit(joint.make_step(quantized, TASK, optimizer, error_weight=2.0, error_steps=1))
    state = joint.init_state(variables, optimizer, 3)

    def total(params, rows, task_weight):
        options = {"error_weight": 2.0, "task_weight": task_weight}
        return joint.joint_loss(quantized, TASK, params, rows, policies, BATCH, **options)[0]

    def errors(params, rows):  # the whole less the task's own
        whole = total(params, rows, 1.0)
        return whole - joint.joint_loss(quantized, TASK, params, rows, policies, BATCH)[0]

    for expected in (errors, lambda params, rows: total(params, rows, 1.0)):
        grads = jax.jit(jax.grad(expected))(state.params, state.rows)
        new, _ = step(state, BATCH, jax.random.key(0), policies)
        for path, leaf in flax_seam.flatten(state.params).items():
            moved = np.asarray(leaf - flax_seam.flatten(new.params)[path])
            np.testing.assert_allclose(moved, flax_seam.flatten(grads)[path], rtol=2e-3, atol=2e-5, err_msg=path)
            if expected is errors and "step_size" not in path:
                assert not moved.any()
        state = new


@pytest.mark.parametrize("at_a_time", [0, 1])
def test_gradients_of_trained_leaves_alone(net, at_a_time):
    """They are what they are among all; the rest stays, and the norm is theirs."""
    quantized, variables = net
    policies, moving = uniform(quantized), optimizers.quantizer_leaves(quantized, "leaves")
    optimizer = optimizers.partition(quantized, optax.set_to_zero(), SGD)
    state = joint.init_state(variables, optimizer, len(WIDTHS), affine_per_row=True)

    def stepped(trained):
        step = joint.make_step(quantized, TASK, optimizer, error_weight=1.0, rows_at_a_time=at_a_time, trained=trained)
        return jax.jit(step)(state, BATCH, jax.random.key(0), policies)

    (every, measured), (mine, own) = stepped(None), stepped(moving)
    assert jax.tree.structure(every) == jax.tree.structure(mine)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7), mine, every)
    before, after = (flax_seam.flatten(each.params) for each in (state, mine))
    moved = {path: np.asarray(before[path] - after[path]) / 0.1 for path in before}
    assert {path for path, change in moved.items() if change.any()} == moving
    norm = np.sqrt(sum((change.astype(float) ** 2).sum() for change in moved.values()))
    np.testing.assert_allclose(own["gradient_norm"], norm, rtol=1e-3)
    assert own["gradient_norm"] < measured["gradient_norm"]


def test_random_rows():
    """Candidates only, ties kept, weights and activations independent, a pure function of the key."""
    rows = row_policies.random_rows(jax.random.key(0), LAYERS, WIDTHS, WIDTHS, 4000)
    array = np.stack([np.stack(rows[layer.path], -1) for layer in LAYERS], 1)
    assert array.shape == (4000, 4, 2)
    assert (array[:, 0] == 8).all() and set(np.unique(array[:, 3, 0])) == {4, 8} and (array[:, 3, 1] == 4).all()
    np.testing.assert_array_equal(array[:, 1, 1], array[:, 2, 1])
    for column in (array[:, 1, 0], array[:, 2, 0], array[:, 1, 1]):
        counts = np.bincount(column)[2:5]
        assert counts.min() > 4000 / 3 - 150  # five standard deviations
    assert abs(np.corrcoef(array[:, 1, 0], array[:, 1, 1])[0, 1]) < 0.08
    again = row_policies.random_bits(jax.random.key(0), LAYERS, WIDTHS, WIDTHS, 4000)
    np.testing.assert_array_equal(array[:, [layer.searched for layer in LAYERS]], again)
    same = row_policies.random_rows(jax.random.key(1), LAYERS[1:2], WIDTHS, WIDTHS, 50, same_bits=True)
    np.testing.assert_array_equal(same["b"].w, same["b"].a)
    # Where the weights' widths are not all the activations', each keeps to its own.
    widths = (2, 4, 8)
    apart = [LAYERS[1]._replace(tied=None, activation_bit_widths=own) for own in ((2, 3), (2, 4, 8, 16))]
    apart = [layer._replace(path=f"own{i}") for i, layer in enumerate(apart)]
    same = row_policies.random_rows(jax.random.key(1), apart, widths, (2, 3, 4), 50, same_bits=True)
    assert set(np.unique(same["own0"].a)) == {2, 3} and set(np.unique(same["own0"].w)) == set(widths)
    np.testing.assert_array_equal(same["own1"].w, same["own1"].a)


def test_uniform_rows_take_the_nearest_candidate():
    rows = row_policies.uniform_rows(LAYERS, (2, 3, 6), (2, 3, 6))
    assert rows["b"].w.tolist() == [2, 3, 6] and rows["a"].a.tolist() == [8, 8, 8]
    assert rows["d"].w.tolist() == [4, 4, 4] and rows["d"].a.tolist() == [4, 4, 4]


def test_batch_statistics_are_the_batches_own(net):
    """Whatever the momentum: mean and variance of the layer's input over the batch, in NumPy."""
    quantized, variables = net
    policies = uniform(quantized)
    stats = jax.tree.map(lambda x: jnp.stack([x] * 3), {"batch_stats": variables["batch_stats"]})
    found = evaluation.make_batch_statistics(quantized, TASK)(variables["params"], stats, policies, BATCH)
    seen = {}

    def spy(call, lhs, rhs, value):
        out, tap = real(call, lhs, rhs, value)
        seen[call.leaf] = np.asarray(out, np.float64)
        return out, tap

    from mpq_jax import quantized_model as module

    for i in range(3):
        real = module._quantizing(quantized.specs, quantized.quantizer, "plain", ())
        values = module.layer_values(quantized.specs, quantized.quantizer, variables, row_of(policies, i))
        quantized.walk(variables, values, spy, (BATCH["image"],), {"train": True}, ["batch_stats"])
        out = seen["conv/kernel"]
        np.testing.assert_allclose(found["bn"]["mean"][i], out.mean((0, 1, 2)), rtol=1e-3, atol=1e-5)
        np.testing.assert_allclose(found["bn"]["var"][i], out.var((0, 1, 2)), rtol=1e-3, atol=1e-5)


class Counted(nn.Module):
    """BatchNorm, and a collection of its own that training changes, too."""

    @nn.compact
    def __call__(self, x, train=False):
        count = self.variable("calls", "count", lambda: jnp.zeros((), jnp.int32))
        if train:
            count.value += 1
        x = nn.BatchNorm(use_running_average=not train, momentum=0.0, name="bn")(nn.Conv(4, (3, 3))(x))
        return nn.Dense(3)(nn.relu(x).mean((1, 2)))


def test_batch_statistics_beside_another_collection_that_moves():
    model = Counted()
    quantized = quantize(model, BATCH["image"], bit_widths=WIDTHS)
    variables = jax.jit(model.init)(jax.random.key(0), BATCH["image"])
    stats = jax.tree.map(lambda x: jnp.stack([x] * 2), {name: variables[name] for name in ("batch_stats", "calls")})
    found = jax.jit(evaluation.make_batch_statistics(quantized, TASK))(variables["params"], stats, None, BATCH)
    _, moved = model.apply(variables, BATCH["image"], train=True, mutable=["batch_stats", "calls"])
    jax.tree.map(lambda mine, own: np.testing.assert_allclose(mine[1], own, rtol=1e-5), found, moved["batch_stats"])


class Kept(nn.Module):
    """Statistics that are no averages of batches: of a frozen layer, and a spectral norm's power iteration."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.BatchNorm(use_running_average=True, name="frozen")(nn.Conv(4, (3, 3))(x))
        x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.0, name="moving")(x)).mean((1, 2))
        return nn.Dense(3)(nn.SpectralNorm(nn.Dense(4, name="normed"), name="spectral")(x, update_stats=train))


def test_statistics_that_are_no_averages_are_kept():
    model = Kept()
    quantized = quantize(model, BATCH["image"], bit_widths=WIDTHS, rules=[("normed", "float")])
    variables = jax.jit(model.init)(jax.random.key(0), BATCH["image"])
    stats = jax.tree.map(lambda x: jnp.stack([x + 0.25] * 2), {"batch_stats": variables["batch_stats"]})
    found = jax.jit(evaluation.make_batch_statistics(quantized, TASK))(variables["params"], stats, None, BATCH)
    for name in ("frozen", "spectral"):
        jax.tree.map(np.testing.assert_array_equal, found[name], stats["batch_stats"][name])
    own = jax.tree.map(lambda x: x[0], stats["batch_stats"])
    _, moved = model.apply({**variables, "batch_stats": own}, BATCH["image"], train=True, mutable=["batch_stats"])
    for name in ("mean", "var"):  # with a momentum of 0 they are the batch's already
        np.testing.assert_allclose(found["moving"][name][1], moved["batch_stats"]["moving"][name], rtol=1e-5)


def test_golden_step(net):
    """One step of the default kind of joint training, recomputed from plain gradients.

    If this fails after a change that is meant to change the step, change the recomputation below with it.
    """
    quantized, variables = net
    optimizer = optimizers.partition(quantized, optax.set_to_zero(), optimizers.log_space(optax.sgd(0.5)))
    state = joint.init_state(variables, optimizer, 4)
    key = jax.random.key(11)
    after, metrics = jax.jit(joint.make_step(quantized, TASK, optimizer, random=1))(
        state, BATCH, key, uniform(quantized)
    )
    drawn = np.asarray(metrics["policies"])[0]
    searched = [layer.path for layer in quantized.layers if layer.searched]
    random_policy = {ly.path: ly.bits for ly in quantized.layers if ly.bits}
    random_policy |= {path: Bits(int(w), int(a)) for path, (w, a) in zip(searched, drawn, strict=True)}
    rows = [row_of(uniform(quantized), i) for i in range(3)] + [random_policy]

    def total(params):
        outs = [
            quantized.apply({**variables, "params": params}, row, BATCH["image"], train=True, mutable=["batch_stats"])[
                0
            ]
            for row in rows
        ]
        return sum(TASK.loss(out, BATCH) for out in outs)

    gradient = jax.jit(jax.grad(total))(variables["params"])
    for layer in ("stem", "conv", "head"):
        for leaf in ("weight_step_size", "activation_step_size"):
            s = variables["params"][layer][leaf]
            expected = s * np.exp(-0.5 * gradient[layer][leaf] * s)
            np.testing.assert_allclose(after.params[layer][leaf], expected, rtol=2e-3)
    assert int(after.step) == 1
