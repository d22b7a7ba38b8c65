"""The package as others get it: public names, import time, the wheel and its commands."""

import ast
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from mypy import api as mypy

import mpq_jax

ROOT = Path(__file__).parent.parent


def python(*arguments, **options):
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, **options)


def test_public_names_are_there_and_typed():
    """What is loaded on first use, what type checkers are told, and __all__ are one list; each name has a docstring."""
    tree = ast.parse(Path(mpq_jax.__file__).read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    told = {alias.name: node.module for node in block.body for alias in node.names if isinstance(node, ast.ImportFrom)}
    assert sorted([*told, "__version__"]) == sorted(mpq_jax.__all__) == sorted(set(dir(mpq_jax)))
    for name, module in told.items():
        assert mpq_jax._MODULE[name] == module.removeprefix("mpq_jax.")
        assert getattr(mpq_jax, name).__doc__, name
    with pytest.raises(AttributeError, match="no attribute 'quantise'"):
        _ = mpq_jax.quantise


PROGRAM = """
from typing import Any
import jax
import optax
from flax import linen as nn
from mpq_jax import *

class Net(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.Dense(10)(nn.relu(nn.Dense(16)(x)))

def quantizers() -> list[Quantizer]:
    return [lsq(per_channel=True), pact(clip_penalty=0.0), qil("same"), lq_nets()]

def prepare(x: jax.Array) -> tuple[QuantizedModel, dict[str, Any]]:
    net = Net()
    rules = [("Dense_0", "w2/4,a4"), ("Dense_1", Bits(8, 8))]
    model = quantize(net, x, bit_widths=(2, 4), rules=rules, ends=None, quantizer=lsq())
    return model, model.calibrate(net.init(jax.random.key(0), x), x)

def train(model: QuantizedModel, variables: dict[str, Any], batch: dict[str, jax.Array], task: Task) -> TrainState:
    optimizer = partition(model, optax.sgd(0.1), log_space(optax.adam(0.1)))
    state: TrainState = init_state(variables, optimizer, rows=3)
    step = make_step(model, task, optimizer, random=1, distill=Distill(0.5))
    rows = uniform_rows(model.layers, model.bit_widths, model.activation_bit_widths)
    state, metrics = step(state, batch, jax.random.key(1), rows)
    losses: jax.Array = metrics["losses"]
    drawn = random_rows(jax.random.key(2), model.layers, model.bit_widths, model.activation_bit_widths, 3)
    loss, _ = joint_loss(model, task, state.params, state.rows, drawn, batch)
    evaluate, statistics = make_evaluate(model, task), make_batch_statistics(model, task)
    print(loss + losses.sum(), evaluate, statistics, row_variables(state, 0)["params"])
    return state

def search(importance: Importance, path: str) -> Solution:
    layers: tuple[Layer, ...] = importance.layers
    pairs: tuple[Interaction, ...] = importance.interactions
    widths = importance.bit_widths, importance.activation_bit_widths
    budgets: list[Budget] = parse_budgets(["bitops=W3A3"], layers, *widths)
    try:
        solution = solve(importance, budgets)
    except Refusal as refusal:
        raise SystemExit(str(refusal)) from None
    policy: Policy = solution.policy
    rows = stack([policy, uniform(layers, 4, 4), *random_policies(importance, budgets, 2)])
    print(bitops(layers, policy), size(layers, policy), solution.gap, rows, pairs, best_uniform(importance, budgets))
    save_importance(path, importance)
    save_policy(path, solution, "")
    load_policy(path, layers, *widths)
    return solution

def own_task() -> Task:
    model: FloatModel = FloatModel(Net(), inputs=("x",))
    return by_example(lambda outputs, batch: outputs.mean(-1), None, model.inputs, {}, {})

def main(config: Config, x: jax.Array, labels: jax.Array) -> jax.Array:
    model, variables = prepare(x)
    state = train(model, variables, {"image": x, "label": labels}, classification())
    importance, _ = repair(learned(model, row_variables(state, 0)))
    print(output_fisher(model, classification(), variables, [{"image": x, "label": labels}], alpha=1.0).importance.alpha)
    solution = search(importance, f"{config.model.name}.json")
    outputs: jax.Array = model.apply(variables, solution.policy, x, exact=True)
    print(search(load_importance("importance.json"), "again.json").objective, __version__)
    return outputs
"""
# (as in the program, with a mistake, what mypy calls it)
MISTAKES = (
    ("bit_widths=(2, 4)", 'bit_widths="2,4"', "arg-type"),
    ("rows=3", "row=3", "call-arg"),
    ("x, exact=True", "x, exact=1.5", "arg-type"),
    ("solution.gap", "solution.gaps", "attr-defined"),
    ("lsq(per_channel", "lsq(per_chanel", "call-arg"),
    ('parse_budgets(["bitops=W3A3"], layers', "parse_budgets([3], layers", "list-item"),
)


def test_a_program_with_every_public_name_passes_a_strict_type_check(tmp_path, monkeypatch, request):
    """mypy --strict on a user's program; then on it with mistakes, which it would not see if our names were untyped."""
    names = {node.id for node in ast.walk(ast.parse(PROGRAM)) if isinstance(node, ast.Name)}
    assert set(mpq_jax.__all__) <= names
    monkeypatch.setenv("MYPYPATH", str(ROOT))
    (tmp_path / "mypy.ini").write_text("[mypy]\nfollow_imports = silent\nignore_missing_imports = true\n")
    cache = request.config.cache.mkdir("mypy")  # kept between runs: JAX is read once

    def checked(text):
        (tmp_path / "program.py").write_text(text)
        options = ["--strict", "--config-file", tmp_path / "mypy.ini", "--cache-dir", cache, tmp_path / "program.py"]
        said, failed, status = mypy.run([str(option) for option in options])
        assert not failed, failed
        return said, status

    said, status = checked(PROGRAM)
    assert status == 0, said
    broken = PROGRAM
    for right, wrong, _ in MISTAKES:
        assert broken.count(right) == 1
        broken = broken.replace(right, wrong)
    said, status = checked(broken)
    assert status == 1 and sorted(
        line.rpartition("[")[2][:-1] for line in said.splitlines() if ": error:" in line
    ) == sorted(kind for *_, kind in MISTAKES), said


def test_a_submodule_never_takes_the_place_of_a_public_name():
    modules = {path.stem for path in Path(mpq_jax.__file__).parent.iterdir()}
    assert not modules & set(mpq_jax.__all__)


def test_import_is_quick_and_search_needs_no_jax():
    """CPU seconds of a process that imports, beside one that does nothing; limits are several times what was seen."""
    code = (
        "import os, sys; {}; print(sum(os.times()[:2]), sorted({{'jax', 'flax', 'cvxpy', 'grain'}} & set(sys.modules)))"
    )
    bare = float(python("-c", code.format("pass")).stdout.split()[0])
    for statement, limit in (
        ("import mpq_jax", 1.0),
        ("from mpq_jax import solve, load_importance, parse_budgets, save_policy", 1.5),
        ("import mpq_jax.commands.search, mpq_jax.commands.train, mpq_jax.commands.export", 1.5),
    ):
        done = python("-c", code.format(statement))
        seconds, _, loaded = done.stdout.partition(" ")
        assert loaded.strip() == "[]", (statement, loaded, done.stderr)
        assert float(seconds) - bare < limit, statement


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory):
    """The wheel that `pip wheel .` makes, unpacked: what an installation holds."""
    place = tmp_path_factory.mktemp("wheel")
    # Sources are copied, so that nothing is written into the checkout.
    code = f"""
import shutil, os
from setuptools import build_meta
for name in ("mpq_jax", "configs"):
    shutil.copytree({str(ROOT)!r} + "/" + name, "source/" + name, ignore=shutil.ignore_patterns("__pycache__"))
for name in ("pyproject.toml", "README.md", "LICENSE"):
    shutil.copy({str(ROOT)!r} + "/" + name, "source/" + name)
os.chdir("source")
build_meta.build_wheel("..")
"""
    done = python("-c", code, cwd=place)
    assert done.returncode == 0, done.stderr
    (wheel,) = place.glob("mpq_jax-*.whl")
    assert wheel.name.startswith(f"mpq_jax-{mpq_jax.__version__}-py3-none-any")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(place / "site")
    return place / "site"


