"""Trained weights of a user's own model: from its factory, or from a file or folder of flat or nested Flax paths."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.flax
from flax import serialization

from mpq_jax import flax_seam
from mpq_jax.factories import told
from mpq_jax.float_model import FloatModel
from mpq_jax.trial import plain
from mpq_jax.types import Refusal

ADVICE = (
    "give a .safetensors file of Flax paths (params/conv1/kernel), a .msgpack file of flax.serialization, "
    "or an orbax checkpoint's folder"
)


def owned(model: FloatModel, shapes: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The variables that a factory gave beside its Linen module, as this module has them. shapes: of its variables.

    Raises Refusal for leaves that are missing, left over, or of another shape.
    """
    given = flat(plain(model.variables))
    return _filled(given, shapes, f"the variables of --model {name}")


def load(path: str | Path, variables: Mapping[str, Any]) -> dict[str, Any]:
    """`variables` with every leaf taken from a file of the same tree: its "params", or all collections.

    An NNX model's file may be of `nnx.to_pure_dict(nnx.state(model))`: one tree of all its variables. Of what a training
    state holds besides ("step", "opt_state", …) nothing is taken; collections of random streams stay as they are.
    Raises Refusal for a file that is no such thing, and for leaves that are missing, left over, or of another shape.
    """
    path = Path(path)
    if not path.exists():
        raise Refusal(f"{path} does not exist; {ADVICE}")
    try:
        given = _read(path)
    except Refusal:
        raise
    except Exception as error:
        raise Refusal(f"{path} cannot be read ({told(error)}); {ADVICE}") from None
    return _filled(given, variables, str(path))


def flat(tree: Mapping[str, Any]) -> dict[str, Any]:
    """{"params/conv1/kernel": array}; the "value" that NNX states have below each path left out."""
    return {flax_seam.plain(key).removesuffix("/value"): value for key, value in flax_seam.flatten(tree).items()}


def _read(path: Path) -> dict[str, Any]:
    if path.is_dir():
        import orbax.checkpoint as ocp

        # A folder of checkpoints, as a run's pretrain/ is: the newest one's.
        if steps := [each for each in path.iterdir() if each.name.isdigit() and each.is_dir()]:
            path = max(steps, key=lambda each: int(each.name))
        path = path / "default" if (path / "default").is_dir() else path
        with ocp.PyTreeCheckpointer() as reader:
            return flat(_numbered(reader.restore(path.absolute())))
    if path.suffix == ".safetensors":
        return {key.replace(".", "/"): value for key, value in safetensors.flax.load_file(path).items()}
    if path.suffix in (".msgpack", ".flax"):
        return flat(serialization.msgpack_restore(path.read_bytes()))
    raise Refusal(f"{path} ends in {path.suffix or 'nothing'!r}; {ADVICE}")


def _numbered(tree: Any) -> Any:
    """Lists as dicts of numbered names, as Flax paths have them."""
    if isinstance(tree, Mapping):
        return {str(key): _numbered(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return {str(i): _numbered(value) for i, value in enumerate(tree)}
    return tree


def _filled(given: Mapping[str, Any], variables: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The given arrays in the place of `variables`' leaves."""
    collections = {name: flax_seam.flatten(tree) for name, tree in variables.items()}
    whole = any(key.startswith("params/") for key in given)
    result: dict[str, dict[str, Any]] = {}
    taken = set()
    for name, leaves in collections.items():
        result[name] = {}
        if name.startswith("Rng"):  # an NNX model's random streams: as it started them
            result[name] = leaves
            taken |= {f"{name}/{path}" for path in leaves} | set(leaves)
            continue
        for path, leaf in leaves.items():
            own = flax_seam.plain(path)
            key = next((k for k in (f"{name}/{own}", *(() if whole else (own,))) if k in given), None)
            if key is None:
                near = min(given, default="nothing", key=lambda k: (k.rpartition("/")[2] != own.rpartition("/")[2], k))
                raise Refusal(f"{where} lack {name}/{own}; they have {len(given)} arrays, such as {near}")
            taken.add(key)
            result[name][path] = _as(given[key], leaf, f"{where}: {key}")
    left = [key for key in given if key not in taken and (not whole or key.partition("/")[0] in collections)]
    if left:
        raise Refusal(
            f"{where} have {left[0]}, which the model has not ({len(left)} such); give this model's own weights"
        )
    return {name: flax_seam.unflatten(leaves) for name, leaves in result.items()}


def _as(value: Any, leaf: Any, what: str) -> Any:
    if np.shape(value) != tuple(leaf.shape):
        raise Refusal(
            f"{what} has shape {list(np.shape(value))}, the model needs {list(leaf.shape)}; make the model with the "
            "options (classes, width, input size) that these weights were trained with"
        )
    return jnp.asarray(value, leaf.dtype)
