"""model.safetensors: a model's weights as packed integers, everything else as it is, and what it takes to run it.

Tensors, all little-endian:
  <layer path>.codes                 uint8: the weight's codes (bits.py), in the order of the weight's elements
  <layer path>.scale, .offset, .table, .bits, .activation.<leaf>, .multiplier, .shift   where they are more than a number
  params/…, batch_stats/…            what the rest of the network reads: biases, normalisation, layers left in float
Metadata: "format", "version", "config" (JSON of the run), "quantizer", "layers" (JSON, see `Entry`), "sha256".
"""

import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from mpq_jax import flax_seam
from mpq_jax.export import checks
from mpq_jax.export.bits import pack, payload_bytes, unpack
from mpq_jax.export.encoding import Weight
from mpq_jax.export.fold import fold
from mpq_jax.export.graph import Constant, Graph, Product, graph
from mpq_jax.files import whole
from mpq_jax.layers import MAX_BITS, leaf_paths
from mpq_jax.types import Bits, Decoding, QuantizedModel, Refusal

FORMAT, VERSION = "mpq-packed", "1"
MADE_BY = "python -m mpq_jax.export --workdir …"
LARGEST_HEADER = 16 * 2**20
MOST_AXES = 5  # of a weight whose axes are looked for in another order


class Line(NamedTuple):
    """One line of the size table: a layer's weight, or another tensor. bits: "3", "2.50" (a mean) or "float"."""

    name: str
    bits: str
    elements: int
    bytes: int


class Sizes(NamedTuple):
    """Bytes of a packed file. weights: the layers' payloads; others: every other tensor; header: with its length."""

    weights: tuple[Line, ...]
    others: tuple[Line, ...]
    header: int

    @property
    def weight_bytes(self) -> int:
        """Bytes of all payloads: what a size budget counts."""
        return sum(line.bytes for line in self.weights)

    @property
    def file_bytes(self) -> int:
        """Bytes of the file."""
        return self.weight_bytes + sum(line.bytes for line in self.others) + self.header


# ---- writing ------------------------------------------------------------------------------------------------------


def save(path: str | Path, network: Graph, quantizer: str, variables: Any, config: Mapping[str, Any]) -> Sizes:
    """Writes the file, whole or not at all. -> its sizes

    network: of one sample; folded or not. variables: that it was made with. config: of the run, JSON.
    Raises Refusal for a model whose header would pass 16 MiB: some 20,000 layers.
    """
    tensors: dict[str, np.ndarray] = {}
    layers: list[dict[str, Any]] = []
    first: dict[str, Product] = {}
    for node in network.products:
        assert node.product is not None
        if not any(entry["path"] == node.product.path for entry in layers):
            layers.append(_entry(node.product, tensors))
            first[node.product.path] = node.product
        elif not _is_same(first[node.product.path], node.product):
            raise Refusal(
                f"layer {node.product.path!r} is used in ways that no order of its axes relates; leave it in float with "
                "a rule, or export --formats stablehlo"
            )
        elif node.product.affine is not None:
            raise Refusal(
                f"layer {node.product.path!r} runs more than once, each time with other things folded in; "
                "leave out --fold"
            )
    flat = _flat(variables)
    for name in sorted(_needed(network)):
        tensors[name] = np.asarray(flat[name])
    metadata = {
        "format": FORMAT,
        "version": VERSION,
        "quantizer": quantizer,
        "config": json.dumps(config),
        "layers": json.dumps(layers, separators=(",", ":")),
    }
    metadata["sha256"] = _digest(metadata, tensors)
    with whole(path) as temporary:
        save_file(tensors, str(temporary), metadata)
        header = int.from_bytes(temporary.read_bytes()[:8], "little") + 8
        if header > LARGEST_HEADER:
            raise Refusal(f"the header of {path} would have {header:,} bytes; {LARGEST_HEADER:,} is the most")
    return sizes(path)


