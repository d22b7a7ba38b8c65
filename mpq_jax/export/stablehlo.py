"""A quantized model as one StableHLO program (jax.export): weights inside as integer codes, for any batch size.

Activations are fake-quantized with the learned grids and everything else is as in the float model, so that the program
gives what `QuantizedModel.apply` gives, up to what compilers round differently.
"""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import export
from jax.interpreters import partial_eval

from mpq_jax.export.coded import Coded, coded, from_codes
from mpq_jax.export.graph import of_any_batch
from mpq_jax.files import whole
from mpq_jax.types import Policy, QuantizedModel, Refusal

PLATFORMS = ("cpu", "cuda", "tpu")
MADE_BY = "mpq_jax.export.stablehlo.save(path, stablehlo(model, variables, policy, sample_shape))"
_DIGEST = hashlib.sha256().digest_size


def stablehlo(
    model: QuantizedModel,
    variables: Any,
    policy: Policy,
    sample_shape: Sequence[int],
    dtype: Any = jnp.float32,
    *,
    batch: int | None = None,
    platforms: Sequence[str] = PLATFORMS,
    packed: bool = True,
    **kwargs: Any,
) -> export.Exported:
    """The program x [B, *sample_shape] -> outputs of `model.apply(variables, policy, x, **kwargs)`.

    batch: a fixed B; None: any. kwargs: of the model's call, e.g. train=False.
    packed: weight codes of up to 2 and up to 4 bits share bytes and are unpacked by shifts: the file is as small as
        they are. False: those of up to 4 bits are int4 or uint4 constants, which StableHLO's file format stores with a
        byte each. Codes of 5 to 8 bits are int8 (or uint8), wider ones int16 either way.
    Raises Refusal for a policy of another model, variables that were not calibrated, and a model that cannot be traced
    for every batch size at once.
    """
    sample = jax.ShapeDtypeStruct((batch or 1, *sample_shape), dtype)
    program = make_program(
        model, variables, coded(model, variables, policy, sample, packed, **kwargs), sample, **kwargs
    )
    size = export.symbolic_shape("batch")[0] if batch is None else batch
    try:
        with of_any_batch():
            return export.export(jax.jit(program), platforms=platforms)(
                jax.ShapeDtypeStruct((size, *sample_shape), dtype)
            )
    except jax.core.InconclusiveDimensionOperation as error:
        raise Refusal(
            f"the model cannot be traced for every batch size at once ({str(error).splitlines()[0]}); give one, e.g. batch=64"
        ) from None


def make_program(
    model: QuantizedModel, variables: Any, codes: Coded, sample: Any, **kwargs: Any
) -> Callable[[Any], Any]:
    """x -> outputs, with the codes and those variables that are still needed beside them as constants."""
    handler = from_codes(model, codes.containers)

    def run(variables: Any, x: Any) -> Any:
        return model.walk(variables, codes.values, handler, (x,), kwargs)[0]

    leaves, treedef = jax.tree.flatten(variables)
    jaxpr = jax.make_jaxpr(run)(variables, sample).jaxpr
    # A kernel whose codes stand in for it is an argument that nothing reads. Which are read, JAX's own dead code
    # elimination tells, also through scans.
    read = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))[1]

    def program(x: Any) -> Any:
        kept = [leaf if used else _stand_in(leaf) for leaf, used in zip(leaves, read, strict=False)]
        return run(jax.tree.unflatten(treedef, kept), x)

    return program


def _stand_in(leaf: Any) -> Any:
    """Something of the leaf's shape that is no constant of the program; keys of random streams stay, they are small."""
    return leaf if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else jnp.zeros(leaf.shape, leaf.dtype)


# ---- files --------------------------------------------------------------------------------------------------------


def save(path: str | Path, exported: export.Exported) -> int:
    """Writes the program, whole or not at all; returns the file's bytes.

    The file is what jax.export.deserialize reads, and a SHA-256 of it behind.
    """
    content = bytes(exported.serialize())
    content += hashlib.sha256(content).digest()
    with whole(path) as temporary:
        temporary.write_bytes(content)
    return len(content)


def load(path: str | Path) -> export.Exported:
    """The program of a file that `save` wrote; `load(path).call(x)` runs it.

    Raises Refusal for a file that is missing, cut short or changed.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise Refusal(f"{path} cannot be read: {error.strerror}; make it with: {MADE_BY}") from None
    program, digest = content[:-_DIGEST], content[-_DIGEST:]
    if hashlib.sha256(program).digest() != digest:
        raise Refusal(f"{path} is no whole StableHLO file of ours: its checksum differs; make it again with: {MADE_BY}")
    return export.deserialize(bytearray(program))
