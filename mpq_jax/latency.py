"""Measures how long each layer of a config's model takes at its candidate bit-widths, on the device that JAX runs on.

python -m mpq_jax.latency --config configs/digits.py --out latency.json [--batch 1] [--rounds 11]
python search.py --workdir runs/digits --latency latency.json --budget latency=3ms

A pair of widths costs what the narrowest product costs that holds both and that the device really has: each of int4,
int8, bfloat16 and float32 is compiled for each shape, and its result compared with NumPy. Layers are measured alone, as
JAX's own operations with results in 32 bits: no fusion with what stands between them, no packing or rescaling of codes.
Only CPUs have run this; JAX_PLATFORMS chooses the device.
"""

import argparse
import contextlib
import os
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from mpq_jax import command_line
from mpq_jax import config as config_lib
from mpq_jax.files import check_out, write_json
from mpq_jax.types import Bits, Layer, Refusal

if TYPE_CHECKING:
    from mpq_jax.products import ProductShape, Times, Use

FLOAT = Bits(32, 32)
SLOWER = 1.05  # less is noise


class Entry(NamedTuple):
    """What a pair of widths costs in a layer, and the kernel that runs it."""

    ms: float
    kernel: str


# layer path -> pair of widths -> entry
Table = dict[str, dict[Bits, Entry]]


# ---- the table ----------------------------------------------------------------------------------------------------


def pairs_of(layer: Layer, bit_widths: Sequence[int], activation_bit_widths: Sequence[int]) -> list[Bits]:
    """The pairs that a table has for a layer: every candidate or its own fixed bits, and float."""
    if layer.bits is not None:
        return list(dict.fromkeys([layer.bits, FLOAT]))
    weights = sorted({*bit_widths, *(layer.weight_bit_widths or ())})
    activations = sorted({*activation_bit_widths, *(layer.activation_bit_widths or ())})
    return [*(Bits(w, a) for w in weights for a in activations), FLOAT]


def layer_times(uses: Sequence["Use"], measured: Mapping["ProductShape", "Times"]) -> dict[str, float]:
    """Kernel name -> milliseconds of one layer: the medians of its products, summed. Kernels that all of them have."""
    names = [name for name in measured[uses[0].product].rounds if all(name in measured[u.product].rounds for u in uses)]
    return {name: sum(u.runs * float(np.median(measured[u.product].rounds[name])) for u in uses) for name in names}


def table(
    layers: Sequence[Layer],
    uses: Mapping[str, Sequence["Use"]],
    measured: Mapping["ProductShape", "Times"],
    bit_widths: Sequence[int],
    activation_bit_widths: Sequence[int],
) -> Table:
    """Every layer's pairs, each with the time of the kernel that runs it."""
    from mpq_jax.products import kernel_for

    result: Table = {}
    for layer in layers:
        times = layer_times(uses[layer.path], measured)
        result[layer.path] = {}
        for bits in pairs_of(layer, bit_widths, activation_bit_widths):
            name = kernel_for(bits, times, uses[layer.path][0].own)
            result[layer.path][bits] = Entry(times[name], name)
    return result


def to_json(
    entries: Table,
    uses: Mapping[str, Sequence["Use"]],
    measured: Mapping["ProductShape", "Times"],
    provenance: Mapping[str, Any],
) -> dict[str, Any]:
    """The file's value. Beside "layers", which searches read: which kernel each pair runs as, and what was measured."""

    def keyed(take: Callable[[Entry], Any]) -> dict[str, dict[str, Any]]:
        return {path: {f"{b.w},{b.a}": take(entry) for b, entry in row.items()} for path, row in entries.items()}

    def of(product: "ProductShape") -> dict[str, Any]:
        found = measured[product]
        quarters = {name: np.quantile(rounds, (0.25, 0.5, 0.75)) for name, rounds in found.rounds.items()}
        return {
            "product": str(product),
            "layers": [path for path, its in uses.items() if any(use.product == product for use in its)],
            "calls": found.calls,
            "ms": {name: _digits(three[1]) for name, three in quarters.items()},
            "quartiles": {name: [_digits(three[0]), _digits(three[2])] for name, three in quarters.items()},
            "missing": found.missing,
        }

    return {
        "format": "mpq-latency",
        "version": 1,
        "unit": "ms",
        **provenance,
        "layers": keyed(lambda entry: _digits(entry.ms)),
        "kernels": keyed(lambda entry: entry.kernel),
        "measured": [of(product) for product in measured],
    }