def test_the_wheel_has_everything(unpacked):
    here = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "mpq_jax").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    there = {path.relative_to(unpacked).as_posix() for path in unpacked.rglob("*") if path.is_file()}
    assert here <= there
    assert {f"mpq_jax/configs/{path.name}" for path in (ROOT / "configs").glob("*.py")} <= there
    extra = {name for name in there - here if ".dist-info/" not in name and "/configs/" not in name}
    assert not extra, "nothing else: no tests, no benchmarks"


def test_installed_commands_run(unpacked, tmp_path):
    """Entry points as pip writes them, run from another folder; they name themselves and each other as installed."""
    (metadata,) = unpacked.glob("*.dist-info")
    lines = (metadata / "entry_points.txt").read_text().splitlines()
    commands = dict(line.split(" = ") for line in lines if " = " in line)
    assert set(commands) == {"mpq-train", "mpq-search", "mpq-export", "mpq-latency"}
    environment = {**os.environ, "PYTHONPATH": str(unpacked)}
    for name, target in commands.items():
        module, function = target.split(":")
        script = tmp_path / name
        script.write_text(f"import sys\nfrom {module} import {function}\nsys.exit({function}())\n")
        shown = python(script, "--help", cwd=tmp_path, env=environment)
        assert shown.returncode == 0 and shown.stdout.startswith(f"usage: {name} "), shown.stderr
    described = python(
        tmp_path / "mpq-search", "--describe", "--config", "digits", "--json", cwd=tmp_path, env=environment
    )
    assert described.returncode == 0 and '"W3A3"' in described.stdout, described.stderr
    refused = python(
        tmp_path / "mpq-search", "--budget", "bitops=W3A3", "--workdir", ".", cwd=tmp_path, env=environment
    )
    assert refused.returncode == 2 and "mpq-train --config" in refused.stderr and ".py" not in refused.stderr
    unknown = python(tmp_path / "mpq-train", "--config", "digit", cwd=tmp_path, env=environment)
    assert unknown.returncode == 2 and "digits" in unknown.stderr and unknown.stderr.count("\n") == 1


