"""MPQCO, output-Fisher and one-at-a-time: against explicit gradients of single samples, and direct evaluation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from criteria_nets import (
    TASK,
    LinenNet,
    Net,
    NnxNet,
    Recurrent,
    batches,
    by_hand,
    calibrated,
    cross_entropy,
    inputs_by_hand,
    layers_of,
    net,
    on_grid,
    start,
    step_size,
)
from flax import nnx

from mpq_jax import Bits, Refusal, flax_seam, joint
from mpq_jax.criteria import Measured, find, hawq, hawq_v2, sites
from mpq_jax.criteria.compute import measure
from mpq_jax.criteria.mpqco import mpqco
from mpq_jax.criteria.one_at_a_time import one_at_a_time
from mpq_jax.criteria.output_fisher import output_fisher
from mpq_jax.quantized_model import quantize

pytestmark = pytest.mark.usefixtures("quick_compilation")
DATA = batches()
IMAGE, LABEL = (np.concatenate([batch[key] for batch in DATA]) for key in ("image", "label"))
OWN = {"conv": (2, 4), "shortcut": (2, 3, 4)}


@pytest.fixture(scope="module")
def case():
    return net()


@pytest.fixture(scope="module")
def plain(case):
    """The float parameters alone."""
    return {n: {k: v for k, v in leaf.items() if "step" not in k} for n, leaf in case[1]["params"].items()}


def moved(params, path, b, kind, x):
    """Q_b(W) - W, or Q_b(X) - X of all samples; float64."""
    tensor = params[path]["kernel"] if kind == "weight" else x
    widths = OWN[path] if kind == "weight" else (2, 3, 4)
    tensor = np.asarray(tensor, np.float64)
    return on_grid(tensor, step_size(params, path, kind, b, widths), b, kind == "weight") - tensor


def rows_of(entries):
    """[2, 3] from {(path, b): value}; the width that a rule took from conv repeats its largest."""
    largest = {path: max(v for (p, _), v in entries.items() if p == path) for path in OWN}
    return np.array([[entries.get((path, b), largest[path]) for b in (2, 3, 4)] for path in OWN])


def test_mpqco_against_gradients_of_single_samples(case, plain):
    """1/(2N) sum_n <g_n, dW>^2, each g_n an explicit gradient in the kernel, or in the layer's input."""
    quantized, variables = case
    table = mpqco(quantized, TASK, variables, DATA).importance
    x = np.asarray(inputs_by_hand(plain, IMAGE))

    def loss(kernel, hook, path, image, label):
        changed = {**plain, path: {**plain[path], "kernel": kernel}}
        return cross_entropy(by_hand(changed, image[None], at_input={path: hook}), label[None])

    expected = {"weight": {}, "activation": {}}
    for path in OWN:
        one = jax.jit(jax.grad(functools.partial(loss, path=path), (0, 1)))
        kernel, zero = plain[path]["kernel"], jnp.zeros((1, 4, 4, 3))
        gradients = [one(kernel, zero, image=image, label=label) for image, label in zip(IMAGE, LABEL, strict=True)]
        for b in OWN[path]:
            dw = moved(variables["params"], path, b, "weight", x)
            expected["weight"][path, b] = np.mean([np.vdot(g, dw) ** 2 / 2 for g, _ in gradients])
        for b in (2, 3, 4):
            dx = moved(variables["params"], path, b, "activation", x)
            each = [np.vdot(g, dx[n]) ** 2 / 2 for n, (_, g) in enumerate(gradients)]
            expected["activation"][path, b] = np.mean(each)
    for kind in sites.KINDS:
        np.testing.assert_allclose(getattr(table, kind), rows_of(expected[kind]), rtol=1e-3)
    assert table.alpha is None and table.criterion == "mpqco"


def test_output_fisher_against_output_gradients(case, plain):
    """1/2 mean_n sum_i (dL_n/dY_i)^2 (dY_i)^2, gradients and output errors explicit, sample by sample."""
    quantized, variables = case
    measured = output_fisher(quantized, TASK, variables, DATA)
    x = np.asarray(inputs_by_hand(plain, IMAGE), np.float64)

    def loss(hook, path, image, label):
        return cross_entropy(by_hand(plain, image[None], at_output={path: hook}), label[None])

    def product(x, kernel):
        """Stride 1, "SAME", by loops."""
        k = kernel.shape[0] // 2
        x = np.pad(x, ((0, 0), (k, k), (k, k), (0, 0)))
        return sum(
            x[:, i : i + 4, j : j + 4] @ kernel[i, j] for i in range(kernel.shape[0]) for j in range(kernel.shape[1])
        )

    expected = {"weight": {}, "activation": {}}
    for path in OWN:
        zero = jnp.zeros((1, 4, 4, 4))
        one = jax.jit(jax.grad(functools.partial(loss, path=path)))
        g = np.concatenate([one(zero, image=i, label=n) for i, n in zip(IMAGE, LABEL, strict=True)])
        kernel = np.asarray(plain[path]["kernel"], np.float64)
        for kind, widths in (("weight", OWN[path]), ("activation", (2, 3, 4))):
            for b in widths:
                change = moved(variables["params"], path, b, kind, x)
                dy = product(x, change) if kind == "weight" else product(change, kernel)
                expected[kind][path, b] = 0.5 * (np.square(g) * np.square(dy)).sum() / len(x)
    for kind in sites.KINDS:
        np.testing.assert_allclose(getattr(measured.importance, kind), rows_of(expected[kind]), rtol=1e-3)
    # One pass, and a product for each of three widths of weights and of activations.
    assert measured.sample_passes == pytest.approx(12 * (2 + 6) / 3) and "12 samples" in measured.notes[0]