def _digits(milliseconds: float) -> float:
    """Five digits: no measurement has more."""
    return float(f"{milliseconds:.5g}")


# ---- for people ---------------------------------------------------------------------------------------------------


def report(
    layers: Sequence[Layer],
    entries: Table,
    uses: Mapping[str, Sequence["Use"]],
    measured: Mapping["ProductShape", "Times"],
) -> str:
    """Milliseconds of every layer in every kernel, which widths share one, and what uniform policies add up to."""
    from mpq_jax.products import KERNELS

    times = {layer.path: layer_times(uses[layer.path], measured) for layer in layers}
    names = [kernel.name for kernel in KERNELS if any(kernel.name in row for row in times.values())]
    texts = {path: " + ".join(f"{u.runs} of " * (u.runs > 1) + str(u.product) for u in uses[path]) for path in times}
    first, last = max(map(len, [*times, "layer"])), max(map(len, texts.values()))
    lines = [f"{'layer':{first}}  {'product':{last}}" + "".join(f"  {name:>9}" for name in names) + "  (ms)"]
    for path, row in times.items():
        cells = "".join(f"  {row[name]:9.4f}" if name in row else f"  {'-':>9}" for name in names)
        lines.append(f"{path:{first}}  {texts[path]:{last}}{cells}")
    lines += ["", *_missing(measured), *_shared(entries), *_slower(times), "", *_uniform(layers, entries)]
    return "\n".join(lines)


def _missing(measured: Mapping["ProductShape", "Times"]) -> list[str]:
    lines = []
    for name in dict.fromkeys(name for found in measured.values() for name in found.missing):
        reasons = [found.missing[name] for found in measured.values() if name in found.missing]
        lines.append(f"{name} is missing here for {len(reasons)} of {len(measured)} products: {reasons[0][:160]}")
    return lines


def _shared(entries: Table) -> list[str]:
    """Which widths share a kernel: the wider one of a pair chooses it, in every layer alike if all have the same ones."""
    groups: list[tuple[dict[int, str], list[str]]] = []
    for path, row in entries.items():
        chosen = {max(bits): entry.kernel for bits, entry in row.items()}
        for known, paths in groups:
            if all(known.get(width, name) == name for width, name in chosen.items()):
                known.update(chosen)
                paths.append(path)
                break
        else:
            groups.append((chosen, [path]))
    lines = []
    for chosen, paths in groups:
        where = "all layers" if len(groups) == 1 else ", ".join(paths[:3]) + (", …" if len(paths) > 3 else "")
        texts = []
        for name in dict.fromkeys(chosen[width] for width in sorted(chosen)):
            widths = [width for width in sorted(chosen) if chosen[width] == name]
            texts.append(f"{', '.join('float' if width == max(FLOAT) else str(width) for width in widths)} as {name}")
        lines.append(f"widths (the wider of a pair): {'; '.join(texts)} ({where})")
    candidates = [{entry.kernel for bits, entry in row.items() if bits != FLOAT} for row in entries.values()]
    if all(len(names) <= 1 for names in candidates):
        lines.append("all candidates of a layer share one kernel: no latency budget can tell them apart on this device")
    return lines


