"""Quantizers: one table of properties over all of them, and each against its paper's formulas in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from reference import quantizer_formulas as formulas

from mpq_jax import optimizers
from mpq_jax.numerics import at_bits, decode
from mpq_jax.quantizers import QUANTIZERS, lq_nets, lsq, pact, qil
from mpq_jax.quantizers.pact import dorefa_codes, normalised

pytestmark = pytest.mark.usefixtures("quick_compilation")

VARIANTS = {
    "lsq": lsq(),
    "lsq same start": lsq("same"),
    "lsq per channel": lsq(per_channel=True),
    "lsq power of two": lsq(power_of_two=True),
    "lsq narrow": lsq(narrow=True),
    "lsq unscaled": lsq(gradient_scale=False),
    "lsq ewgs": lsq(ewgs=True),
    "pact": pact(),
    "pact same start": pact("same"),
    "pact unit": pact(rescale=False),
    "qil": qil(),
    "qil same start": qil("same"),
    "qil unit": qil(rescale=False),
    "lq_nets": lq_nets(),
    "lq_nets same start": lq_nets("same"),
}
KINDS = [("weight", True), ("activation", True), ("activation", False)]
# Variants whose forward pass is not that of another one; LSQ's treat signed activations as its weights.
FORWARD = [n for n in VARIANTS if not n.endswith(("same start", "unscaled", "ewgs"))]
CASES = [(n, *kind) for n in FORWARD for kind in KINDS if not (n.startswith("lsq ") and kind == ("activation", True))]
CHANNELS = 6


def tensor(signed, seed=0, shape=(4, 5, CHANNELS)):
    x = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    return jnp.asarray(x if signed else np.maximum(x, 0))


def calibrated(quantizer, x, widths, signed):
    return jax.jit(lambda x: quantizer.init(x, widths, signed, (x.ndim - 1,)))(x)


def at(values, widths, bits, x, kind):
    """The values at one bit-width, those of weights shaped as x with channels on its last axis."""
    chosen = {k: at_bits(v, widths, jnp.int32(bits)) for k, v in values.items()}
    if kind == "activation":
        return chosen
    return {k: v.reshape(*v.shape[:-1], *[1] * (x.ndim - 1), v.shape[-1]) if v.ndim else v for k, v in chosen.items()}


def code_range(name, kind, bits, signed):
    if name.startswith("lq_nets"):
        return 0, 2**bits - 1
    symmetric = name.startswith("qil") or name == "lsq narrow" or (name.startswith("pact") and kind == "activation")
    if name == "lsq narrow" and kind == "activation":
        symmetric = False
    return formulas.levels_of(bits, signed, symmetric)


def reference(name, kind):
    """The NumPy formulas of a variant."""
    if name.startswith("lsq"):
        narrow = name == "lsq narrow" and kind == "weight"
        ewgs = 1e-3 if name == "lsq ewgs" else 0.0
        return functools.partial(formulas.lsq, narrow=narrow, ewgs=ewgs, scaled=name != "lsq unscaled")
    if name.startswith("pact") and kind == "activation":
        return formulas.pact
    if name.startswith("lq_nets"):
        return functools.partial(formulas.lq_nets, weight=kind == "weight")
    formula = formulas.qil if name.startswith("qil") else formulas.dorefa
    return functools.partial(formula, rescale=not name.endswith("unit"))


# ---- the contract -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, kind, signed", CASES)
def test_contract(name, kind, signed):
    """On the grid; codes in range and back to the same values; idempotent; jit, vmap over bits and a loop are equal."""
    quantizer = getattr(VARIANTS[name], kind)
    x, widths = tensor(signed), (2, 3, 4)
    values = calibrated(quantizer, x, widths, signed)
    assert set(values) == {*quantizer.leaves, *quantizer.state}
    assert all(v.shape[0] == len(widths) for v in values.values())
    assert all(np.all(np.asarray(values[leaf]) > 0) for leaf in quantizer.leaves)

    def run(bits):
        one = at(values, widths, bits, x, kind)
        codes = quantizer.encode(x, one, bits, signed)
        x_hat = quantizer.fake_quant(x, one, bits, signed)
        return codes, x_hat, decode(codes, quantizer.decoding(x, one, bits, signed)), one

    every = jnp.asarray(widths, jnp.int32)
    compiled = jax.jit(run)
    together = jax.jit(jax.vmap(run))(every)
    for i, bits in enumerate(widths):
        codes, x_hat, decoded, one = compiled(every[i])
        others = [jax.tree.map(lambda leaf, i=i: leaf[i], together)]
        if kind == "weight" and bits == 3:  # not compiled, operation by operation
            others.append(run(jnp.int32(bits)))
        for other in others:
            np.testing.assert_array_equal(codes, other[0])
            np.testing.assert_allclose(x_hat, other[1], rtol=1e-6, atol=1e-7)
        low, high = code_range(name, kind, bits, signed)
        assert codes.dtype == jnp.int32 and codes.min() >= low and codes.max() <= high
        np.testing.assert_array_equal(x_hat, decoded)
        # Two values of one channel differ if and only if their codes do: no more levels than codes.
        for channel in range(CHANNELS):
            pairs = {
                (int(c), float(v))
                for c, v in zip(codes[..., channel].ravel(), x_hat[..., channel].ravel(), strict=True)
            }
            assert len({c for c, _ in pairs}) == len({v for _, v in pairs}) == len(pairs) <= 2**bits
        again(name, kind, quantizer, x, one, bits, signed, x_hat)
        if quantizer.indicator is not None:
            spacing = quantizer.indicator(one, jnp.int32(bits), signed)
            assert spacing.shape == () and float(spacing) > 0
    assert compiled._cache_size() == 1


def again(name, kind, quantizer, x, one, bits, signed, x_hat):
    """Idempotent: the quantizer itself, or its rounding stage on the variable that it rounds (DoReFa, QIL)."""
    bits = jnp.int32(bits)
    if name.startswith("pact") and kind == "weight":
        codes = dorefa_codes(normalised(x)[0], bits)
        top = float(2**bits - 1)
        np.testing.assert_array_equal(dorefa_codes((codes + 2 ** (bits - 1)) / top, bits), codes)
    elif name.startswith("qil"):
        # With c = d = 1/2 and gamma = 1 the transformer leaves [-1, 1] as it is.
        unit = {"centre": jnp.float32(0.5), "half_width": jnp.float32(0.5), "gamma": jnp.float32(1)}
        unit = {leaf: unit[leaf] for leaf in one}
        once = quantizer.fake_quant(x / 2, unit, bits, signed)
        np.testing.assert_array_equal(once, quantizer.fake_quant(once, unit, bits, signed))
    else:
        np.testing.assert_array_equal(x_hat, quantizer.fake_quant(x_hat, one, bits, signed))


@pytest.mark.parametrize("name", QUANTIZERS)
@pytest.mark.parametrize("kind", ["weight", "activation"])
def test_each_bit_lowers_the_error(name, kind):
    """Mean squared error of 1e5 normal weights and half-normal activations, with calibrated parameters.

    Measured against the variable that is rounded: for DoReFa's weights that is tanh(w); they are near w itself only
    where weights are small, which is measured too.
    """
    quantizer, widths = getattr(VARIANTS[name], kind), (2, 3, 4, 5, 6, 7, 8)
    weight, bent = kind == "weight", name == "pact" and kind == "weight"
    x = tensor(True, 1, (1000, 100))
    x = x if weight else jnp.abs(x)

    @jax.jit
    def errors(x):
        values = calibrated(quantizer, x, widths, weight)
        target = jnp.tanh(x) if bent else x

        def error(bits):
            x_hat = quantizer.fake_quant(x, at(values, widths, bits, x, kind), bits, weight)
            return jnp.stack([jnp.square(x_hat - target).mean(), jnp.square(x_hat - x).mean()])

        return jax.lax.map(error, jnp.asarray(widths, jnp.int32)) / jnp.square(x).mean()

    found = np.asarray(errors(x))[:, 0]
    assert (np.diff(found) < 0).all()
    assert found[-1] < 0.02 * found[0]
    if bent:
        assert (np.diff(np.asarray(errors(0.1 * x))[:, 1]) < 0).all()


@pytest.mark.parametrize("name", [n for n in VARIANTS if n.endswith("same start")])
def test_same_start(name):
    """Every layer's grid starts with a spacing of 0.1 / b, whatever the tensor; DoReFa's weights have nothing to start."""
    for kind, signed in KINDS:
        quantizer, x = getattr(VARIANTS[name], kind), jnp.linspace(-3.0 if signed else 0.0, 3.0, 600).reshape(100, 6)
        values = calibrated(quantizer, x, (2, 4), signed)
        for bits in (2, 4) if quantizer.indicator else ():
            spacing = quantizer.indicator(at(values, (2, 4), bits, x, kind), jnp.int32(bits), signed)
            np.testing.assert_allclose(spacing, 0.1 / bits, rtol=1e-5)
            on_grid = quantizer.fake_quant(x, at(values, (2, 4), bits, x, kind), jnp.int32(bits), signed)
            gaps = np.diff(np.unique(np.asarray(on_grid, np.float64).round(6)))
            np.testing.assert_allclose(gaps, 0.1 / bits, rtol=1e-3)


def test_calibrated_grids_are_near_the_best():
    """At 2 bits on a normal: Max's tables (1960) of the least error of 4 levels, 0.1175; evenly spaced, 0.1188.

    LQ-Nets finds four levels; PACT and QIL with three, symmetric ones: 0.1902 (threshold 0.612, outer levels 1.224).
    """
    x = tensor(True, 2, (100_000, 1))
    for make, kind, least in ((lq_nets, "weight", 0.1175), (qil, "weight", 0.1902), (pact, "activation", 0.1902)):
        quantizer = getattr(make(), kind)
        one = at(calibrated(quantizer, x, (2,), True), (2,), 2, x, kind)
        error = float(jnp.square(quantizer.fake_quant(x, one, jnp.int32(2), True) - x).mean())
        assert 0.98 * least < error < 1.03 * least


# ---- the papers' formulas in float64 ------------------------------------------------------------------------------


def made_values(name, kind, bits, rng):
    """Values that clip, prune and bend: the formulas must agree everywhere, not only where training starts."""
    if name.startswith("lsq"):
        return {"step_size": rng.uniform(0.2, 0.5, (1, 1, CHANNELS) if "channel" in name and kind == "weight" else ())}
    if name.startswith("pact"):
        return {"clip": np.float64(1.1)} if kind == "activation" else {}
    if name.startswith("qil"):
        gamma = {"gamma": np.float64(0.8)} if kind == "weight" else {}
        return {"centre": np.float64(0.9), "half_width": np.float64(0.7), **gamma}
    basis = rng.uniform(0.1, 0.6, (bits, 1, 1, CHANNELS) if kind == "weight" else (bits,))
    padding = np.zeros((5 - bits, *basis.shape[1:]))
    return {"basis": np.concatenate([basis, padding])}


@pytest.mark.parametrize(
    "name, kind, signed",
    [case for case in CASES if "power" not in case[0]]
    + [(n, kind, kind == "weight") for n in ("lsq unscaled", "lsq ewgs") for kind in ("weight", "activation")],
)
def test_equals_the_paper_in_float64(name, kind, signed):
    """x_hat, d/dx and d/d of every leaf, for a random gradient of x_hat; finite and equal to NumPy."""
    quantizer, formula = getattr(VARIANTS[name], kind), reference(name, kind)
    rng = np.random.default_rng(3)
    with jax.enable_x64(True):

        @jax.jit
        def pull(x, values, bits, up):
            x_hat, vjp = jax.vjp(lambda x, values: quantizer.fake_quant(x, values, bits, signed), x, values)
            return x_hat, *vjp(up)

        for bits in (2, 3, 5):
            x = rng.normal(size=(4, 5, CHANNELS))
            x, up = x if signed else np.abs(x), rng.normal(size=x.shape)
            values = made_values(name, kind, bits, rng)
            x_hat, d_x, d_values = pull(
                jnp.asarray(x), jax.tree.map(jnp.asarray, values), jnp.int32(bits), jnp.asarray(up)
            )
            expected = formula(x, values, bits, signed, up)
            assert x_hat.dtype == d_x.dtype == jnp.float64 and set(d_values) == set(expected[2])
            for mine, paper in (
                (x_hat, expected[0]),
                (d_x, expected[1]),
                *((d_values[k], expected[2][k]) for k in values),
            ):
                assert np.isfinite(mine).all()
                np.testing.assert_allclose(mine, paper, rtol=1e-9, atol=1e-9)
            assert np.abs(expected[1]).max() > 0


def test_the_ends_of_lsq_s_range_belong_to_it():
    """Values on the outermost grid points have the gradients of the inside, whatever x / s rounds to; the next ones do not."""
    steps = jnp.asarray(np.random.default_rng(1).uniform(1e-3, 3, 300), jnp.float32)
    bits, quantizer = jnp.int32(4), VARIANTS["lsq"].weight

    def gradients(x, s):
        return jax.grad(lambda x, s: quantizer.fake_quant(x[None], {"step_size": s}, bits, True).sum(), (0, 1))(x, s)

    for end in (-8, 7):
        x = steps * end
        d_x, d_s = jax.jit(jax.vmap(gradients))(x, steps)
        assert (d_x == 1).all() and (d_s == 0).all()
        d_x, d_s = jax.jit(jax.vmap(gradients))(jnp.nextafter(x, x * 2), steps)
        np.testing.assert_allclose(d_s, end / np.sqrt(7), rtol=1e-6)
        assert (d_x == 0).all()


def test_ewgs_changes_gradients_alone():
    x, up = tensor(True), tensor(True, 1)
    results = [
        jax.vjp(lambda x, s, q=q: q.weight.fake_quant(x, {"step_size": s}, jnp.int32(3), True), x, jnp.float32(0.4))
        for q in (lsq(), lsq(ewgs=True))
    ]
    np.testing.assert_array_equal(results[0][0], results[1][0])
    (plain, _), (scaled, _) = (vjp(up) for _, vjp in results)
    ratio = np.asarray(scaled)[np.asarray(plain) != 0] / np.asarray(plain)[np.asarray(plain) != 0]
    assert 0.9994 < ratio.min() < 0.9997 and 1.0003 < ratio.max() < 1.0006  # 1 +- 1e-3 / 2


def test_penalty_of_pact():
    penalty = pact(clip_penalty=0.25).activation.penalty
    value, slope = jax.value_and_grad(lambda a: penalty({"clip": a}, jnp.int32(2), False))(jnp.float32(3))
    assert (value, slope) == (0.25 * 3**2, 0.25 * 2 * 3)


def test_fit_of_pact_by_finite_differences():
    """At fixed codes the squared error is smooth in a, and it is continuous where codes change."""
    quantizer = pact().activation
    with jax.enable_x64(True):
        x = jnp.abs(jnp.asarray(np.random.default_rng(5).normal(size=2000)))

        def error(a):
            return jnp.square(quantizer.fit(x, {"clip": a}, jnp.int32(3), False) - x).mean()

        for a in (0.5, 2.0, 6.0):
            difference = (error(jnp.float64(a + 1e-5)) - error(jnp.float64(a - 1e-5))) / 2e-5
            np.testing.assert_allclose(jax.grad(error)(jnp.float64(a)), difference, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    "name, kind", [("lsq", "activation"), ("pact", "activation"), ("qil", "activation"), ("qil", "weight")]
)
def test_fit_leads_to_small_errors(name, kind):
    """The error term alone, with joint training's optimizer, from grids five times too narrow and too wide."""
    quantizer, bits, signed = getattr(VARIANTS[name], kind), jnp.int32(3), kind == "weight"
    x = tensor(True, 6, (5000,))
    x = x if signed else jnp.abs(x)
    best = {leaf: v[0] for leaf, v in quantizer.init(x, (3,), signed, ()).items()}
    optimizer = optimizers.log_space(optax.adam(optax.cosine_decay_schedule(0.1, 300), b2=0.95))

    def error(values):
        return jnp.square(quantizer.fit(x, values, bits, signed) - x).mean()

    @jax.jit
    def end(values):
        def step(carry, _):
            values, state = carry
            updates, state = optimizer.update(jax.grad(error)(values), state, values)
            return (optax.apply_updates(values, updates), state), None

        (values, _), _ = jax.lax.scan(step, (values, optimizer.init(values)), length=300)
        return values, error(values)

    for factor in (0.2, 5.0):
        values, after = end({leaf: v if leaf == "gamma" else factor * v for leaf, v in best.items()})
        assert float(after) < 1.1 * float(error(best)), factor
        assert all(float(v) > 0 for v in values.values())


