"""The quantizers once more, in NumPy and float64, written from their papers' formulas: values, codes, gradients.

Each takes x, the values at one bit-width, b and whether x can be negative, and the gradient `up` of x_hat; and returns
x_hat, d/dx and {leaf: d/d leaf}. It knows neither JAX nor mpq_jax.
"""

import itertools

import numpy as np


def levels_of(bits, signed, narrow=False):
    """(lowest code, highest code)."""
    if not signed:
        return 0, 2**bits - 1
    return -(2 ** (bits - 1)) + narrow, 2 ** (bits - 1) - 1


def lsq(x, values, bits, signed, up, narrow=False, ewgs=0.0, scaled=True):
    """Esser et al. 2020, equations 1 to 5; EWGS: Lee et al. 2021 in place of the straight-through estimator."""
    s = values["step_size"]
    low, high = levels_of(bits, signed, narrow)
    v = x / s
    inside = (v >= low) & (v <= high)
    codes = np.round(np.clip(v, low, high))
    d_round = up * (1 + ewgs * np.sign(up) * (v - np.round(v))) * inside  # of what goes into the rounding, times s
    # x_hat = s round(clip(x / s)): by the product rule s itself, then through the rounding.
    d_s = up * codes - d_round * v
    axes = tuple(i for i in range(x.ndim) if np.ndim(s) and s.shape[i] == 1) if np.ndim(s) else None
    g = 1 / np.sqrt(high * x.size / np.size(s)) if scaled else 1.0
    return codes * s, d_round, {"step_size": g * d_s.sum(axis=axes, keepdims=bool(np.ndim(s)))}


def pact(x, values, bits, signed, up):
    """Choi et al. 2018, equations 1 to 3; signed: the same on both sides of zero."""
    a = values["clip"]
    n = 2 ** (bits - 1) - 1 if signed else 2**bits - 1
    low = -a if signed else 0.0
    y = np.clip(x, low, a)
    d_x = up * ((x >= low) & (x < a))
    d_a = (up * (x >= a)).sum() - (up * (x < low)).sum() * signed
    return np.round(y * n / a) * a / n, d_x, {"clip": d_a}


def dorefa(w, values, bits, signed, up, rescale=True):
    """Zhou et al. 2016, equations 5 and 9, with the maximum's own derivative; rescale: times M."""
    t, n = np.tanh(w), 2**bits - 1
    at = np.unravel_index(np.abs(t).argmax(), t.shape)
    m = np.abs(t[at])
    unit = 2 * np.round(n * (t / (2 * m) + 0.5)) / n - 1
    scale = m if rescale else 1.0
    d_t = up * scale / m
    d_m = (up * (rescale * unit - scale * t / m**2)).sum()
    d_t[at] += d_m * np.sign(t[at])
    return scale * unit, d_t * (1 - t**2), {}


def qil(x, values, bits, signed, up, rescale=True):
    """Jung et al. 2019, equations 1 to 4; rescale: times c + d, by the product rule."""
    c, d, gamma = values["centre"], values["half_width"], values.get("gamma", 1.0)
    q = 2 ** (bits - 1) - 1 if signed else 2**bits - 1
    u = 0.5 / d * np.abs(x) - 0.5 * c / d + 0.5
    inside = (u > 0) & (u < 1)
    base = np.where(inside, u, 0.5)
    unit = np.sign(x) * np.round(np.where(inside, base**gamma, u >= 1) * q) / q
    scale = c + d if rescale else 1.0
    slope = inside * gamma * base ** (gamma - 1) * scale * up  # of u, but for the sign of x
    from_scale = (up * unit).sum() * rescale
    leaves = {
        "centre": (slope * np.sign(x) * -0.5 / d).sum() + from_scale,
        "half_width": (slope * np.sign(x) * -0.5 * (np.abs(x) - c) / d**2).sum() + from_scale,
        "gamma": (up * np.sign(x) * scale * inside * base**gamma * np.log(base)).sum(),
    }
    return scale * unit, slope * 0.5 / d, {name: leaves[name] for name in values}


def basis_codes(bits, signed):
    """[2^b, b]: every e, the code's lowest bit first."""
    every = np.array(list(itertools.product((0, 1), repeat=bits)))[:, ::-1]
    return 2 * every - 1 if signed else every


def lq_nets(x, values, bits, signed, up, weight=False):
    """Zhang et al. 2018: the nearest of all 2^b levels, one by one; basis [b] or, for weights, [b, 1, ..., C]."""
    codes = basis_codes(bits, signed)
    basis = values["basis"][:bits]
    levels = np.tensordot(codes, basis, 1)  # [2^b, ...]
    levels = levels.reshape(len(codes), *([1] * (x.ndim + 1 - levels.ndim)), *levels.shape[1:])
    nearest = np.abs(x - levels).argmin(0)
    x_hat = np.take_along_axis(np.broadcast_to(levels, (len(codes), *x.shape)), nearest[None], 0)[0]
    d_x = up if weight else up * (x <= levels.max()) * ((x >= levels.min()) if signed else 1)
    return x_hat, d_x, {"basis": np.zeros_like(values["basis"])}


def lq_nets_update(x, basis, signed, momentum=0.9, epsilon=1e-4):
    """[b]: 0.9 v + 0.1 v*, v* the regression (with a pull of epsilon an element towards v) of x [N] on its nearest codes. basis: [b]."""
    every = basis_codes(len(basis), signed)
    codes = every[np.abs(x[:, None] - every @ basis).argmin(1)]
    gram, pull = codes.T @ codes, epsilon * len(x)
    star = np.linalg.solve(gram + pull * np.eye(len(basis)), codes.T @ x + pull * basis)
    return momentum * basis + (1 - momentum) * star