def test_batches_of_unequal_size_count_by_samples(case):
    quantized, variables = case
    uneven = [{key: x[:4] for key, x in DATA[0].items()}, {key: x[4:] for key, x in DATA[0].items()}, DATA[1]]
    mine = mpqco(quantized, TASK, variables, uneven).importance
    whole = mpqco(quantized, TASK, variables, DATA).importance
    np.testing.assert_allclose(mine.weight, whole.weight, rtol=1e-4)
    traces = hawq_v2.traces(quantized, TASK, variables, uneven, "activation", max_draws=4)
    assert all(np.isfinite(each.value) and each.draws == 4 for each in traces.values())


def test_what_is_not_finite_is_refused(case):
    quantized, variables = case
    broken = jax.tree.map(lambda x: x, variables)
    broken["params"]["shortcut"]["kernel"] = broken["params"]["shortcut"]["kernel"] * np.nan
    with pytest.raises(Refusal, match="mpqco is not finite for the weights of layer 'conv'"):
        measure("mpqco", model=quantized, task=TASK, variables=broken, batches=DATA)


@pytest.mark.parametrize("others", ["float", "widest"])
def test_one_at_a_time_against_direct_evaluation(case, plain, others):
    """Losses by hand: one kernel, or one input, on its grid; all else as it is."""
    quantized, variables = case
    table = one_at_a_time(quantized, TASK, variables, DATA, others=others).importance
    if others == "widest":
        policy = {"stem": Bits(8, 8), "conv": Bits(4, 4), "shortcut": Bits(4, 4), "head": Bits(8, 8)}

        run = jax.jit(lambda policy: cross_entropy(quantized.apply(variables, policy, IMAGE), LABEL))

        def loss(policy):
            return float(run(jax.tree.map(np.int32, policy)))

        def rise(path, kind, b):
            changed = policy | {path: policy[path]._replace(**{kind[0]: b})}
            return loss(changed) - loss(policy)
    else:
        x = np.asarray(inputs_by_hand(plain, IMAGE))

        run = jax.jit(lambda params, at_input: cross_entropy(by_hand(params, IMAGE, at_input), LABEL))
        nothing = {path: np.zeros_like(x) for path in OWN}

        def loss(params, **hook):
            return float(run(params, nothing | hook))

        def rise(path, kind, b):
            change = jnp.asarray(moved(variables["params"], path, b, kind, x), jnp.float32)
            if kind == "activation":
                return loss(plain, **{path: change}) - loss(plain)
            changed = {**plain, path: {**plain[path], "kernel": plain[path]["kernel"] + change}}
            return loss(changed) - loss(plain)

    for kind in sites.KINDS:
        widths = OWN if kind == "weight" else dict.fromkeys(OWN, (2, 3, 4))
        expected = rows_of({(path, b): rise(path, kind, b) for path in OWN for b in widths[path]})
        assert np.abs(expected).max() > 1e-3
        np.testing.assert_allclose(getattr(table, kind), expected, rtol=1e-3, atol=2e-6)
    with pytest.raises(Refusal, match="choose one of float, widest"):
        one_at_a_time(quantized, TASK, variables, DATA, others="narrow")


# ---- other networks -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("criterion", [mpqco, one_at_a_time])
def test_scanned_layers_equal_a_loop(criterion):
    """A scanned stack of which one layer is fixed: each layer has a row of its own."""
    tables = []
    for scan in (True, False):
        quantized, variables, data = layers_of(scan)
        tables.append(criterion(quantized, TASK, variables, data).importance)
    names = [[layer.path for layer in table.layers if layer.searched] for table in tables]
    assert names[0] == [f"layers/{n}[{i}]" for i in range(3) for n in ("up", "down")][1:]
    for kind in sites.KINDS:
        mine, theirs = (getattr(table, kind) for table in tables)
        assert mine.shape == (5, 3) and np.isfinite(mine).all() and len(np.unique(mine)) == mine.size
        np.testing.assert_allclose(mine, theirs, rtol=2e-3, atol=1e-6)


