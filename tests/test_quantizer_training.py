"""Every quantizer through the stages: calibrated, trained jointly, its indicators read, fine-tuned, resumed, reported."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from made_models import Dense
from reference import quantizer_formulas as formulas

import search
import train
from mpq_jax import (
    Bits,
    Refusal,
    build,
    checkpoint,
    flax_seam,
    joint,
    optimizers,
    policy,
    recompute,
    row_policies,
    stages,
)
from mpq_jax import config as config_lib
from mpq_jax.criteria.learned import learned
from mpq_jax.numerics import decode
from mpq_jax.operands import with_state
from mpq_jax.pipeline import _grids
from mpq_jax.quantized_model import quantize
from mpq_jax.quantizers import QUANTIZERS, lq_nets, lsq, pact
from mpq_jax.report.figures import code_counts
from mpq_jax.types import Importance

pytestmark = pytest.mark.usefixtures("quick_compilation")
WIDTHS = (2, 3)
TASK = joint.classification()
RNG = np.random.default_rng(0)
LABELS = np.arange(48) % 3
BATCH = {
    "image": jnp.asarray(RNG.normal(size=(48, 6)) + 1.5 * RNG.normal(size=(3, 6))[LABELS], jnp.float32),
    "label": jnp.asarray(LABELS, jnp.int32),
}
MODEL = Dense(3)
LEAVES = {
    "lsq": ({"step_size"}, {"step_size"}),
    "pact": (set(), {"clip"}),
    "qil": ({"centre", "half_width", "gamma"}, {"centre", "half_width"}),
    "lq_nets": ({"basis"}, {"basis"}),
}


@functools.cache
def calibrated(name):
    """The tiny net under a quantizer, all of it searched: dense0 reads what can be negative, the head what cannot."""
    quantized = quantize(MODEL, BATCH["image"], quantizer=QUANTIZERS[name](), bit_widths=WIDTHS, ends=None)
    variables = MODEL.init(jax.random.key(0), BATCH["image"])
    return quantized, jax.jit(lambda v: quantized.calibrate(v, BATCH["image"]))(variables)


def uniform(quantized):
    return row_policies.uniform_rows(quantized.layers, quantized.bit_widths, quantized.activation_bit_widths)


@pytest.mark.parametrize("name", QUANTIZERS)
def test_joint_training_and_fine_tuning(name, tmp_path):
    """Losses fall, one compilation for all rows and steps, positive leaves stay so; resumed from a checkpoint it ends in
    the same numbers; fine-tuning goes on from there."""
    quantized, variables = calibrated(name)
    for kind, leaves in zip(("weight_", "activation_"), LEAVES[name], strict=True):
        found = {leaf[len(kind) :] for leaf in variables["params"]["dense0"] if leaf.startswith(kind)}
        assert found == leaves
    optimizer = optimizers.partition(
        quantized, optimizers.sgd(0.02, 0.9, 0.0), optimizers.log_space(optax.adam(0.03, b2=0.95))
    )
    step = jax.jit(joint.make_step(quantized, TASK, optimizer, random=1, error_weight=0.1, rows_at_a_time=1))
    start = joint.init_state(variables, optimizer, 3)

    def run(state, steps):
        losses = []
        for _ in range(steps):
            state, metrics = step(state, BATCH, jax.random.key(1), uniform(quantized))
            losses.append(np.asarray(metrics["losses"]))
        return state, losses

    middle, first = run(start, 15)
    state, second = run(middle, 15)
    losses = [*first, *second]
    assert step._cache_size() == 1 and np.isfinite(losses).all()
    assert (np.mean(losses[-5:], 0) < 0.8 * losses[0]).all()
    with checkpoint.manager(tmp_path) as manager:
        checkpoint.save(manager, 15, middle)
        _, restored = checkpoint.restore(manager, start)
    jax.tree.map(np.testing.assert_array_equal, run(restored, 15)[0], state)
    trained = optimizers.quantizer_leaves(quantized, "leaves")
    before, after = flax_seam.flatten(variables["params"]), flax_seam.flatten(state.params)
    assert all((np.asarray(after[path]) > 0).all() for path in trained)
    # The image is the same in every step: its basis stands at the least squares from the start.
    moved = (trained | optimizers.quantizer_leaves(quantized, "state")) - {"dense0/activation_basis"}
    assert moved and all(not np.array_equal(before[path], after[path]) for path in moved)

    end = joint.row_variables(state, -1)
    if name == "pact":
        with pytest.raises(Refusal, match=r"hawq, hawq_v2, mpqco.*--quantizer lsq"):
            learned(quantized, end)
    else:
        table = learned(quantized, end)
        assert (table.weight > 0).all() and (table.activation > 0).all() and table.weight.shape == (2, 2)

    chosen = policy.stack([{layer.path: Bits(2, 3) for layer in quantized.layers}])
    tune = jax.jit(joint.make_step(quantized, TASK, optimizer))
    state, losses = joint.init_state(end, optimizer, 1), []
    for _ in range(15):
        state, metrics = tune(state, BATCH, jax.random.key(2), chosen)
        losses.append(float(metrics["losses"][0]))
    assert losses[-1] < losses[0] < np.mean(first[0])


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
@pytest.mark.parametrize("name", QUANTIZERS)
def test_recomputed_gradients_are_the_kept_ones(name, backend, monkeypatch):
    """Of every parameter and leaf, for rows under vmap; in the form for GPUs and TPUs, too, which runs on CPU as well."""
    quantized, variables = calibrated(name)
    monkeypatch.setattr(recompute, "on_cpu", lambda: backend == "cpu")

    def loss(params, again):
        own = {**variables, "params": params}
        outputs = jax.vmap(lambda bits: quantized.apply(own, bits, BATCH["image"], recompute=again))
        return jnp.square(outputs(uniform(quantized))).sum()

    kept, again = (jax.jit(jax.value_and_grad(functools.partial(loss, again=a)))(variables["params"]) for a in (0, 1))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), kept, again)
    assert sum(np.any(leaf) for leaf in jax.tree.leaves(again[1])) >= 4


def test_indicators_are_spacings():
    """What `learned` reads, from the leaves in NumPy: QIL 2d/q; LQ-Nets the mean gap of the sorted levels."""
    quantized, variables = calibrated("qil")
    table, head = learned(quantized, variables), variables["params"]["head"]
    np.testing.assert_allclose(table.weight[1], 2 * head["weight_half_width"] / np.array([1, 3]), rtol=1e-6)
    np.testing.assert_allclose(table.activation[1], 2 * head["activation_half_width"] / np.array([3, 7]), rtol=1e-6)
    quantized, variables = calibrated("lq_nets")
    table, params = learned(quantized, variables), variables["params"]
    for k, bits in enumerate(WIDTHS):
        basis = np.asarray(params["head"]["weight_basis"][k], np.float64)[:bits]
        gaps = [np.diff(np.sort(formulas.basis_codes(bits, True) @ basis[:, c])).mean() for c in range(3)]
        np.testing.assert_allclose(table.weight[1, k], np.mean(gaps), rtol=1e-5)
        basis = np.asarray(params["head"]["activation_basis"][k], np.float64)[:bits]
        levels = np.sort(formulas.basis_codes(bits, False) @ basis)
        np.testing.assert_allclose(table.activation[1, k], np.diff(levels).mean(), rtol=1e-5)
    spacing = pact().activation.indicator({"clip": jnp.float32(2.1)}, jnp.int32(3), False)
    np.testing.assert_allclose(spacing, 2.1 / 7, rtol=1e-6)


# ---- LQ-Nets' state -----------------------------------------------------------------------------------------------


def rows(bits):
    """A stack of policies, the same bits in every layer: [(w, a), ...]."""
    return policy.stack([{name: Bits(w, a) for name in ("dense0", "head")} for w, a in bits])


@pytest.fixture(scope="module")
def moving():
    """LQ-Nets from the same-value start, and a step of three rows in which nothing but the bases moves."""
    quantized = quantize(MODEL, BATCH["image"], quantizer=lq_nets("same"), bit_widths=WIDTHS, ends=None)
    variables = jax.jit(quantized.calibrate)(MODEL.init(jax.random.key(0), BATCH["image"]), BATCH["image"])
    still = optimizers.partition(quantized, optax.set_to_zero(), optax.set_to_zero())
    step = jax.jit(joint.make_step(quantized, TASK, still, rows_at_a_time=1))
    state = joint.init_state(variables, still, 3)
    return quantized, state, lambda state, rows: step(state, BATCH, jax.random.key(0), rows)[0]


def test_lq_nets_state_in_the_step(moving):
    """Each row moves the basis of its own bits, by NumPy's least squares; rows with the same bits give their mean."""
    quantized, state, step = moving
    before, after = state.params, step(state, rows([(2, 2), (3, 2), (2, 2)])).params
    image = np.asarray(BATCH["image"], np.float64).ravel()
    kernel = np.asarray(before["head"]["kernel"], np.float64)

    def check(leaf, x, *entry):
        bits = WIDTHS[entry[0]]
        at = (entry[0], slice(bits), *entry[1:])
        layer = "head" if x is not image else "dense0"
        own = np.asarray(before[layer][leaf][at], np.float64)
        expected = formulas.lq_nets_update(x, own, True)
        np.testing.assert_allclose(after[layer][leaf][at], expected, rtol=1e-4, atol=1e-6)
        assert np.abs(expected - own).max() > 1e-3

    check("activation_basis", image, 0)
    for channel in range(kernel.shape[1]):
        check("weight_basis", kernel[:, channel], 0, channel)
        check("weight_basis", kernel[:, channel], 1, channel)
    for path, leaf in flax_seam.flatten(after).items():
        if path.endswith("basis"):  # no row had 3-bit activations: that basis stays
            assert np.array_equal(leaf[1], flax_seam.flatten(before)[path][1]) == path.endswith("activation_basis")
        else:
            np.testing.assert_array_equal(leaf, flax_seam.flatten(before)[path])
    # What the last layer reads depends on the row: two rows of one kind and one of the other weigh 2 to 1.
    ends = [step(state, rows([pair] * 3)).params["head"]["activation_basis"][0] for pair in ((2, 2), (3, 2))]
    assert float(jnp.abs(ends[0] - ends[1]).max()) > 1e-4
    expected = (2 * ends[0] + ends[1]) / 3
    np.testing.assert_allclose(after["head"]["activation_basis"][0], expected, rtol=1e-4, atol=1e-6)
    # All rows in one go: the same.
    loss = jax.jit(lambda rows, stack: joint.joint_loss(quantized, TASK, before, rows, stack, BATCH)[1][2])
    moved = loss(state.rows, rows([(2, 2), (3, 2), (2, 2)]))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6), with_state(before, moved), after)


