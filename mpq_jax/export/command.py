"""What `python -m mpq_jax.export` does: writes the files, compares them with the model, measures a file."""

import argparse
import dataclasses
import functools
import importlib.util
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mpq_jax import config as config_lib
from mpq_jax import costs, data, factories, stages
from mpq_jax.config import Config
from mpq_jax.export import c_header, packed, replay
from mpq_jax.export.fold import fold
from mpq_jax.export.graph import Graph, graph
from mpq_jax.files import whole, write_text
from mpq_jax.pipeline import finetuned
from mpq_jax.tasks import answer_of
from mpq_jax.types import Bits, Refusal

BATCH = 250  # images at a time, operation by operation


def write(config: Config, arguments: argparse.Namespace) -> None:
    """All files of the formats that were asked for, each whole or not at all."""
    needs = {"onnx": ("onnx",), "qonnx": ("onnx",), "qwix": ("qwix",)}
    for name in arguments.formats:
        for package in needs.get(name, ()):
            if importlib.util.find_spec(package) is None:
                raise Refusal(f"--formats {name} needs the package {package}; type: pip install {package}")
    run, variables, policy = finetuned(config, arguments.workdir, arguments.policy)
    made = Made(run, variables, policy, config, arguments)
    for name in arguments.formats:
        print(f"{name}: {WRITERS[name](made)}")


class Made(NamedTuple):
    """What every writer gets: the run, the fine-tuned variables and their policy, the config, and the command's options."""

    run: stages.Run
    variables: Any
    policy: dict[str, Bits]
    config: Config
    options: argparse.Namespace

    def at(self, form: str) -> tuple[Any, ...]:
        """What the writers of one input take: model, variables, policy, the input's shape and type. Raises Refusal for a model that `form` cannot be made of."""
        inputs = self.run.example()
        if len(inputs) != 1:
            raise Refusal(f"--formats {form} takes models of one input, this one has {len(inputs)}; packed takes any")
        if inputs[0].dtype != jnp.float32 and form in ("onnx", "qonnx"):
            raise Refusal(
                f"--formats {form} takes models of float32 input, this one takes {inputs[0].dtype} (tokens, say); "
                "packed and stablehlo take any"
            )
        return self.run.model, self.variables, self.policy, inputs[0].shape[1:], inputs[0].dtype

    @property
    def kwargs(self) -> Any:
        return self.run.task().eval_kwargs


def _packed(made: Made) -> str:
    run, options = made.run, made.options
    network = graph(run.model, made.variables, made.policy, *run.example(), **made.kwargs)
    path = options.out / "model.safetensors"
    network = fold(network) if options.fold else network
    found = packed.save(path, network, run.model.quantizer.name, made.variables, _kept(made.config))
    print("\n".join(table(found)))
    if options.c_header:
        write_text(options.out / "model.h", c_header.header(packed.load(path)))
        print(f"C header: {options.out / 'model.h'}")
    if options.check != 0:
        check_file(path, run, made.variables, made.policy, options.check)
    promised = costs.size(run.model.layers, made.policy)
    same = "as the search promised" if promised == found.weight_bytes else f"the search promised {promised:,}"
    return f"{path}, {found.file_bytes:,} bytes, weights {found.weight_bytes:,} ({same})"


def _stablehlo(made: Made) -> str:
    from mpq_jax.export.stablehlo import save, stablehlo

    path = made.options.out / "model.stablehlo"
    return f"{path}, {save(path, stablehlo(*made.at('stablehlo'), **made.kwargs)):,} bytes"


def _onnx(made: Made) -> str:
    from mpq_jax.export.onnx import save, standard

    path = made.options.out / "model.onnx"
    save(standard(*made.at("onnx")[:-1], **made.kwargs), path)
    return f"{path}, {path.stat().st_size:,} bytes"


def _qonnx(made: Made) -> str:
    from mpq_jax.export.onnx import qonnx, save

    path = made.options.out / "model.qonnx"
    save(qonnx(*made.at("qonnx")[:-1], **made.kwargs), path)
    return f"{path}, {path.stat().st_size:,} bytes (weights are floats on their grids, as QONNX has them)"


