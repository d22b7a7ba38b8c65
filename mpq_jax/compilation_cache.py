"""XLA's programs kept on disk, so that a command that ran before compiles nothing. No JAX is imported for it.

Where the user says nothing, commands keep them in ~/.cache/mpq_jax/compiled. JAX's own variable JAX_COMPILATION_CACHE_DIR
names another folder, and empty none. Only what took a second to compile is kept. JAX tells apart versions, devices and
programs, but not the kinds of CPU that share a home: each has a folder of its own here.
"""

import hashlib
import os
import platform
import sys
from pathlib import Path

VARIABLE = "JAX_COMPILATION_CACHE_DIR"


def switch_on() -> None:
    """Says to JAX where programs are kept, unless the user has, or the folder cannot be made."""
    if VARIABLE in os.environ:
        return
    folder = _place()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return
    if not os.access(folder, os.W_OK):
        return
    if "jax" not in sys.modules:
        os.environ[VARIABLE] = str(folder)
        return
    import jax  # too late for the variable: a notebook, or a program that calls a command's main

    if jax.config.values["jax_compilation_cache_dir"] is None:
        jax.config.update("jax_compilation_cache_dir", str(folder))


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
