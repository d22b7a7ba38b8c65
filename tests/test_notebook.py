"""The notebook: committed without outputs, finds or installs the package, and runs from top to bottom."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import quick
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "notebooks" / "mpq_jax_colab.ipynb"


def install_cell() -> str:
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    return next("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")


def test_it_is_valid_and_has_no_outputs():
    notebook = nbformat.read(NOTEBOOK, 4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert len(code) > 8
    assert all(not cell.outputs and cell.execution_count is None for cell in code)


def test_the_first_cell_finds_a_checkout_or_installs_a_wheel_or_says_what_to_do(tmp_path, monkeypatch):
    called = []
    monkeypatch.setattr(subprocess, "run", lambda command, check: called.append(command))
    monkeypatch.setattr(sys, "path", list(sys.path))
    folder = tmp_path / "notebooks"
    folder.mkdir()
    monkeypatch.chdir(folder)
    exec(install_cell(), {})  # everything is there
    assert not called
    there = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "highspy" else there(name))
    with pytest.raises(SystemExit, match="set SOURCE"):
        exec(install_cell(), {})
    (folder / "mpq_jax-0.1.0-py3-none-any.whl").touch()
    exec(install_cell(), {})
    assert called.pop()[1:] == ["-m", "pip", "install", "--quiet", str(folder / "mpq_jax-0.1.0-py3-none-any.whl")]
    (tmp_path / "mpq_jax").mkdir()
    (tmp_path / "mpq_jax" / "__init__.py").touch()
    (folder / "mpq_jax-0.1.0-py3-none-any.whl").unlink()
    exec(install_cell(), {})
    assert called.pop()[-1] == sys.path[0] == str(tmp_path)
    exec(install_cell().replace('SOURCE = ""', 'SOURCE = "somewhere"'), {})
    assert called.pop()[-1] == "somewhere"


def test_it_runs_from_top_to_bottom_with_few_steps(tmp_path, monkeypatch):
    # As in a checkout: the package lies beside the folder that the notebook runs in.
    (tmp_path / "mpq_jax").symlink_to(ROOT / "mpq_jax")
    (tmp_path / "notebooks").mkdir()
    monkeypatch.setenv("MPQ_NOTEBOOK_STEPS", "8")
    for name, value in quick.environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("JAX_PLATFORMS", os.environ.get("JAX_PLATFORMS", "cpu"))
    notebook = nbformat.read(NOTEBOOK, 4)
    resources = {"metadata": {"path": str(tmp_path / "notebooks")}}
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources=resources).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 3
    text = "".join(output.get("text", "") for output in outputs if output.get("name") == "stdout")
    objective, bound = re.search(r"optimal: objective ([\d.]+), proven bound ([\d.]+)", text).groups()
    assert objective == bound
    assert int(re.search(r"same answer on (\d+) %", text)[1]) >= 98  # a float sum may fall on the other side of .5
    # The size that was promised and kept, added up from the layer table and the policy that were printed.
    params = {
        path: int(count.replace(",", "")) for path, count in re.findall(r"^(\w+) +([\d,]+) +[\d,]+ +\S+", text, re.M)
    }
    policy = re.findall(r"^  (\w+) +W(\d+)A(\d+)$", text, re.M)
    assert len(policy) == 7
    promised = sum(-(-params[path] * int(w) // 8) for path, w, _ in policy)
    assert f"weights: {promised:,} bytes" in text
    assert (tmp_path / "notebooks" / "model.safetensors").stat().st_size > promised
