"""HAWQ and HAWQ-v2: products, traces and eigenvalues against full Hessians, finite differences and NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from criteria_nets import (
    TASK,
    Recurrent,
    Wide,
    batches,
    cross_entropy,
    inputs_by_hand,
    layers_of,
    net,
    on_grid,
    start,
    step_size,
)
from flax import linen as nn

from mpq_jax import Refusal
from mpq_jax.criteria import hawq, hawq_v2, hessian, sites
from mpq_jax.quantized_model import quantize

pytestmark = pytest.mark.usefixtures("quick_compilation")
DATA = batches()
RNG = np.random.default_rng(3)
DENSE = RNG.normal(size=(30, 30))
DENSE = (DENSE + DENSE.T) / 2 + 3 * np.eye(30)


@pytest.fixture(scope="module")
def case():
    return net()


# ---- products -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", sites.KINDS)
def test_product_against_finite_differences(kind):
    """H v and (g(e + h v) - g(e - h v)) / 2h, in float64."""
    with jax.enable_x64(True):
        quantized, variables = net()
        wide_task = TASK._replace(loss=lambda logits, batch: cross_entropy(logits, batch["label"]))
        variables, batch = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), (variables, DATA[0]["image"]))
        batch = {"image": batch, "label": DATA[0]["label"]}
        loss = hessian.perturbed_loss(quantized, wide_task, kind)
        shapes = hessian.perturbation(quantized, TASK, variables, batch, kind)
        rng = np.random.default_rng(0)
        v = jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s.shape)), shapes)
        e = hessian.zeros(shapes)
        product = jax.jit(lambda v: hessian.hessian_product(loss, e, v, variables, batch))(v)
        gradient = jax.jit(lambda e: jax.grad(loss)(e, variables, batch))
        ahead, behind = (gradient(jax.tree.map(lambda x, h=h: h * x, v)) for h in (1e-5, -1e-5))
        for key in shapes:
            expected = (ahead[key] - behind[key]) / 2e-5
            assert product[key].dtype == jnp.float64 and np.abs(expected).max() > 1e-3
            np.testing.assert_allclose(product[key], expected, rtol=1e-6, atol=1e-9)


def test_depthwise_convolutions_differentiate_twice():
    class Depthwise(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.tanh(nn.Conv(2, (3, 3), feature_group_count=2, name="depthwise")(x))
            return nn.Dense(3, name="head")(x.mean((1, 2)))

    model = Depthwise()
    variables = start(model, DATA[0]["image"])
    quantized = quantize(model, DATA[0]["image"], bit_widths=(2, 3), ends=None)
    loss = hessian.perturbed_loss(quantized, TASK, "weight")
    shapes = hessian.perturbation(quantized, TASK, variables, DATA[0], "weight")
    v = {key: jnp.ones(s.shape) for key, s in shapes.items()}
    mine = jax.jit(lambda v: hessian.hessian_product(loss, hessian.zeros(shapes), v, variables, DATA[0]))(v)

    def plain(kernels):
        params = {name: {**variables["params"][name], "kernel": kernels[f"{name}/kernel"]} for name in kernels_of}
        return cross_entropy(model.apply({"params": params}, DATA[0]["image"]), DATA[0]["label"])

    kernels_of = ("depthwise", "head")
    kernels = {f"{name}/kernel": variables["params"][name]["kernel"] for name in kernels_of}
    theirs = jax.jit(lambda v: jax.jvp(jax.grad(plain), (kernels,), (v,))[1])(v)
    for key in shapes:
        np.testing.assert_allclose(mine[key], theirs[key], rtol=1e-3, atol=1e-5)


# ---- traces and eigenvalues of known matrices ---------------------------------------------------------------------


def quadratic(matrix):
    return lambda e: 0.5 * e["x"] @ jnp.asarray(matrix, jnp.float32) @ e["x"]


def test_trace_of_a_diagonal_is_exact_in_one_draw():
    diagonal = RNG.normal(size=30)
    e, mask = {"x": jnp.zeros(30)}, {"x": np.ones(30, np.float32)}
    for seed in range(3):
        draw = hawq_v2.quadratic_draw(quadratic(np.diag(diagonal)), e, mask, jax.random.key(seed))
        np.testing.assert_allclose(draw, diagonal.sum(), rtol=1e-5)
    some = {"x": (np.arange(30) < 10).astype(np.float32)}
    draw = hawq_v2.quadratic_draw(quadratic(np.diag(diagonal)), e, some, jax.random.key(0))
    np.testing.assert_allclose(draw, diagonal[:10].sum(), rtol=1e-5)


def test_trace_of_a_dense_matrix_within_three_standard_errors():
    e, mask = {"x": jnp.zeros(30)}, {"x": np.ones(30, np.float32)}
    draw = jax.jit(lambda i: hawq_v2.quadratic_draw(quadratic(DENSE), e, mask, jax.random.key(i)))
    found = hawq_v2.mean_of_draws(draw, 0.02, 2000)
    assert found.converged and found.error <= 0.02 and 10 < found.draws < 2000
    assert abs(found.value - np.trace(DENSE)) <= 3 * found.error * found.value
    # The standard error itself: v'Hv has the variance 2 sum of h_ij^2 off the diagonal (Hutchinson 1989).
    variance = 2 * (np.square(DENSE).sum() - np.square(np.diag(DENSE)).sum())
    expected = np.sqrt(variance / found.draws) / np.trace(DENSE)
    assert 0.8 < found.error / expected < 1.25


def test_draws_stop_at_the_error_or_at_the_limit():
    values = np.random.default_rng(0).normal(10, 2, 1000)
    within = hawq_v2.mean_of_draws(lambda i: values[i], 0.05, 500)
    n = within.draws
    assert within.converged and within.error == pytest.approx(values[:n].std(ddof=1) / np.sqrt(n) / values[:n].mean())
    assert within.error <= 0.05
    limited = hawq_v2.mean_of_draws(lambda i: values[i], 0.001, 500)
    assert not limited.converged and limited.draws == 500 and limited.error > 0.001
    assert limited.value == pytest.approx(values[:500].mean())
    assert hawq_v2.mean_of_draws(lambda i: 0.0, 0.05, 500) == (0.0, 0.0, 10, True)


@pytest.mark.parametrize("name", ["dense", "negative dominates", "all negative", "zero"])
def test_largest_eigenvalue(name):
    """To 1e-4, against NumPy; the largest, not the largest in size."""
    matrix = {
        "dense": DENSE,
        "negative dominates": DENSE - 12 * np.eye(30),
        "all negative": DENSE - 30 * np.eye(30),
        "zero": np.zeros((30, 30)),
    }[name]
    product = jax.jit(lambda v: {"x": v["x"] @ jnp.asarray(matrix, jnp.float32)})
    first = {"x": jnp.asarray(np.random.default_rng(0).normal(size=(1, 30)), jnp.float32)}
    values, estimate = hawq.largest_eigenvalues(product, first, tolerance=1e-4, most=5000)
    expected = np.linalg.eigvalsh(matrix)[-1]
    np.testing.assert_allclose(values, [expected], rtol=1e-4, atol=1e-6)
    assert estimate.converged and estimate.value == values.mean()


def test_eigenvalues_of_several_matrices_at_once():
    matrices = np.stack([DENSE, DENSE - 12 * np.eye(30), np.zeros((30, 30)), np.diag(np.arange(30.0))])
    product = jax.jit(lambda v: jnp.einsum("gij,gj->gi", jnp.asarray(matrices, jnp.float32), v))
    first = jnp.asarray(np.random.default_rng(0).normal(size=(4, 30)), jnp.float32)
    values, estimate = hawq.largest_eigenvalues(product, first, tolerance=1e-4, most=5000)
    np.testing.assert_allclose(values, np.linalg.eigvalsh(matrices)[:, -1], rtol=1e-4, atol=1e-5)
    assert not hawq.largest_eigenvalues(product, first, tolerance=1e-6, most=3)[1].converged


# ---- the network --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wide():
    """(quantized, variables, batches, full Hessians {kind: {path: [samples or 1, n, n]}}), by hand and jax.hessian."""
    data = batches((8,), (20, 20), 10)
    variables = start(Wide(), data[0]["image"])
    for batch in data:  # labels that the network gives, so that the Hessian has few negative eigenvalues
        batch["label"] = np.asarray(Wide().apply(variables, batch["image"]).argmax(-1), np.int32)
    quantized = quantize(Wide(), data[0]["image"], bit_widths=(2, 3))
    params = variables["params"]
    image, label = (jnp.concatenate([batch[key] for batch in data]) for key in ("image", "label"))

    def forward(x, path, kernel=None, moved=0.0):
        for name in ("stem", "first", "second", "head"):
            mine = name == path
            x = x + (moved if mine else 0.0)
            x = x @ (kernel if mine and kernel is not None else params[name]["kernel"]) + params[name]["bias"]
            x = x if name == "head" else jnp.tanh(x)
        return x

    def of_weights(path):
        def loss(flat):
            return cross_entropy(forward(image, path, kernel=flat.reshape(8, 8)), label)

        return np.asarray(jax.jit(jax.hessian(loss))(params[path]["kernel"].ravel()), np.float64)[None]

    def of_inputs(path):
        def loss(moved, image, label):
            return cross_entropy(forward(image[None], path, moved=moved), label[None])

        return np.asarray(jax.jit(jax.vmap(jax.hessian(loss), (None, 0, 0)))(jnp.zeros(8), image, label), np.float64)

    paths = ("first", "second")
    full = {"weight": {p: of_weights(p) for p in paths}, "activation": {p: of_inputs(p) for p in paths}}
    return quantized, variables, data, full


@pytest.mark.parametrize("kind", sites.KINDS)
def test_trace_and_eigenvalue_of_the_full_hessian(wide, kind):
    """Both within 2 % at a tolerance of 0.5 %; of inputs, the mean over the samples."""
    quantized, variables, data, full = wide
    traces = hawq_v2.traces(quantized, TASK, variables, data, kind, relative_error=0.005, max_draws=6000)
    eigenvalues = hawq.eigenvalues(quantized, TASK, variables, data, kind, tolerance=0.005)
    for path, matrices in full[kind].items():
        assert traces[path].converged and eigenvalues[path].converged
        trace = np.trace(matrices, axis1=1, axis2=2).mean()
        np.testing.assert_allclose(traces[path].value, trace, rtol=0.02)
        largest = np.linalg.eigvalsh(matrices)[:, -1].mean()
        np.testing.assert_allclose(eigenvalues[path].value, largest, rtol=0.02)


def errors_by_hand(variables):
    """||Q(W) - W||^2 and, a sample's mean, ||Q(X) - X||^2, in NumPy."""
    params = variables["params"]
    own = {"conv": (2, 4), "shortcut": (2, 3, 4)}
    image = np.concatenate([batch["image"] for batch in DATA])
    x = np.asarray(inputs_by_hand(params, image), np.float64)
    result = {"weight": {}, "activation": {}}
    for path, widths in own.items():
        kernel = np.asarray(params[path]["kernel"], np.float64)
        for b in widths:
            moved = on_grid(kernel, step_size(params, path, "weight", b, widths), b, True) - kernel
            result["weight"][path, b] = np.square(moved).sum()
        for b in (2, 3, 4):
            moved = on_grid(x, step_size(params, path, "activation", b), b, False) - x
            result["activation"][path, b] = np.square(moved).sum() / len(x)
    return result