def test_joint_training_improves_the_basis(moving):
    """Steps that train nothing else lower the error of every kernel and of the image, at every bit-width."""
    quantized, start, step = moving
    state = start
    for _ in range(40):
        state = step(state, rows([(2, 2), (3, 3), (2, 3)]))

    @jax.jit
    def errors(params):
        found = []
        for layer, kind in (("dense0", "activation"), ("dense0", "weight"), ("head", "weight")):
            x = BATCH["image"] if kind == "activation" else params[layer]["kernel"]
            for k, bits in enumerate(WIDTHS):
                basis = params[layer][f"{kind}_basis"][k]
                basis = basis[:, None, :] if kind == "weight" else basis
                tensor = getattr(quantized.quantizer, kind)
                x_hat = tensor.fake_quant(x, {"basis": basis}, jnp.int32(bits), True)
                found.append(jnp.square(x_hat - x).mean() / jnp.square(x).mean())
        return jnp.stack(found)

    assert (errors(state.params) < 0.4 * errors(start.params)).all()


class Convolution(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(4, (3, 3), use_bias=False, name="conv")(x)
        return nn.DenseGeneral((2, 3), use_bias=False, name="general")(nn.relu(x).mean((1, 2)))


@pytest.mark.parametrize("name", ["pact", "qil", "lq_nets"])
def test_layers_equal_numpy(name):
    """Convolution and DenseGeneral (two channel axes) with the leaves in the tree, by the papers' formulas in NumPy."""
    x = jnp.asarray(RNG.normal(size=(2, 4, 4, 2)), jnp.float32)
    quantizer = lq_nets("same") if name == "lq_nets" else QUANTIZERS[name]()
    quantized = quantize(Convolution(), x, quantizer=quantizer, bit_widths=WIDTHS, ends=None)
    variables = jax.jit(quantized.calibrate)(Convolution().init(jax.random.key(1), x), x)
    chosen = {"conv": Bits(2, 3), "general": Bits(3, 2)}
    out = jax.jit(lambda v: quantized.apply(v, chosen, x))(variables)

    def grid(layer, kind, value, bits, signed):
        leaves = {
            k[len(kind) + 1 :]: np.asarray(v, np.float64)
            for k, v in variables["params"][layer].items()
            if k.startswith(kind)
        }
        values = {k: v[bits - 2] for k, v in leaves.items()}
        if name == "lq_nets" and kind == "weight":
            channels = value.shape[3:] if layer == "conv" else value.shape[1:]
            basis = values["basis"]
            values = {"basis": basis.reshape(len(basis), *[1] * (value.ndim - len(channels)), *channels)}
        formula = {"pact": formulas.dorefa if kind == "weight" else formulas.pact, "qil": formulas.qil}.get(name)
        formula = formula or functools.partial(formulas.lq_nets, weight=kind == "weight")
        return formula(np.asarray(value, np.float64), values, bits, signed, np.zeros(value.shape))[0]

    kernel = grid("conv", "weight", variables["params"]["conv"]["kernel"], 2, True)
    padded = np.pad(grid("conv", "activation", x, 3, True), ((0, 0), (1, 1), (1, 1), (0, 0)))
    hidden = sum(padded[:, i : i + 4, j : j + 4] @ kernel[i, j] for i in range(3) for j in range(3))
    hidden = np.maximum(hidden, 0).mean((1, 2))
    general = grid("general", "weight", variables["params"]["general"]["kernel"], 3, True)
    expected = np.tensordot(grid("general", "activation", hidden, 2, False), general, 1)
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-5)


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return x + nn.Dense(4, name="dense")(nn.relu(x)), None


