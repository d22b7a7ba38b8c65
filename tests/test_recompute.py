"""recompute: gradients against a formula, in both forms; what XLA plans for a step with it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from mpq_jax import joint, recompute, row_policies
from mpq_jax.quantized_model import quantize

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_gradients_are_the_formula_s(backend, dtype, monkeypatch):
    """Of sum(n x^2 y) for rows under vmap: 2 n x y and n x^2; the integers n have none. Both forms run on CPU."""
    monkeypatch.setattr(recompute, "on_cpu", lambda: backend == "cpu")
    x, y, n = jnp.asarray([[1, 2], [3, -4]], dtype), jnp.asarray([3, 0.5], dtype), jnp.asarray([2, 5])
    again = recompute.recomputed(lambda moving, still: still * moving["x"] ** 2 * moving["y"])

    def loss(moving):
        return jax.vmap(lambda x, n: again({"x": x, "y": moving["y"]}, n).sum())(moving["x"], n).sum()

    value, gradients = jax.jit(jax.value_and_grad(loss))({"x": x, "y": y})
    assert value == 2 * (3 + 2) + 5 * (27 + 8) and gradients["x"].dtype == dtype
    np.testing.assert_array_equal(gradients["x"].astype(float), [[12, 4], [90, -20]])
    np.testing.assert_array_equal(gradients["y"].astype(float), [2 + 45, 8 + 80])


def test_apart_is_a_program_of_its_own():
    """A sum that two products take is in XLA's program once, in a branch; its value is that of the function."""
    x = jnp.arange(6.0).reshape(2, 3)

    @jax.jit
    def run(x):
        found = recompute.apart(lambda x: {"double": 2 * x, "count": jnp.int32(3)}, x)
        return jnp.sin(found["double"]).sum() + jnp.cos(found["double"]).sum() + found["count"]

    np.testing.assert_allclose(run(x), np.sin(2 * np.asarray(x)).sum() + np.cos(2 * np.asarray(x)).sum() + 3, rtol=1e-6)
    assert run.lower(x).compile().as_text().count(" conditional(") == 1


@pytest.mark.parametrize("rows_at_a_time", [0, 1])
def test_recomputing_takes_less_memory(rows_at_a_time):
    """What XLA plans for a step of three convolutions on large images, beside its arguments and results."""

    class Convolutions(nn.Module):
        @nn.compact
        def __call__(self, x, train=False):
            for i in range(3):
                x = nn.relu(nn.BatchNorm(use_running_average=not train)(nn.Conv(8, (3, 3), name=f"conv{i}")(x)))
            return nn.Dense(3, name="head")(x.mean((1, 2)))

    batch = {"image": jnp.ones((8, 32, 32, 2)), "label": jnp.arange(8) % 3}
    quantized = quantize(Convolutions(), batch["image"], bit_widths=(2, 3, 4))
    variables = Convolutions().init(jax.random.key(0, impl="rbg"), batch["image"])
    variables = jax.jit(quantized.calibrate)(variables, batch["image"])
    state = joint.init_state(variables, optax.sgd(0.1), 3)

    uniform = row_policies.uniform_rows(quantized.layers, (2, 3, 4), (2, 3, 4))

    def planned(recompute):
        step = joint.make_step(
            quantized, joint.classification(), optax.sgd(0.1), rows_at_a_time=rows_at_a_time, recompute=recompute
        )
        lowered = jax.jit(step).lower(state, batch, jax.random.key(0), uniform)
        return lowered.compile().memory_analysis().temp_size_in_bytes

    assert planned(True) < 0.85 * planned(False)
