"""The only file that knows Linen and NNX: a model becomes a pure function of {collection: nested dict of arrays}."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from flax import linen, nnx, traverse_util

from mpq_jax.float_model import FLAGS
from mpq_jax.types import Refusal, Variables

Mutable = Sequence[str] | bool  # the collections whose updates are wanted; True: all
Rngs = jax.Array | Mapping[str, jax.Array] | None


class Seam(NamedTuple):
    """A user's model as pure functions.

    shapes(inputs, kwargs) -> variables as jax.ShapeDtypeStruct.
    run(variables, inputs, kwargs, mutable, rngs) -> (outputs, updates): `updates` holds the collections in `mutable`.
    variables: the model's own variables where it carries them (NNX), else None.
    """

    shapes: Callable[[Sequence[Any], Mapping[str, Any]], Variables]
    run: Callable[[Variables, Sequence[Any], Mapping[str, Any], Mutable, Rngs], tuple[Any, Variables]]
    variables: Variables | None


def seam(model: Any) -> Seam:
    """The seam of a Linen or an NNX model. Raises Refusal for anything else."""
    if isinstance(model, linen.Module):
        return _linen(model)
    if isinstance(model, nnx.Module):
        return _nnx(model)
    raise Refusal(f"{type(model).__name__} is neither a flax.linen.Module nor a flax.nnx.Module; pass one of these")


def flatten(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Nested dict -> {"a/b/c": leaf}. A "/" inside of a name (flax.linen.WeightNorm has them) is written "~1", "~" "~0"."""
    flat = traverse_util.flatten_dict(dict(tree))
    return {"/".join(part.replace("~", "~0").replace("/", "~1") for part in path): leaf for path, leaf in flat.items()}


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """{"a/b/c": leaf} -> nested dict; the inverse of `flatten`."""
    return traverse_util.unflatten_dict({tuple(map(plain, path.split("/"))): x for path, x in flat.items()})


def plain(path: str) -> str:
    """A path of `flatten` with the slashes in its names as they are, as others write it."""
    return path.replace("~1", "/").replace("~0", "~")


def mutable_collections(variables: Variables) -> list[str]:
    """Every collection but the parameters: what a forward pass in training may change."""
    return [name for name in variables if name != "params"]


def _linen(model: linen.Module) -> Seam:
    def shapes(inputs: Sequence[Any], kwargs: Mapping[str, Any]) -> Variables:
        rngs = {name: jax.random.key(0) for name in ("params", "dropout")}
        # Only arrays are abstracted: flags such as train=True stay Python values.
        arrays, rebuild = split_arrays((tuple(inputs), dict(kwargs)))

        def init(arrays: Sequence[Any]) -> Any:
            args, kwargs = rebuild(arrays)
            return model.init(rngs, *args, **kwargs)

        return jax.eval_shape(init, arrays)

    def run(
        variables: Variables, inputs: Sequence[Any], kwargs: Mapping[str, Any], mutable: Mutable, rngs: Rngs
    ) -> tuple[Any, Variables]:
        keys = dict(rngs) if isinstance(rngs, Mapping) else rngs
        if mutable:
            return model.apply(variables, *inputs, mutable=mutable, rngs=keys, **kwargs)
        return model.apply(variables, *inputs, rngs=keys, **kwargs), {}

    return Seam(shapes, run, None)


def _nnx(model: nnx.Module) -> Seam:
    graph, state = nnx.split(model)
    flat = nnx.to_flat_state(state)
    # Where each NNX path stands among our collections, e.g. ("conv1", "kernel") -> params, "conv1/kernel".
    places = {path: (_collection(variable), "/".join(map(str, path))) for path, variable in flat}
    takes = inspect.signature(type(model).__call__).parameters

    def gather(state: Any) -> Variables:
        collections: dict[str, dict[str, Any]] = {}
        for path, variable in nnx.to_flat_state(state):
            if path not in places:
                continue  # sown by the call
            collection, name = places[path]
            collections.setdefault(collection, {})[name] = variable.get_value()
        return {name: unflatten(flat) for name, flat in collections.items()}

    def scatter(variables: Variables) -> Any:
        flat_variables = {name: flatten(tree) for name, tree in variables.items()}
        leaves = []
        for path, variable in flat:
            collection, name = places[path]
            leaves.append((path, variable.replace(flat_variables[collection][name])))
        return nnx.from_flat_state(leaves)

    def run(
        variables: Variables, inputs: Sequence[Any], kwargs: Mapping[str, Any], mutable: Mutable, rngs: Rngs
    ) -> tuple[Any, Variables]:
        if isinstance(rngs, jax.Array) or rngs:  # a key alone has no truth value
            raise Refusal("an NNX model carries its own random streams; leave rngs out")
        merged = nnx.merge(graph, scatter(variables))
        kwargs = dict(kwargs)
        for flag in [flag for flag in FLAGS if flag in kwargs]:
            # NNX keeps the mode in the modules; a call that takes a flag may look at either.
            merged.train() if kwargs[flag] == FLAGS[flag] else merged.eval()
            if flag not in takes:
                kwargs.pop(flag)
        outputs = merged(*inputs, **kwargs)
        updates = gather(nnx.state(merged)) if mutable else {}
        wanted = list(updates) if mutable is True else (mutable or [])
        return outputs, {name: updates[name] for name in wanted if name in updates}

    variables = gather(state)

    def shapes(inputs: Sequence[Any], kwargs: Mapping[str, Any]) -> Variables:
        del inputs, kwargs
        return jax.eval_shape(lambda: variables)

    return Seam(shapes, run, variables)


def _collection(variable: Any) -> str:
    """Linen's name of an NNX variable's type: params, batch_stats, ..."""
    for kind, name in ((nnx.Param, "params"), (nnx.BatchStat, "batch_stats"), (nnx.Cache, "cache")):
        if isinstance(variable, kind) or variable.type is kind:
            return name
    return variable.type.__name__


def split_arrays(tree: Any) -> tuple[list[Any], Callable[[Sequence[Any]], Any]]:
    """The arrays in a tree of arguments, and a function that puts others in their place."""
    leaves, treedef = jax.tree.flatten(tree)
    is_array = [hasattr(leaf, "shape") and hasattr(leaf, "dtype") for leaf in leaves]

    def rebuild(arrays: Sequence[Any]) -> Any:
        given = iter(arrays)
        return jax.tree.unflatten(
            treedef, [next(given) if a else leaf for leaf, a in zip(leaves, is_array, strict=True)]
        )

    return [leaf for leaf, a in zip(leaves, is_array, strict=True) if a], rebuild