def _qwix(made: Made) -> str:
    from mpq_jax.export.qwix_rules import qwix_rules

    found = qwix_rules(made.run.model, made.policy, widths=(8, 4))
    lines = ["import qwix", "", "rules = ["]
    for rule in found.rules.values():
        kinds = f"weight_qtype={rule.weight_qtype!r}, act_qtype={rule.act_qtype!r}"
        lines.append(f"    qwix.QuantizationRule(module_path={rule.module_path!r}, {kinds}),")
    path = made.options.out / "qwix_rules.py"
    write_text(path, "\n".join([*lines, "]", *(f"# not in Qwix: {line}" for line in found.lines()), ""]))
    return f"{path}, {len(found.rules)} layers; not in Qwix: {len(found.refused)}, named in the file"


def _litert(made: Made) -> str:
    from mpq_jax.export.litert import litert

    found = litert(*made.at("litert"), **made.kwargs)
    path = made.options.out / "model.tflite"
    with whole(path) as temporary:
        temporary.write_bytes(found.content)
    kept = f"; in float: {', '.join(found.in_float)}" if found.in_float else ""
    return f"{path}, {len(found.content):,} bytes (batch 1{kept})"


WRITERS = {
    "packed": _packed,
    "stablehlo": _stablehlo,
    "onnx": _onnx,
    "qonnx": _qonnx,
    "qwix": _qwix,
    "litert": _litert,
}


KEPT = ("seed", "data", "model", "quantize")


def _kept(config: Config) -> dict[str, Any]:
    """What making the model and reading its data again takes, as JSON."""
    return {key: value for key, value in config_lib.to_json(config).items() if key in KEPT}


def table(sizes: packed.Sizes) -> list[str]:
    """The bytes of a packed file, line by line."""
    width = max(len(line.name) for line in (*sizes.weights, *sizes.others))
    lines = [f"{'weights':{width}}  {'bits':>7}  {'elements':>12}  {'bytes':>12}"]
    lines += [f"{x.name:{width}}  {x.bits:>7}  {x.elements:12,}  {x.bytes:12,}" for x in sizes.weights]
    lines += ["", f"{'other tensors':{width}}  {'type':>7}  {'elements':>12}  {'bytes':>12}"]
    lines += [f"{x.name:{width}}  {x.bits:>7}  {x.elements:12,}  {x.bytes:12,}" for x in sizes.others]
    others = sum(line.bytes for line in sizes.others)
    lines += ["", f"weights {sizes.weight_bytes:,} + other tensors {others:,} + header {sizes.header:,} bytes"]
    return lines


# ---- comparing ----------------------------------------------------------------------------------------------------


def _examples(run: stages.Run, limit: int | None) -> Iterator[dict[str, np.ndarray]]:
    """Batches of the test split, or of its first `limit` examples, without the padding of the last one."""
    for batch in data.eval_batches(run.dataset, "test", BATCH, limit=limit):
        batch = {key: np.asarray(value) for key, value in batch.items()}
        real = batch["valid"] if "valid" in batch else batch["label"] >= 0
        yield {key: value[real] for key, value in batch.items()}


def _images(run: stages.Run, limit: int | None) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
    """(inputs, labels where the run classifies), as `replay.compare` takes them."""
    for batch in _examples(run, limit):
        yield batch[run.source.inputs[0]], batch["label"] if run.source.loss is None else None


def check_file(path: Path, run: stages.Run, variables: Any, policy: Any, limit: int | None) -> None:
    """Runs the file with integers, against the model with exact products and against the ordinary fake-quantized one.

    Where integers cannot hold it, fake-quantized against that.
    """
    if len(run.source.inputs) != 1:
        print(f"not compared with the model: it has {len(run.source.inputs)} inputs")
        return
    file, shapes, kwargs = packed.load(path), _shapes(run), run.task().eval_kwargs
    structure = _outputs(run)
    answer = answer_of(structure)

    @functools.cache
    def from_file(count: int) -> Graph:
        return packed.network(file, run.model, shapes, *run.example(count), **kwargs)

    @functools.cache
    def from_model(count: int) -> Graph:
        made = graph(run.model, variables, policy, *run.example(count), **kwargs)
        return fold(made) if any(entry.get("folded") for entry in file.layers.values()) else made

    how, shown = _arithmetic(from_file(1))
    against = {"exact=True": replay.exact, "fake-quantized": replay.fake_quantized}
    if how is not replay.integer:
        del against["exact=True"]
    others = [replay.runner(from_model, other, answer) for other in against.values()]
    compared = replay.compare(replay.runner(from_file, how, answer), others, _images(run, limit))
    for name, found in zip(against, compared, strict=True):
        print(f"{shown} against {name}: {_text(found)}")
    for layer, (differ, count) in compared[-1].codes.items():
        if differ:
            print(f"  {layer}: {differ:,} of {count:,} codes differ")