def _entry(product: Product, tensors: dict[str, np.ndarray]) -> dict[str, Any]:
    """A layer's metadata; arrays go to `tensors`, numbers stay."""
    path = product.path
    entry: dict[str, Any] = {
        "path": path,
        "leaf": product.leaf,
        "position": list(product.position),
        "shape": list(product.operand.shape),
        "layout": "leaf" if product.whole else "product",
        "dtype": product.operand.dtype.name,
    }

    def keep(name: str, value: Any) -> None:
        value = np.asarray(value)
        if value.size == 1:
            entry[name] = float(str(value.ravel()[0])) if value.dtype.kind == "f" else int(value.ravel()[0])
        else:
            tensors[f"{path}.{name}"] = value

    weight = product.weight
    if weight is None:
        tensors[f"{path}.weight"] = product.operand
    else:
        bits = np.asarray(product.bits.w, np.uint8)
        keep("bits", bits)
        entry["signed"] = weight.decoding.table is None
        codes = weight.codes
        if bits.ndim:
            entry["channel_axes"] = list(product.channel_axes)
            codes = np.moveaxis(codes, product.channel_axes, range(len(product.channel_axes))).reshape(len(bits), -1)
        tensors[f"{path}.codes"] = pack(codes, bits if bits.ndim else int(bits))
        if weight.decoding.table is not None:
            keep("table", weight.decoding.table)
        else:
            keep("scale", weight.decoding.scale)
            keep("offset", weight.decoding.offset)
    if product.activation is not None:
        entry["activation_bits"], entry["activation_signed"] = product.activation.bits, product.activation.signed
        for name, value in product.activation.values.items():
            keep(f"activation.{name}", value)
    if product.affine is not None:
        entry["folded"] = True
        keep("multiplier", product.affine[0])
        keep("shift", product.affine[1])
    return entry


def _is_same(stored: Product, later: Product) -> bool:
    """Whether what a later call multiplies with is what a reader will make of the stored codes."""
    one, other = (x.operand if x.weight is None else x.weight for x in (stored, later))
    # Only of a weight that is the parameter itself does the reader see what the later call does with it.
    if stored.whole:
        order = _order(stored.operand, later.operand)
    else:
        order = range(stored.operand.ndim) if stored.operand.shape == later.operand.shape else None
    if order is None:
        return False
    found = [np.asarray(x) for x in jax.tree.leaves(_in_order(one, order))]
    wanted = [np.asarray(x) for x in jax.tree.leaves(other)]
    return len(found) == len(wanted) and all(map(np.array_equal, found, wanted))


def _order(stored: np.ndarray, wanted: np.ndarray) -> Sequence[int] | None:
    """The order of a stored array's axes that makes it the wanted one; None where there is none."""
    orders = itertools.permutations(range(stored.ndim)) if stored.ndim <= MOST_AXES else [tuple(range(stored.ndim))]
    same = (order for order in orders if np.array_equal(np.transpose(stored, order), wanted))
    return next(same, None)


def _in_order(weight: Weight | np.ndarray, order: Sequence[int]) -> Weight | np.ndarray:
    """A weight with its axes in another order, and its decoding with it."""
    order = tuple(order)
    if not isinstance(weight, Weight):
        return np.transpose(weight, order)
    ndim = len(order)

    def moved(x: Any, ahead: int) -> Any:
        """A decoding's array that has the weight's axes, behind `ahead` of its own."""
        if x is None or np.ndim(x) != ndim + ahead:
            return x
        return np.transpose(x, (*range(ahead), *(i + ahead for i in order)))

    scale, offset, table = weight.decoding
    return Weight(np.transpose(weight.codes, order), Decoding(moved(scale, 0), moved(offset, 0), moved(table, 1)))


