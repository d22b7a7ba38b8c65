"""Checkpoints by orbax: a stage saves whole states, and resumes from the newest one that is not damaged."""

import contextlib
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from mpq_jax import digests
from mpq_jax.types import Refusal


@contextlib.contextmanager
def manager(directory: str | Path, keep: int = 2) -> Iterator[ocp.CheckpointManager]:
    """An orbax manager that saves into `directory`: whole checkpoints only, the newest `keep` of them.

    What a killed save left there is deleted: nobody else may save into it (lock.py).
    """
    directory = Path(directory).absolute()
    _sweep(directory)
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=False, create=True)
    opened = ocp.CheckpointManager(directory, options=options)
    try:
        yield opened
    finally:
        opened.close()


def save(opened: ocp.CheckpointManager, step: int, state: Any) -> None:
    """Saves a pytree of arrays as the checkpoint of `step`; a step that is there already is left as it is.

    Raises Refusal where it cannot be written; the checkpoints before are not touched.
    """
    if step in opened.all_steps():
        return
    directory = Path(opened.directory)
    try:
        opened.save(step, args=ocp.args.StandardSave(state))
        digests.write(directory / str(step))
        digests.sweep(directory)
    except (OSError, ValueError, RuntimeError) as error:  # tensorstore's are of all three kinds
        _sweep(directory)
        free = shutil.disk_usage(directory).free
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        kept = max((int(each.name) for each in directory.iterdir() if each.name.isdigit()), default=None)
        raise Refusal(
            f"the checkpoint of step {step} cannot be written to {directory} ({reason}); {free >> 20} MiB are free there; "
            + (f"step {kept} is kept" if kept is not None else "there is none before it")
            + "; make room, and give the same command again"
        ) from None


def restore(opened: ocp.CheckpointManager, like: Any) -> tuple[int, Any] | None:
    """(step, state) of the newest checkpoint, with the structure of `like`; None where there is none yet.

    A checkpoint that is damaged is named, set aside, and the one before is taken; where none is left, None.
    Raises Refusal where the checkpoint holds another structure: it belongs to another model or program.
    """
    directory = Path(opened.directory)
    for step in sorted(opened.all_steps(), reverse=True):
        damage = digests.damage(directory / str(step))
        if damage is None:
            return step, read(directory, step, like)
        aside = digests.set_aside(directory / str(step))
        opened.reload()
        before = max(opened.all_steps(), default=None)
        print(
            f"note: the checkpoint of step {step} in {directory} is damaged ({damage}); it is now {aside.name}, and "
            + (
                f"step {before} is taken in its place" if before is not None else "this stage starts from its beginning"
            ),
            file=sys.stderr,
        )
    return None


def read(directory: str | Path, step: int, like: Any) -> Any:
    """The state of one checkpoint, with the structure of `like`; nothing in `directory` is changed.

    Raises Refusal where the checkpoint holds another structure.
    """
    shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            return checkpointer.restore(Path(directory).absolute() / str(step) / "default", shapes)
    except (ValueError, KeyError, TypeError, OSError) as error:
        reason = str(error).splitlines()[0][:120]
        raise Refusal(
            f"the checkpoint in {directory} is of another model or options, or cannot be read ({reason}); "
            "choose another --workdir, or delete it"
        ) from None


def _sweep(directory: Path) -> None:
    """Deletes what a save that was not finished left."""
    for left in directory.glob(f"*{ocp.utils.TMP_DIR_SUFFIX}*"):
        shutil.rmtree(left, ignore_errors=True)
