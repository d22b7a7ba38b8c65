"""Compiling quickly, for tests that compile much and run little: XLA's programs as ever, their machine code not optimized.

XLA's newer way to write a fusion's code takes half of the time that an unoptimized program takes to compile; without it
the older way is used, where XLA still has that (jaxlib 0.11.2 does not).
"""

import contextlib
import functools
import os
from collections.abc import Iterator

import jax
import pytest

FLAG = "xla_cpu_use_fusion_emitters"


@functools.cache
def known() -> bool:
    """Whether this XLA has the flag: those that have not end a process that is given it in XLA_FLAGS."""
    try:
        jax.jit(lambda: 0).lower().compile({FLAG: False})
    except jax.errors.JaxRuntimeError:
        return False
    return True


def environment() -> dict[str, str]:
    """What a child process is given."""
    flags = {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --{FLAG}=false".strip()} if known() else {}
    return {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1", **flags}


@contextlib.contextmanager
def compilation() -> Iterator[None]:
    """In this process, whose XLA has read its flags, and in those that it starts meanwhile."""
    from jax._src import compiler  # JAX has no public place for compiler options of all programs

    original, flags = compiler.get_compile_options, {FLAG: False} if known() else {}

    def options(*arguments, env_options_overrides=None, **more):
        mine = {**flags, **(env_options_overrides or {})}
        return original(*arguments, env_options_overrides=mine, **more)

    jax.config.update("jax_disable_most_optimizations", True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiler, "get_compile_options", options)
        for name, value in environment().items():
            patch.setenv(name, value)
        yield
    jax.config.update("jax_disable_most_optimizations", False)