def _needed(network: Graph) -> set[str]:
    """The variables that something else than a layer's weight is made of."""
    values = [i for node in network.nodes for i in node.inputs] + list(network.outputs)
    return {leaf for value in values if isinstance(value, Constant) for leaf in value.leaves}


def _flat(variables: Any) -> dict[str, Any]:
    return {f"{c}/{p}": leaf for c, tree in variables.items() for p, leaf in flax_seam.flatten(tree).items()}


def _digest(metadata: Mapping[str, str], tensors: Mapping[str, np.ndarray]) -> str:
    """SHA-256 of everything: metadata, then each tensor's name, type, shape and bytes."""
    digest = hashlib.sha256(json.dumps({k: v for k, v in sorted(metadata.items()) if k != "sha256"}).encode())
    for name in sorted(tensors):
        value = np.ascontiguousarray(tensors[name])
        digest.update(f"{name} {value.dtype.str} {value.shape}".encode())
        digest.update(value.tobytes())
    return digest.hexdigest()


# ---- reading ------------------------------------------------------------------------------------------------------


class File(NamedTuple):
    """A packed file, read and checked. layers: their metadata, by path."""

    path: Path
    quantizer: str
    config: dict[str, Any]
    layers: dict[str, dict[str, Any]]
    tensors: dict[str, np.ndarray]

    def get(self, layer: str, name: str) -> Any:
        """A number or an array of a layer; None where it has none such."""
        value = self.layers[layer].get(name)
        return self.tensors.get(f"{layer}.{name}") if value is None else np.asarray(value)

    def weight(self, layer: str) -> Weight:
        """The codes of a layer's weight, in its own shape, and their decoding."""
        entry = self.layers[layer]
        shape, bits = entry["shape"], self.get(layer, "bits")
        codes = unpack(self.tensors[f"{layer}.codes"], bits, int(np.prod(shape, dtype=np.int64)), entry["signed"])
        if bits.ndim:
            axes = entry["channel_axes"]
            rest = [n for i, n in enumerate(shape) if i not in axes]
            codes = np.moveaxis(codes.reshape(*[shape[i] for i in axes], *rest), range(len(axes)), axes)
        table = self.get(layer, "table")
        if table is not None:
            return Weight(codes.reshape(shape), Decoding(table=table))
        scale, offset = (np.asarray(self.get(layer, name), np.float32) for name in ("scale", "offset"))
        return Weight(codes.reshape(shape), Decoding(scale, offset))

    def weight_or_values(self, layer: str) -> Weight | np.ndarray:
        """The codes; of a layer in float its weight."""
        return self.tensors[f"{layer}.weight"] if self.get(layer, "bits") is None else self.weight(layer)

    def bits(self, layer: str) -> Bits:
        """The policy's bits of a layer."""
        w, a = self.get(layer, "bits"), self.layers[layer].get("activation_bits", 32)
        return Bits(32 if w is None else tuple(int(b) for b in w) if w.ndim else int(w), a)


def load(path: str | Path) -> File:
    """Reads a packed file. Raises Refusal for one that is damaged, edited, or no such file."""
    path = Path(path)
    if not path.is_file():
        raise Refusal(f"{path} does not exist; make it with: {MADE_BY}")
    try:
        with safe_open(str(path), "numpy") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, TypeError, KeyError) as error:
        raise Refusal(f"{path} is damaged or no safetensors file ({error}); make it again with: {MADE_BY}") from None
    if metadata.get("format") != FORMAT:
        raise Refusal(f"{path} is no packed model (its format is {metadata.get('format')!r}); make one with: {MADE_BY}")
    if metadata.get("version") != VERSION:
        raise Refusal(f"{path} is of version {metadata.get('version')!r}, this program reads version {VERSION}")
    if _digest(metadata, tensors) != metadata.get("sha256"):
        raise Refusal(f"{path} was changed after it was written (its checksum differs); make it again with: {MADE_BY}")
    config, layers = checks.parsed(path, metadata, tensors)
    return File(path, metadata["quantizer"], config, layers, tensors)