@pytest.mark.parametrize("name", ["hawq", "hawq_v2"])
def test_tables(case, name):
    """Curvature times squared error, entry by entry; the entry that a rule took repeats the largest."""
    quantized, variables = case
    if name == "hawq":
        measured = hawq.hawq(quantized, TASK, variables, DATA, hessian_samples=12)
        found = {kind: hawq.eigenvalues(quantized, TASK, variables, DATA, kind) for kind in sites.KINDS}
        sizes = {"weight": {"conv": 1, "shortcut": 1}, "activation": {"conv": 1, "shortcut": 1}}
    else:
        measured = hawq_v2.hawq_v2(quantized, TASK, variables, DATA, max_draws=20)
        found = {kind: hawq_v2.traces(quantized, TASK, variables, DATA, kind, max_draws=20) for kind in sites.KINDS}
        sizes = {"weight": {"conv": 108, "shortcut": 12}, "activation": {"conv": 48, "shortcut": 48}}
    table, errors = measured.importance, errors_by_hand(variables)
    assert table.weight.shape == table.activation.shape == (2, 3) and table.alpha is None
    for kind in sites.KINDS:
        for row, path in enumerate(("conv", "shortcut")):
            c = max(0.0, found[kind][path].value) / sizes[kind][path]
            for column, b in enumerate((2, 3, 4)):
                expected = errors[kind].get((path, b), errors[kind][path, 2])
                np.testing.assert_allclose(getattr(table, kind)[row, column], c * expected, rtol=1e-3)
    draws = sum(each.draws for kind in sites.KINDS for each in found[kind].values())
    passes = 2 * draws * (12 if name == "hawq" else 6) + 12 / 3
    assert measured.sample_passes == pytest.approx(passes)
    assert len(measured.notes) >= 2 and table.weight.any() and table.activation.any()