def test_unit_forms_differ_by_their_factor():
    """As in the papers, [-1, 1]; in the units of x, times M = max|tanh(w)| (DoReFa) or c + d (QIL)."""
    x, bits = tensor(True), jnp.int32(3)
    wide, unit = (pact(rescale=r).weight.fake_quant(x, {}, bits, True) for r in (True, False))
    np.testing.assert_allclose(wide, unit * np.abs(np.tanh(x)).max(), rtol=1e-6)
    assert float(jnp.abs(unit).max()) == 1
    values = {"centre": jnp.float32(0.9), "half_width": jnp.float32(0.7), "gamma": jnp.float32(1.2)}
    wide, unit = (qil(rescale=r).weight.fake_quant(x, values, bits, True) for r in (True, False))
    np.testing.assert_allclose(wide, unit * 1.6, rtol=1e-6)
    assert float(jnp.abs(unit).max()) == 1


# ---- LQ-Nets' state -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, signed", KINDS)
def test_lq_nets_update_equals_numpy(kind, signed):
    """The least-squares update with its moving average, channel by channel; padding stays zero; the error falls."""
    quantizer = getattr(lq_nets(), kind)
    rng = np.random.default_rng(4)
    x = np.asarray(tensor(signed), np.float64)
    with jax.enable_x64(True):
        update = jax.jit(lambda basis, bits: quantizer.update(jnp.asarray(x), {"basis": basis}, bits, signed)["basis"])
        for bits in (2, 4):
            basis = made_values("lq_nets", kind, bits, rng)["basis"]
            new = np.asarray(update(jnp.asarray(basis), jnp.int32(bits)))
            assert new.shape == basis.shape and (new[bits:] == 0).all()
            for c in range(CHANNELS if kind == "weight" else 1):
                column = (slice(bits), 0, 0, c) if kind == "weight" else slice(bits)
                own = x[..., c] if kind == "weight" else x
                expected = formulas.lq_nets_update(own.ravel(), basis[column], signed)
                np.testing.assert_allclose(new[column], expected, rtol=1e-9, atol=1e-12)

            def error(basis, bits=bits):
                x_hat = quantizer.fake_quant(jnp.asarray(x), {"basis": basis}, jnp.int32(bits), signed)
                return float(jnp.square(x_hat - x).mean())

            errors = [error(jnp.asarray(basis))]
            for _ in range(30):
                new = update(jnp.asarray(new), jnp.int32(bits))
                errors.append(error(new))
            assert errors[-1] < 0.8 * errors[0] and errors[-1] <= min(errors) * 1.001