def sizes(path: str | Path) -> Sizes:
    """What is in a packed file, to the byte."""
    file = load(path)
    weights, others = [], []
    for layer, entry in file.layers.items():
        elements = int(np.prod(entry["shape"], dtype=np.int64))
        bits = file.get(layer, "bits")
        shown = "float" if bits is None else f"{bits.mean():.2f}" if bits.ndim else str(bits)
        name = f"{layer}.weight" if bits is None else f"{layer}.codes"
        weights.append(Line(layer, shown, elements, file.tensors[name].nbytes))
        assert bits is None or weights[-1].bytes == payload_bytes(bits, elements)
    taken = {f"{layer}.{kind}" for layer in file.layers for kind in ("weight", "codes")}
    for name, value in sorted(file.tensors.items()):
        if name not in taken:
            others.append(Line(name, value.dtype.name, value.size, value.nbytes))
    with open(path, "rb") as opened:
        header = int.from_bytes(opened.read(8), "little") + 8
    found = Sizes(tuple(weights), tuple(others), header)
    assert found.file_bytes == Path(path).stat().st_size
    return found


# ---- back into Flax -----------------------------------------------------------------------------------------------


def restore(file: File, model: QuantizedModel, shapes: Any) -> tuple[dict[str, Any], dict[str, Bits]]:
    """(variables, policy) of a packed file for the model it was made of.

    shapes: the variables' shapes, with the quantizer's leaves (jax.eval_shape of `model.calibrate`). Weights hold the values that
    their codes stand for; run them as they are, with  apply(variables, policy, x, float_bits=True)  and weight bits of 32.
    What the file does not hold is NaN: nothing reads it.
    Raises Refusal for a file of another model, and for one that no parameters can stand for: with layers that others are
    folded into, with weights that the model makes of a parameter, or that are a parameter that something else reads as it was.
    """
    for path, entry in file.layers.items():
        if (why := _no_parameter(file, path, entry)) is not None:
            raise Refusal(
                f"no parameters can stand for {file.path}: layer {path!r} {why}; run the file with "
                "mpq_jax.export.packed.network and replay.run"
            )
    return _own_or_refused(file, model, shapes)


def _no_parameter(file: File, path: str, entry: Mapping[str, Any]) -> str | None:
    """Why a layer's parameter cannot hold what its codes stand for; None where it can."""
    kept = f"params/{entry['leaf']}" in file.tensors
    if entry.get("folded"):
        return "has what follows it folded in"
    if kept and file.get(path, "bits") is not None:
        return "has a parameter that something else reads as it was"
    if entry["layout"] != "leaf" and not kept:
        return "has a weight that the model makes of its parameter"
    return None


def _own_or_refused(file: File, model: QuantizedModel, shapes: Any) -> tuple[dict[str, Any], dict[str, Bits]]:
    try:
        return _restored(file, model, shapes)
    except (KeyError, IndexError, ValueError, TypeError) as error:
        raise Refusal(f"{file.path} belongs to another model: {error}") from None


def _restored(file: File, model: QuantizedModel, shapes: Any) -> tuple[dict[str, Any], dict[str, Bits]]:
    paths = {layer.path for layer in model.layers if layer.path in {p for s in model.specs.values() for p in s.paths}}
    if paths != set(file.layers):
        odd = min(paths ^ set(file.layers))
        raise Refusal(f"{file.path} belongs to another model: layer {odd!r} is in only one of them")
    if file.quantizer != model.quantizer.name:
        raise Refusal(f"{file.path} was quantized with {file.quantizer}, the model with {model.quantizer.name}")
    flat = {name: _blank(leaf) for name, leaf in _flat(shapes).items()}
    for name in flat:
        if name in file.tensors:
            if file.tensors[name].shape != flat[name].shape:
                raise Refusal(f"{file.path} belongs to another model: {name!r} has another shape")
            flat[name] = file.tensors[name].astype(flat[name].dtype)
    policy = {}
    for spec in model.specs.values():
        for kind in spec.names:
            for place in leaf_paths(spec, model.quantizer, kind).values():
                flat[f"params/{place}"][:] = 1
        for path in spec.paths:
            policy[path] = file.bits(path)
            _restore_layer(file, path, spec, model, flat)
    nested: dict[str, dict[str, Any]] = {}
    for name, value in flat.items():
        collection, _, place = name.partition("/")
        nested.setdefault(collection, {})[place] = jnp.asarray(value)
    return {c: flax_seam.unflatten(tree) for c, tree in nested.items()}, policy