def test_published_form_has_uniform_activations(case):
    """Weights only: all activations at one candidate, no harm; another width is refused before anything starts."""
    quantized, variables = case
    options = {"hessian_samples": 6, "uniform_activations": 3}
    table = hawq.hawq(quantized, TASK, variables, DATA, **options).importance
    assert table.activation_bit_widths == (3,) and not table.activation.any() and table.activation.shape == (2, 1)
    assert (table.weight > 0).all() and all(layer.activation_bit_widths is None for layer in table.layers)
    with pytest.raises(Refusal, match="candidates of layer 'conv' are 2, 3, 4"):
        hawq_v2.hawq_v2(quantized, TASK, variables, DATA, uniform_activations=8)


def test_negative_curvature_counts_as_nothing_and_is_named(case):
    quantized, variables = case

    def curvature(kind):
        values = {"conv": -2.0 if kind == "weight" else 1.0, "shortcut": 3.0}
        return {path: hessian.Estimate(v, 0.07, 500, path == "conv") for path, v in values.items()}

    measured = hessian.second_order(
        quantized, TASK, variables, DATA, "x", curvature, 0, "mean trace", "draws", lambda found: 1.0
    )
    assert not measured.importance.weight[0].any() and (measured.importance.weight[1] > 0).all()
    assert (measured.importance.activation > 0).all()
    notes = "\n".join(measured.notes)
    assert "weights: conv is negative (-2) and counts as 0" in notes
    assert (
        "shortcut stopped at the limit of 500 draws, error 7.0 %" in notes and "activations: conv is neg" not in notes
    )


