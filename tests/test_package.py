"""The package as others get it: public names, import time, the wheel and its commands."""

import ast
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

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