def _slower(times: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Where fewer bits take longer, noise aside."""
    lines = []
    for name in ("int4", "int8", "bfloat16"):
        having = [row for row in times.values() if name in row]
        if slow := sum(row[name] > SLOWER * row["float32"] for row in having):
            lines.append(f"{name} takes longer than float32 in {slow} of {len(having)} layers on this device")
    return lines


def _uniform(layers: Sequence[Layer], entries: Table) -> list[str]:
    """The sum over layers at each uniform width, fixed layers at theirs; and all in float."""
    searched = [set(entries[layer.path]) for layer in layers if layer.searched]
    everywhere = sorted(b for b in set.intersection(*searched) if b.w == b.a) if searched else []
    lines = []
    for bits in everywhere:
        total = sum(entries[layer.path][bits if layer.searched else layer.bits or FLOAT].ms for layer in layers)
        if bits != FLOAT:
            lines.append(f"uniform W{bits.w}A{bits.a}  {total:.4f} ms")
    return [*lines, f"all in float  {sum(entries[layer.path][FLOAT].ms for layer in layers):.4f} ms"]


# ---- the command --------------------------------------------------------------------------------------------------


def provenance(batch: int, rounds: int) -> dict[str, Any]:
    """The device, versions and settings that a table was measured with."""
    import jax
    import jaxlib

    device = jax.devices()[0]
    kind = _processor() if device.platform == "cpu" else device.device_kind
    return {
        "device": kind,
        "platform": device.platform,
        "cores": os.cpu_count(),
        "versions": {"python": platform.python_version(), "jax": jax.__version__, "jaxlib": jaxlib.__version__},
        "batch": batch,
        "rounds": rounds,
    }


def _processor() -> str:
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:
        for line in file:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, config_lib.Config]:
    """Arguments and config; refuses what can be refused before JAX is imported."""
    parser = command_line.Parser("python -m mpq_jax.latency", __doc__)
    add = parser.add_argument
    command_line.add_model(parser)
    add("--out", required=True, type=Path, help="where the table is written, e.g. latency.json")
    add("--batch", type=int, default=1, help="samples at a time; times are of the whole batch (default 1)")
    add("--rounds", type=int, default=11, help="times that each kernel is measured, interleaved (default 11)")
    command_line.add_help(parser)
    arguments, rest = parser.parse_known_args(argv)
    command_line.refuse_misspelt(rest, ("--config", "--model", "--data", "--out", "--batch", "--rounds"), parser.prog)
    for name in ("batch", "rounds"):
        if getattr(arguments, name) < 1:
            raise Refusal(f"--{name} is {getattr(arguments, name)}; write a positive integer, e.g. --{name} 4")
    config = command_line.of_model(arguments, rest)
    check_out(arguments.out, (arguments.config,))
    return arguments, config


def run(arguments: argparse.Namespace, config: config_lib.Config, clock: Callable[[], float]) -> None:
    """Measures the config's model, prints the table, writes the file."""
    from mpq_jax import build, products, trial

    features, num_classes = build.features(config)
    source = build.float_model(config, num_classes)
    model = build.quantized(config, source, features)
    variables = trial.shapes(source, build.example(source, features), config.model.name)
    inputs = build.example(source, features, arguments.batch)
    uses = products.uses(model, variables, *inputs, **(source.eval_kwargs or {}))
    made = provenance(arguments.batch, arguments.rounds)
    print(f"{made['device']} ({made['platform']}), jax {made['versions']['jax']}, batch {made['batch']}", flush=True)
    measured = products.measure((u.product for its in uses.values() for u in its), arguments.rounds, clock)
    entries = table(model.layers, uses, measured, model.bit_widths, model.activation_bit_widths)
    print(f"{len(model.layers)} layers, {len(measured)} different products; medians of {arguments.rounds} rounds\n")
    print(report(model.layers, entries, uses, measured))
    try:
        write_json(arguments.out, to_json(entries, uses, measured, made))
    except OSError as error:
        raise Refusal(f"{arguments.out} cannot be written: {error.strerror}; give another --out") from None
    print(f"\nlatency table: {arguments.out}")


def main(argv: Sequence[str] | None = None, clock: Callable[[], float] = time.perf_counter) -> int:
    """The command. -> exit code: 0; 2 for a Refusal, 130 for an interruption, each said in one line."""
    try:
        run(*parse(argv), clock)
    except Refusal as refusal:
        print(f"error: {refusal}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