@pytest.mark.parametrize("kind", sites.KINDS)
def test_scanned_layers_equal_a_loop(kind):
    """v'H v of each layer of a scanned stack, alone, is that of the same layer in a loop."""
    forms, v = [], {}
    for scan in (True, False):
        quantized, variables, data = layers_of(scan)
        loss = hessian.perturbed_loss(quantized, TASK, kind)
        shapes = hessian.perturbation(quantized, TASK, variables, data[0], kind)
        for key, s in shapes.items():
            leaf = key if kind == "weight" else key[0]
            name = leaf.split("/")[-2]
            if scan:
                v[leaf] = RNG.normal(size=s.shape).astype(np.float32)
            else:
                v[leaf] = v[f"layers/{name}/kernel"][int(leaf[5])]
        direction = {key: v[key if kind == "weight" else key[0]] for key in shapes}

        @jax.jit
        def form(mask, loss=loss, shapes=shapes, direction=direction, variables=variables, data=data):
            x = hessian.masked(mask, direction)
            return hessian.dot(x, hessian.hessian_product(loss, hessian.zeros(shapes), x, variables, data[0]))

        paths = sites.searched_paths(quantized)
        forms.append([form(hessian.mask_of(quantized, path, shapes, kind)) for path in paths])
    assert len(forms[0]) == 5 and len(np.unique(forms[0])) == 5
    np.testing.assert_allclose(*forms, rtol=1e-3, atol=1e-6)


def test_inputs_of_a_recurrent_layer():
    """A layer that a scan runs again has inputs of its own in each run: H v by hand, run after run."""
    model = Recurrent()
    data = batches((3, 2), (4,))[0]
    variables = start(model, data["image"], 2.0)
    quantized = quantize(model, data["image"], bit_widths=(2, 3), ends=None)
    params = variables["params"]

    def by_hand(e):
        carry = jnp.zeros((4, 4))
        for t in range(3):
            joined = jnp.concatenate([carry, data["image"][:, t]], -1) + e[t]
            carry = jax.nn.sigmoid(joined @ params["cell"]["update"]["kernel"] + params["cell"]["update"]["bias"])
        return cross_entropy(carry @ params["head"]["kernel"] + params["head"]["bias"], data["label"])

    loss = hessian.perturbed_loss(quantized, TASK, "activation")
    shapes = hessian.perturbation(quantized, TASK, variables, data, "activation")
    key = ("cell/update/kernel", 0)
    assert shapes[key].shape == (3, 4, 6)
    v = jax.tree.map(jnp.zeros_like, hessian.zeros(shapes))
    v[key] = jnp.asarray(RNG.normal(size=(3, 4, 6)), jnp.float32)
    mine = jax.jit(lambda v: hessian.hessian_product(loss, hessian.zeros(shapes), v, variables, data))(v)[key]
    theirs = jax.jit(lambda v: jax.jvp(jax.grad(by_hand), (jnp.zeros((3, 4, 6)),), (v,))[1])(v[key])
    np.testing.assert_allclose(mine, theirs, rtol=1e-3, atol=1e-6)
    mask = hessian.mask_of(quantized, "cell/update", shapes, "activation")
    assert mask[key].shape == (1, 1, 1) and mask[key].all() and not mask["head/kernel", 0].any()
    elements = sites.elements(quantized, sites.call_shapes(quantized, TASK, variables, data), "activation")
    assert elements["cell/update/kernel"] == 3 * 4 * 6


def test_weights_used_in_two_shapes_are_refused():
    class Twice(nn.Module):
        @nn.compact
        def __call__(self, x):
            w = self.param("w", nn.initializers.normal(), (4, 3))
            return (x @ w) @ w.T @ w

    data = batches((4,), (5,))
    variables = start(Twice(), data[0]["image"])
    quantized = quantize(Twice(), data[0]["image"], bit_widths=(2, 3), ends=None)
    with pytest.raises(Refusal, match="used in two shapes"):
        hawq_v2.traces(quantized, TASK, variables, data, "weight")
