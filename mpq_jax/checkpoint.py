"""Checkpoints by orbax: a stage saves whole states, and resumes from the newest one."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from mpq_jax.types import Refusal


@contextlib.contextmanager
def manager(directory: str | Path, keep: int = 2) -> Iterator[ocp.CheckpointManager]:
    """An orbax manager of `directory`: whole checkpoints only, the newest `keep` of them."""
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=False, create=True)
    opened = ocp.CheckpointManager(Path(directory).absolute(), options=options)
    try:
        yield opened
    finally:
        opened.close()


def save(opened: ocp.CheckpointManager, step: int, state: Any) -> None:
    """Saves a pytree of arrays as the checkpoint of `step`; a step that is there already is left as it is."""
    if step not in opened.all_steps():
        opened.save(step, args=ocp.args.StandardSave(state))


def restore(opened: ocp.CheckpointManager, like: Any) -> tuple[int, Any] | None:
    """(step, state) of the newest checkpoint, with the structure of `like`; None where there is none yet.

    Raises Refusal where the newest checkpoint holds another structure: it belongs to another model or program.
    """
    step = opened.latest_step()
    if step is None:
        return None
    shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
    try:
        return step, opened.restore(step, args=ocp.args.StandardRestore(shapes))
    except (ValueError, KeyError, TypeError) as error:
        reason = str(error).splitlines()[0][:120]
        raise Refusal(
            f"the checkpoint in {opened.directory} is of another model or options ({reason}); "
            "choose another --workdir, or delete it"
        ) from None
