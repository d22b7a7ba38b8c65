"""Commands keep compiled programs where the user says, else in the user's cache folder, else nowhere."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mpq_jax import compilation_cache

ROOT = Path(__file__).resolve().parent.parent

# What a command does, then a program; prints how many were found in the cache, and how many seconds make one worth keeping.
PROGRAM = """
import sys
if sys.argv[1] == "jax first":
    import jax
from mpq_jax import compilation_cache
compilation_cache.switch_on()
import jax, jax.monitoring, jax.numpy as jnp
found = []
jax.monitoring.register_event_listener(lambda event, **_: found.append(event) if event.endswith("cache_hits") else None)
least = jax.config.values["jax_persistent_cache_min_compile_time_secs"]
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.jit(lambda x: jnp.tanh(x @ x).sum())(jnp.ones((8, 8)))
print(len(found), least)
"""


def run(home, *, jax_first=False, least=0.1, **variables) -> int:
    """How many programs were found; home: of the user's cache. least: the seconds that make a program worth keeping."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    environment |= {"XDG_CACHE_HOME": str(home), "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), **variables}
    words = [sys.executable, "-c", PROGRAM, "jax first" if jax_first else "-"]
    done = subprocess.run(words, env=environment, check=True, capture_output=True, text=True, cwd=home.parent)
    found, seconds = done.stdout.split()
    assert float(seconds) == least
    return int(found)


def test_the_second_run_compiles_nothing(tmp_path):
    assert run(tmp_path) == 0
    [folder] = (tmp_path / "mpq_jax" / "compiled").iterdir()
    assert list(folder.glob("*-cache"))
    assert run(tmp_path, jax_first=True) > 0


def test_the_users_own_word_counts(tmp_path):
    assert run(tmp_path / "home", JAX_COMPILATION_CACHE_DIR=str(tmp_path / "mine")) == 0
    assert list((tmp_path / "mine").glob("*-cache"))
    run(tmp_path / "home", JAX_COMPILATION_CACHE_DIR="", JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="3", least=3)
    assert {path.name for path in tmp_path.iterdir()} == {"mine"}


@pytest.mark.parametrize("flags", ["flags : avx2 fma", "Features : asimd"])
def test_each_kind_of_cpu_has_a_folder(tmp_path, monkeypatch, flags):
    def text(line):
        return lambda self: f"processor : 0\n{line}\n"

    monkeypatch.setattr(compilation_cache.Path, "read_text", text(flags))
    one = compilation_cache._place()
    monkeypatch.setattr(compilation_cache.Path, "read_text", text(flags + " sve avx512f"))
    assert compilation_cache._place() != one
    name, words = flags.split(" : ")
    monkeypatch.setattr(compilation_cache.Path, "read_text", text(f"{name} : {' '.join(reversed(words.split()))}"))
    assert compilation_cache._place() == one


def test_a_home_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.delenv(compilation_cache.VARIABLE, raising=False)
    compilation_cache.switch_on()
    assert compilation_cache.VARIABLE not in os.environ
