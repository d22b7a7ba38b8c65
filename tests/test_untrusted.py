"""Files that anyone may have written: mutated ones are accepted or refused in one line; `make soak` reads thousands."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from mpq_jax import config as config_lib
from mpq_jax.types import Refusal

SOAK = Path(__file__).parent / "soak"
KINDS = ("importance", "policy", "latency", "pickle", "packed", "config", "indicators", "journal")


def test_mutated_files(tmp_path):
    command = [sys.executable, str(SOAK / "untrusted.py"), "--together", "--inputs", "80", "--seed", "3"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=3000)
    assert done.returncode == 0, done.stderr[-3000:]
    counts = json.loads(done.stdout.splitlines()[-1])
    assert set(counts) == set(KINDS)
    for kind, found in counts.items():
        assert found["wrong"] == 0 and found["inputs"] == 80, kind
        assert found["refused"] > 40 and found["accepted"] > 0, (
            kind
        )  # mutations that change nothing would prove nothing


@pytest.mark.parametrize("section", ["model", "data"])
def test_a_packed_file_runs_no_code_that_the_command_does_not_name(tmp_path, section):
    from mpq_jax.export import command, packed

    config = config_lib.to_json(config_lib.Config())
    config[section] |= {"name": "os:system", "options": {"command": f"touch {tmp_path}/canary"}}
    file = packed.File(tmp_path / "model.safetensors", "lsq", config, {}, {})
    with pytest.raises(
        Refusal, match=rf"'os:system', whose code would be run; if it is yours, add --{section}.name os:system"
    ):
        command.config_of(file, [])
    assert getattr(command.config_of(file, [f"--{section}.name", "os:system"]), section).name == "os:system"
    assert not (tmp_path / "canary").exists()
