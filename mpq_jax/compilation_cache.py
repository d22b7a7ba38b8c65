"""XLA's programs kept on disk, so that a command that ran before compiles nothing. No JAX is imported for it.

Where the user says nothing, commands keep them in ~/.cache/mpq_jax/compiled. JAX's own variable JAX_COMPILATION_CACHE_DIR
names another folder, and empty none. What took a tenth of a second to compile is kept, in place of JAX's second: a run's
many small programs are together as long as its large ones. JAX tells apart versions, devices and programs, but not the
kinds of CPU that share a home: each has a folder of its own here.
"""

import hashlib
import os
import platform
import sys
from pathlib import Path

VARIABLE, LEAST = "JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"
LEAST_SECONDS = 0.1


def switch_on() -> None:
    """Says to JAX where programs are kept, and which, unless the user has, or the folder cannot be made."""
    if LEAST not in os.environ:
        _say(LEAST, LEAST_SECONDS, 1.0)
    if VARIABLE in os.environ:
        return
    folder = _place()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return
    if os.access(folder, os.W_OK):
        _say(VARIABLE, str(folder), None)


def _say(variable: str, value: str | float, unsaid: float | None) -> None:
    """One of JAX's settings. unsaid: its value where nobody has said anything."""
    if "jax" not in sys.modules:
        os.environ[variable] = str(value)
        return
    import jax  # too late for the variable: a notebook, or a program that calls a command's main

    if jax.config.values[variable.lower()] == unsaid:
        jax.config.update(variable.lower(), value)


def _place() -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(home) / "mpq_jax" / "compiled" / hashlib.sha256(_cpu().encode()).hexdigest()[:12]


def _cpu() -> str:
    """The instructions that this CPU has, where the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    flags = next((line for line in lines if line.lower().startswith(("flags", "features"))), "")
    return f"{platform.machine()} {platform.processor()} {' '.join(sorted(flags.split()))}"