def _blank(leaf: Any) -> Any:
    """What stands for a variable that the file does not hold: NaN; random streams of NNX models, which nothing draws from."""
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jnp.broadcast_to(jax.random.key(0, impl=jax.random.key_impl(jnp.empty((), leaf.dtype))), leaf.shape)
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        return leaf if isinstance(leaf, (np.ndarray, jax.Array)) else np.zeros(leaf.shape, leaf.dtype)
    return np.full(leaf.shape, np.nan, leaf.dtype)


def _restore_layer(file: File, path: str, spec: Any, model: QuantizedModel, flat: dict[str, Any]) -> None:
    entry = file.layers[path]
    position = tuple(entry["position"])
    if entry["layout"] == "leaf" and f"params/{spec.leaf}" not in file.tensors:
        flat[f"params/{spec.leaf}"][position] = values(file, path)
    a = file.bits(path).a
    for name, place in leaf_paths(spec, model.quantizer, "activation").items() if a <= MAX_BITS else ():
        # The file has one width: the others' entries are never used.
        flat[f"params/{place}"][position] = file.get(path, f"activation.{name}")


def values(file: File, path: str) -> np.ndarray:
    """A layer's weight in float: what its codes stand for. NumPy alone."""
    if file.get(path, "bits") is None:
        return file.tensors[f"{path}.weight"]
    codes, decoding = file.weight(path)
    dtype = file.layers[path]["dtype"]
    if decoding.table is None:
        return ((codes + decoding.offset) * decoding.scale).astype(np.float32).astype(dtype)
    table = decoding.table
    if table.ndim == 1:
        return table[codes].astype(dtype)
    return np.take_along_axis(np.broadcast_to(table, (len(table), *codes.shape)), codes[None], 0)[0].astype(dtype)


def network(file: File, model: QuantizedModel, shapes: Any, *inputs: Any, **kwargs: Any) -> Graph:
    """The graph of a packed file, for `replay.run`; folded where the file is. inputs: as `graph.graph` takes them."""
    variables, policy = _own_or_refused(file, model, shapes)
    folded = any(entry.get("folded") for entry in file.layers.values())

    def weight(path: str, operand: np.ndarray) -> Weight | np.ndarray:
        """What a call multiplies with: the file's weight, with its axes in the order that this call has them in."""
        found = file.weight_or_values(path)
        entry = file.layers[path]
        if entry["layout"] != "leaf":
            return found
        # A parameter that something else reads as well is there as it was.
        leaf = file.tensors.get(f"params/{entry['leaf']}")
        order = _order(values(file, path) if leaf is None else leaf[tuple(entry["position"])], operand)
        return found if order is None else _in_order(found, order)

    made = graph(model, variables, policy, *inputs, packed=weight, **kwargs)
    if not folded:
        return made
    nodes = []
    for node in fold(made).nodes:
        product = node.product
        if product is not None and product.affine is not None:
            multiplier, shift = (
                np.asarray(file.get(product.path, name), np.float32) for name in ("multiplier", "shift")
            )
            node = node._replace(product=product._replace(affine=(multiplier, shift)))
        nodes.append(node)
    return made._replace(nodes=tuple(nodes))