def _arithmetic(network: Graph) -> tuple[replay.Arithmetic, str]:
    """(how a file's network is run, what that is called): with integers, or where those cannot hold it fake-quantized."""
    try:
        rounded = replay.inexact(network)
    except Refusal as refusal:
        print(f"note: not run with integers: {str(refusal).partition(';')[0]}")
        return replay.fake_quantized, "the file fake-quantized"
    for found in rounded:
        print(f"note: sums of {found.path} may reach {found.largest:,}: above 2^24 float32 rounds, integers do not")
    return replay.integer, "integers"


def _text(found: replay.Differences) -> str:
    flips, answers = found.top1
    what = "images" if found.accuracy is not None else "answers"
    text = f"{found.differing:,} of {found.all_codes:,} codes differ, top-1 differs on {flips:,} of {answers:,} {what}"
    if found.accuracy is not None:
        text += f"; accuracy {found.accuracy[0]:.2%} and {found.accuracy[1]:.2%}"
    return text


def _shapes(run: stages.Run) -> Any:
    """Shapes of the variables, the quantizer's leaves with them."""
    kwargs = run.task().eval_kwargs
    return jax.eval_shape(lambda v, x: run.model.calibrate(v, *x, **kwargs), run.variables, run.example())


def _outputs(run: stages.Run) -> Any:
    """The structure of the model's outputs, which a graph has in a row."""
    kwargs = run.task().eval_kwargs
    return jax.tree.structure(
        jax.eval_shape(lambda v, x: run.model.apply(v, None, *x, **kwargs), run.variables, run.example())
    )


# ---- measuring a file ---------------------------------------------------------------------------------------------


def config_of(file: packed.File, overrides: Sequence[str]) -> Config:
    """The config that a packed file was made with, and overrides.

    Raises Refusal for one that is none, and for a file that names a model or data of its own, whose code would be run,
    unless --model.name and --data.name say that it may.
    """
    try:
        theirs = config_lib.from_json(file.config)
    except (KeyError, TypeError, ValueError) as error:
        raise Refusal(f"{file.path} is not of this program ({error}); export it again") from None
    # All weights are in the file; it names no other to be read.
    config = dataclasses.replace(theirs, model=dataclasses.replace(theirs.model, weights=""))
    config = config_lib.override(config, overrides)
    given = {word.partition("=")[0] for word in overrides}
    for option, name in (("--model.name", config.model.name), ("--data.name", config.data.name)):
        if factories.is_factory(name) and option not in given:
            raise Refusal(f"{file.path} names {name!r}, whose code would be run; if it is yours, add {option} {name}")
    if config.model.name != theirs.model.name:
        raise Refusal(f"{file.path} is of the model {theirs.model.name!r}, not of {config.model.name!r}")
    return config


def evaluate(path: Path, overrides: Sequence[str], limit: int | None) -> float:
    """The accuracy of a packed file on its test set, run with integers, or fake-quantized where those cannot hold it.

    limit: how many images; None: all.

    Raises Refusal where the model's task calls nothing right.
    """
    file = packed.load(path)
    config = config_of(file, overrides)
    run = stages.open_run(config, path.parent)
    if not run.has_accuracy:
        raise Refusal(
            f"the model of {path} calls nothing right, so that it has no accuracy; give its FloatModel a correct=…"
        )
    shapes, task, structure = _shapes(run), run.task(), _outputs(run)
    make = functools.lru_cache(maxsize=4)(
        lambda count: packed.network(file, run.model, shapes, *run.example(count), **task.eval_kwargs)
    )
    how, shown = _arithmetic(make(1))
    right, examples = 0.0, 0
    for batch in _examples(run, limit):
        inputs = task.inputs(batch)
        network = make(len(inputs[0]))
        outputs = jax.tree.unflatten(structure, replay.run(network, how, *inputs))
        correct, count = task.correct(outputs, batch)
        right, examples = right + float(correct), examples + int(count)
    print(
        f"{path}: {right:,.10g} of {examples:,} right, test accuracy {right / examples:.2%} ({shown}, {path.stat().st_size:,} bytes)"
    )
    return right / examples