def test_a_layer_that_runs_again_counts_once():
    """MPQCO of a recurrent layer: the product with the gradient in its weights, summed over its runs."""
    model, data = Recurrent(), batches((3, 2), (4,))
    variables = start(model, data[0]["image"])
    quantized = quantize(model, data[0]["image"], bit_widths=(2, 3), ends=None)
    variables = calibrated(quantized, variables, data[0]["image"])
    table = mpqco(quantized, TASK, variables, data).importance
    kernel = variables["params"]["cell"]["update"]["kernel"]
    sizes = variables["params"]["cell"]["update"]["weight_step_size"]

    def loss(kernel, image, label):
        params = {k: dict(v) for k, v in flax_seam.unflatten(flax_seam.flatten(variables["params"])).items()}
        params["cell"] = {"update": {"kernel": kernel, "bias": params["cell"]["update"]["bias"]}}
        return cross_entropy(model.apply({"params": params}, image[None]), label[None])

    gradients = jax.jit(jax.vmap(jax.grad(loss), (None, 0, 0)))(kernel, data[0]["image"], data[0]["label"])
    for column, b in enumerate((2, 3)):
        dw = on_grid(kernel, sizes[column], b, True) - kernel
        expected = np.mean(np.square(np.einsum("nij,ij->n", np.asarray(gradients, np.float64), dw))) / 2
        np.testing.assert_allclose(table.weight[0, column], expected, rtol=1e-3)


def test_linen_equals_nnx():
    """The same network in both, BatchNorm in evaluation: the same tables."""
    image = DATA[0]["image"]
    nnx_model = quantize(NnxNet(nnx.Rngs(0)), image, bit_widths=(2, 3), ends=None, train=False)
    linen_model = quantize(LinenNet(), image, bit_widths=(2, 3), ends=None, train=False)
    task = joint.classification()
    both = [calibrated(nnx_model, nnx_model.variables, image), None]
    stats = jax.tree.map(lambda x: x + 0.3, nnx_model.variables["batch_stats"])
    both[0] = {**both[0], "batch_stats": stats}
    both[1] = {name: both[0][name] for name in ("params", "batch_stats")}
    for name, options in (("output_fisher", {}), ("hawq_v2", {"max_draws": 3})):
        mine, theirs = (
            measure(name, model=m, task=task, variables=v, batches=DATA[:1], **options).importance
            for m, v in zip((nnx_model, linen_model), both, strict=True)
        )
        assert [layer.path for layer in mine.layers] == ["conv", "hidden", "head"]
        for kind in sites.KINDS:
            assert getattr(mine, kind).shape == (3, 2) and np.isfinite(getattr(mine, kind)).all()
            np.testing.assert_allclose(getattr(mine, kind), getattr(theirs, kind), rtol=1e-3, atol=1e-6)


def test_bfloat16_and_channels(case):
    """Step sizes per output channel, and a network that computes in bfloat16: finite, positive tables."""
    from mpq_jax.quantizers import lsq

    class Half(Net):
        pass

    image = DATA[0]["image"].astype(jnp.bfloat16)
    variables = start(Net(), DATA[0]["image"])
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), variables)
    quantized = quantize(Half(), image, bit_widths=(2, 4), quantizer=lsq(per_channel=True))
    half = calibrated(quantized, half, image)
    assert half["params"]["conv"]["weight_step_size"].shape == (2, 4)
    data = [{"image": image, "label": DATA[0]["label"]}]
    for table in (
        output_fisher(quantized, TASK, half, data).importance,
        hawq.hawq(quantized, TASK, half, data, max_draws=2).importance,
    ):
        assert np.isfinite(table.weight).all() and (table.weight > 0).all() and (table.activation > 0).all()


# ---- measure ------------------------------------------------------------------------------------------------------


def test_what_is_missing_is_named_before_anything_starts(case):
    quantized, variables = case
    unlabelled = [{"image": batch["image"]} for batch in DATA]
    for name in ("hawq", "hawq_v2", "mpqco", "output_fisher", "one_at_a_time"):
        with pytest.raises(Refusal, match="needs labels, and the batches have none"):
            measure(name, model=quantized, task=TASK, variables=variables, batches=unlabelled)
        with pytest.raises(Refusal, match="needs checkpoint and labels: give variables"):
            measure(name, model=quantized, task=TASK, batches=DATA)
    with pytest.raises(Refusal, match="needs rows: give rows"):
        measure("regression", model=quantized)
    with pytest.raises(Refusal, match="needs indicators: give base"):
        measure("constant")
    with pytest.raises(Refusal, match="did you mean hawq_v2") as refusal:
        measure("hawqv2", model=quantized)
    assert all(name in str(refusal.value) for name in ("output_fisher", "regression_pairwise", "reversed"))


def test_uniform_activations_of_mpqco(case):
    quantized, variables = case
    found = measure("mpqco", model=quantized, task=TASK, variables=variables, batches=DATA, uniform_activations=4)
    assert isinstance(found, Measured) and found.importance.activation_bit_widths == (4,)
    np.testing.assert_allclose(found.importance.weight, mpqco(quantized, TASK, variables, DATA).importance.weight)
    assert find("mpqco").unit == "loss"