def test_lq_nets_where_the_codes_determine_nothing():
    """Fewer elements than bits, a tensor of zeros, a code bit that is never set: finite, and kept."""
    quantizer = lq_nets().weight

    @jax.jit
    def run(x):
        values = at(quantizer.init(x, (6,), True, (1,)), (6,), 6, x, "weight")
        new = quantizer.update(x, values, jnp.int32(6), True)
        return quantizer.fake_quant(x, values, jnp.int32(6), True), new["basis"]

    for x in (tensor(True, shape=(3, 2)), jnp.zeros((3, 2))):
        x_hat, new = run(x)
        assert np.isfinite(new).all()
        np.testing.assert_allclose(x_hat, x, atol=0.02)
    activation = lq_nets().activation
    basis = jnp.array([0.1, 0.2, 100.0])
    new = jax.jit(lambda x: activation.update(x, {"basis": basis}, jnp.int32(3), False))(tensor(False))["basis"]
    np.testing.assert_allclose(new[2], 100.0, rtol=1e-3)


# ---- LSQ's own ----------------------------------------------------------------------------------------------------


def test_lsq_step_size_gradient_by_finite_differences():
    """Between two rounding points x_hat is linear in s at fixed codes: there the true derivative is the code."""
    x = jnp.array([0.26, 0.9, -1.3, 5.0], jnp.float32)  # codes at s = 0.5, 3 bits: 1, 2, -3, 3
    quantizer = lsq(gradient_scale=False).weight

    def total(s):
        return quantizer.fake_quant(x, {"step_size": s}, jnp.int32(3), True).sum()

    codes = np.asarray(quantizer.encode(x, {"step_size": jnp.float32(0.5)}, jnp.int32(3), True))
    np.testing.assert_array_equal(codes, [1, 2, -3, 3])
    difference = (total(jnp.float32(0.501)) - total(jnp.float32(0.499))) / 0.002
    np.testing.assert_allclose(difference, codes.sum(), rtol=1e-3)
    # LSQ's rule is the code minus x/s where x is not clipped: the straight-through part of d x_hat / d s.
    expected = codes.sum() - np.asarray(x[:3]).sum() / 0.5
    np.testing.assert_allclose(jax.grad(total)(jnp.float32(0.5)), expected, rtol=1e-5)