class Stack(nn.Module):
    @nn.compact
    def __call__(self, x):
        layers = nn.scan(Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        return layers(name="layers")(x, None)[0]


@pytest.mark.parametrize("name", QUANTIZERS)
def test_scanned_stack_with_a_layer_in_float(name):
    """Each layer of a scanned stack has leaves, state and bits of its own; one in float leaves all gradients finite."""
    x = jnp.asarray(RNG.normal(size=(8, 4)), jnp.float32)
    quantizer = QUANTIZERS[name]("same")
    quantized = quantize(Stack(), x, quantizer=quantizer, bit_widths=WIDTHS, ends=None, rules=[(r"\[1\]", "float")])
    variables = jax.jit(quantized.calibrate)(Stack().init(jax.random.key(0), x), x)
    chosen = {ly.path: ly.bits or Bits(2, 3) for ly in quantized.layers}
    terms = ("error", "penalty", "state")

    @jax.jit
    def run(params):
        def loss(params):
            out, measured = quantized.apply({"params": params}, chosen, x, terms=terms)
            return jnp.square(out).sum() + measured["error"] + measured["penalty"], measured["state"]

        return jax.value_and_grad(loss, has_aux=True)(params)

    (value, moved), gradients = run(variables["params"])
    assert np.isfinite(value)
    for path, leaf in flax_seam.flatten(gradients).items():
        assert np.isfinite(leaf).all(), path
    before, after = variables["params"]["layers"]["dense"], with_state(variables["params"], moved)["layers"]["dense"]
    if name != "lq_nets":
        assert moved == {}
        return
    for leaf, k in (("weight_basis", 0), ("activation_basis", 1)):
        changed = np.any(np.asarray(after[leaf] != before[leaf]).reshape(3, 2, -1), axis=-1)
        assert changed[:, k].tolist() == [True, False, True] and not changed[:, 1 - k].any()


# ---- options, and what is refused ---------------------------------------------------------------------------------


def test_options_reach_the_quantizer():
    def made(**options):
        return build.quantizer(config_lib.Config(quantize=config_lib.Quantize(**options)))

    x, values = jnp.asarray([[0.3, -0.7]]), {"step_size": jnp.float32(0.4)}

    def gradient(quantizer):
        return jax.grad(lambda x: quantizer.weight.fake_quant(x, values, jnp.int32(3), True).sum())(x)

    np.testing.assert_array_equal(gradient(made(ewgs=True)), gradient(lsq(ewgs=True)))
    assert not np.array_equal(gradient(made(ewgs=True)), gradient(made()))
    unit = made(quantizer="pact", rescale=False).weight.fake_quant(x, {}, jnp.int32(3), True)
    np.testing.assert_array_equal(unit, pact(rescale=False).weight.fake_quant(x, {}, jnp.int32(3), True))
    one = jnp.float32(1)
    assert made(quantizer="pact", clip_penalty=0.5).activation.penalty({"clip": one}, jnp.int32(3), False) == 0.5
    assert [made(quantizer=name).name for name in QUANTIZERS] == list(QUANTIZERS)
    for options, words in (
        ({"quantizer": "qil", "per_channel": True}, r"per_channel is an option of lsq, not of qil.*--quantizer lsq"),
        ({"quantizer": "lq_nets", "ewgs": True}, "ewgs is an option of lsq"),
        ({"rescale": False}, "rescale is an option of pact and qil, not of lsq.*--quantizer pact"),
        ({"quantizer": "qil", "clip_penalty": 0.1}, "clip_penalty is an option of pact"),
        ({"quantizer": "dorefa"}, "choose one of lsq, pact, qil, lq_nets"),
    ):
        with pytest.raises(Refusal, match=words):
            made(**options)


def test_refusals():
    with pytest.raises(Refusal, match=r"'dense0' may get 9 bits, lq_nets has grids of up to 8.*--quantizer lsq"):
        quantize(MODEL, BATCH["image"], quantizer=lq_nets(), bit_widths=(2, 9), ends=None)
    quantized, _ = calibrated("qil")
    other = calibrated("lsq")[1]  # calibrated for another quantizer
    with pytest.raises(Refusal, match=r"'dense0' has no 'dense0/weight_centre', which qil needs; call calibrate"):
        quantized.apply(other, {layer.path: Bits(2, 2) for layer in quantized.layers}, BATCH["image"])


@pytest.mark.parametrize("name", QUANTIZERS)
def test_integer_codes_of_a_trained_model(name):
    """What an export needs: codes and their decoding from the leaves give the values that the model computes with."""
    quantized, variables = calibrated(name)
    kernel = variables["params"]["head"]["kernel"]
    paths = {k[len("weight_") :]: v[1] for k, v in variables["params"]["head"].items() if k.startswith("weight_")}
    values = {k: v.reshape(len(v), 1, -1) if v.ndim > 1 else v for k, v in paths.items()}
    at = (kernel, values, jnp.int32(3), True)
    codes, decoding = quantized.quantizer.weight.encode(*at), quantized.quantizer.weight.decoding(*at)
    assert codes.dtype == jnp.int32 and len(np.unique(codes)) <= 8
    np.testing.assert_array_equal(decode(codes, decoding), quantized.quantizer.weight.fake_quant(*at))
    assert (decoding.table is not None) == (name == "lq_nets")


# ---- the commands -------------------------------------------------------------------------------------------------

CONFIG = """
from mpq_jax.config import *
config = Config(
    data=Data(name="digits", augment=False, data_dir={data!r}),
    model=Model(name="made_models:dense"),
    quantize=Quantize(bit_widths=(2, 3), ends="searched"),
    pretrain=Pretrain(steps=8, batch_size=32, warmup_steps=2),
    joint=Joint(steps=4, batch_size=16, rows_at_a_time=1),
    finetune=Finetune(steps=2, batch_size=16, compare=False),
    eval_batch_size=355,
    statistics_batches=2,
    checkpoint_every=2,
    log_every=2,
)
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("quantizers")
    (root / "tiny.py").write_text(CONFIG.format(data=str(root / "data")))
    return root


def arguments(place, run, *more):
    return ["--config", str(place / "tiny.py"), "--workdir", str(place / run), *more]


def test_lq_nets_by_command(place, capsys):
    """From training to a report; the policy's table is found by what the policy says of it, whatever its name."""
    run = place / "lq_nets"
    chosen = ("--quantizer", "lq_nets", "--quantize.start", "same")  # the other start takes long to compile
    assert train.main(arguments(place, "lq_nets", *chosen)) == 0
    saved = json.loads((run / "indicators.json").read_text())
    assert saved["initial"]["activation"] != saved["learned"]["activation"]
    assert search.main(["--workdir", str(run), "--budget", "bitops=W3A3"]) == 0
    (run / "importance_output_fisher.json").rename(run / "importance_other.json")
    (run / "importance.json").unlink()
    finetune = arguments(place, "lq_nets", *chosen, "--policy", str(run / "policy.json"))
    assert train.main(finetune) == 0
    rows = json.loads((run / "results.json").read_text())["rows"]
    assert [row["name"] for row in rows] == ["float", "mixed"] and all(np.isfinite(row["loss"]) for row in rows)
    (run / "importance_other.json").unlink()
    capsys.readouterr()
    assert train.main(finetune) == 2
    assert "was not found with any importance" in capsys.readouterr().err


def test_pact_by_command(place, capsys, monkeypatch):
    """It says before it trains that there will be no table, trains, and ends well without one."""
    monkeypatch.setattr(stages, "pretrain", lambda run: run.variables)
    trained = []

    def joint_train(run, variables):
        trained.append(capsys.readouterr().out)
        return joint.init_state(variables, optax.identity(), 1), None

    monkeypatch.setattr(stages, "joint_train", joint_train)
    assert train.main(arguments(place, "pact", "--quantizer", "pact")) == 0
    assert "no importance.json" in trained[0] and "output_fisher" in trained[0]
    assert not (place / "pact" / "importance.json").exists()


@pytest.mark.parametrize("name", QUANTIZERS)
def test_grids_of_the_report(name):
    """Figure 1's picture of a layer: codes, spacing and offset give the model's own values; none of a table."""
    quantized, variables = calibrated(name)
    table = Importance("made", WIDTHS, WIDTHS, quantized.layers, np.ones((2, 2)), np.ones((2, 2)))
    grids = _grids(quantized, variables, table)
    assert len(grids) == (0 if name == "lq_nets" else 2)
    for grid in grids:
        leaves = variables["params"][grid.path]
        values = {k[len("weight_") :]: v[WIDTHS.index(grid.bits)] for k, v in leaves.items() if k.startswith("weight_")}
        x_hat = quantized.quantizer.weight.fake_quant(leaves["kernel"], values, jnp.int32(grid.bits), True)
        np.testing.assert_allclose((grid.codes + grid.offset) * grid.step_size, np.ravel(x_hat), rtol=1e-5, atol=1e-7)
        assert set(grid.codes) <= set(code_counts(grid)[0])


@pytest.mark.parametrize(
    "more, words",
    [
        (("--quantizer", "lq-nets"), "choose one of lsq, pact, qil, lq_nets"),
        (("--quantiser", "qil"), "nearest is --quantizer"),
        (("--quantizer=qil", "--quantize.narrow", "true"), "narrow is an option of lsq"),
    ],
)
def test_refusals_by_command(place, tmp_path, capsys, more, words):
    assert train.main(["--config", str(place / "tiny.py"), "--workdir", str(tmp_path / "new"), *more]) == 2
    assert words in capsys.readouterr().err.splitlines()[-1]