# Modules whose tests are not in test_<module>.py or test_<package>_<module>.py: test file -> modules.
TESTED_IN = {
    "test_checkpoint.py": "digests",
    "test_own_model.py": "trial",
    "test_ilp.py": "types",
    "test_ops.py": "cpu_convolution",
    "test_costs.py": "layer_costs",
    "test_parallel.py": "processes",
    "test_export_graph.py": "export/encoding",
    "test_config.py": "command_line",
    "test_joint.py": "row_policies evaluation",
    "test_pipeline.py": "commands/train criteria/learned stages/run stages/float_training stages/joint_training stages/row_log "
    "stages/evaluation stages/fine_tuning stages/finished",
    "test_stages.py": "stages/loop",
    "test_search_command.py": "commands/search commands/search_options report/searched",
    "test_export_command.py": "commands/export export/checks",
    "test_criteria_files.py": "criteria/compute",
    "test_criteria_fisher.py": "criteria/mpqco criteria/one_at_a_time criteria/output_fisher criteria/probes criteria/sites",
    "test_criteria_hessian.py": "criteria/hawq criteria/hawq_v2",
    "test_data.py": "data/batches data/digits data/opening data/prepare data/recipes data/records",
    "test_packed.py": "export/c_header export/fold export/replay",
    "test_stablehlo.py": "export/coded",
    "test_export_onnx.py": "export/onnx_axes export/onnx_compare export/onnx_grids export/onnx_products export/onnx_writer",
    "test_models.py": "models/cnn_nnx models/layers models/mobilenet_v1 models/resnet models/resnet_cifar",
    "test_quantizers.py": "quantizers/lq_nets quantizers/lsq quantizers/pact quantizers/qil quantizers/starts",
    "test_report.py": "report/figures report/tables report/write",
    "test_report_page.py": "report/curves report/layer_charts report/point_charts report/scales report/words",
    "test_gumbel.py": "search/edmips",
    "test_search_methods.py": "search/measure search/run",
    "test_check.py": "search/show",
}


def test_every_module_has_its_tests():
    """In a file named after it, or in the one named above; a new module without either is told here."""
    tests = {path.name for path in (ROOT / "tests").glob("test_*.py")}
    elsewhere = {module: file for file, modules in TESTED_IN.items() for module in modules.split()}
    modules = {
        path.relative_to(ROOT / "mpq_jax").with_suffix("").as_posix()
        for path in (ROOT / "mpq_jax").rglob("*.py")
        if not path.stem.startswith("__")
    }
    assert set(elsewhere) <= modules and set(TESTED_IN) <= tests
    own = {m for m in modules if {f"test_{m.replace('/', '_')}.py", f"test_{Path(m).name}.py"} & tests}
    assert modules - own - set(elsewhere) == set()


def test_every_public_name_says_what_it_is():
    """Modules, functions and classes without an underscore have docstrings."""
    silent = []
    for path in (ROOT / "mpq_jax").rglob("*.py"):
        module = ast.parse(path.read_text())
        named = [n for n in module.body if isinstance(n, ast.FunctionDef | ast.ClassDef) and n.name[0] != "_"]
        silent += [f"{path.name}:{getattr(n, 'name', '')}" for n in (module, *named) if not ast.get_docstring(n)]
    assert not silent