def test_starts_equal_limpq():
    """methods of LIMPQ's code, recomputed in NumPy."""
    w = np.random.default_rng(1).normal(0.1, 0.5, (3, 3, 4, 8)).astype(np.float32)
    a = np.abs(w)
    widths = (2, 4, 6)
    mean, std = w.astype(np.float64).mean(), w.astype(np.float64).std()
    expected_w = [max(abs(mean - 3 * std), abs(mean + 3 * std)) / 2 ** (b - 1) for b in widths]
    expected_a = [2 * np.abs(a).mean() / np.sqrt(2**b - 1) for b in widths]
    np.testing.assert_allclose(
        lsq().weight.init(jnp.asarray(w), widths, True, (3,))["step_size"], expected_w, rtol=1e-5
    )
    found = lsq().activation.init(jnp.asarray(a), widths, False, ())["step_size"]
    np.testing.assert_allclose(found, expected_a, rtol=1e-5)
    same = lsq("same").weight.init(jnp.asarray(w), widths, True, (3,))["step_size"]
    np.testing.assert_allclose(same, [0.1 / b for b in widths], rtol=1e-6)
    per_channel = lsq(per_channel=True).weight.init(jnp.asarray(w), widths, True, (3,))["step_size"]
    mean, std = w.mean((0, 1, 2)), w.std((0, 1, 2))
    expected = np.maximum(np.abs(mean - 3 * std), np.abs(mean + 3 * std)) / 2
    np.testing.assert_allclose(per_channel[0], expected, rtol=1e-4)


def test_power_of_two():
    quantizer = lsq(power_of_two=True).weight
    x_hat = quantizer.fake_quant(jnp.array([0.3, 0.7]), {"step_size": jnp.float32(0.3)}, jnp.int32(4), True)
    np.testing.assert_array_equal(x_hat, [0.25, 0.75])


def test_a_start_that_does_not_exist():
    for make in QUANTIZERS.values():
        with pytest.raises(ValueError, match="statistics"):
            make("zero")
