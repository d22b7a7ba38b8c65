"""Checkpoints by orbax: a stage saves whole states, and resumes from the newest one that is not damaged."""

import contextlib
import errno
import logging
import os
import shutil
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from mpq_jax import digests, processes
from mpq_jax.types import Refusal


@contextlib.contextmanager
def manager(directory: str | Path, keep: int = 2) -> Iterator[ocp.CheckpointManager]:
    """An orbax manager that saves into `directory`: whole checkpoints only, the newest `keep` of them.

    What a killed save left there is deleted: nobody else may save into it (lock.py).
    """
    directory = Path(directory).absolute()
    if processes.first():
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
    directory, failure = Path(opened.directory), None
    try:
        with _errors_held():
            opened.save(step, args=ocp.args.StandardSave(state))
            processes.first_only(lambda: _seal(directory, step))
    except (OSError, ValueError, RuntimeError) as error:  # tensorstore's are of all three kinds
        if processes.lost_another(error):
            raise
        failure = _reason(error)
    if failure is not None:
        if processes.first():
            _sweep(directory)
        kept = max((int(each.name) for each in directory.iterdir() if each.name.isdigit()), default=None)
        raise Refusal(
            f"the checkpoint of step {step} cannot be written to {directory}: {failure} "
            f"({shutil.disk_usage(directory).free >> 20} MiB are free there); "
            + ("there is none before it" if kept is None else f"step {kept} is kept")
            + "; make room, and give the same command again"
        )


def _seal(directory: Path, step: int) -> None:
    digests.write(directory / str(step))
    digests.sweep(directory)


@contextlib.contextmanager
def _errors_held() -> Iterator[None]:
    """Inside the block errors are not logged: a save that goes well logs none. One that fails stays quiet from then on.

    Orbax writes with many threads and tasks: where a disk is full each of them has a traceback of its own, some of them long
    after the save has failed. The Refusal says it in one line.
    """
    level, hook = logging.root.manager.disable, sys.unraisablehook

    def of_the_main_thread(error: Any) -> None:
        if threading.current_thread() is threading.main_thread():
            hook(error)

    logging.disable(logging.ERROR)
    sys.unraisablehook = of_the_main_thread  # tensorstore's threads print by it
    try:
        yield
    except Exception:
        for name in ("absl", "asyncio"):
            logging.getLogger(name).setLevel(logging.CRITICAL + 1)
        warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
        raise
    else:
        sys.unraisablehook = hook
    finally:
        logging.disable(level)


def _reason(error: Exception) -> str:
    """The disk's own words where they are in tensorstore's, which are many."""
    text = str(error) or type(error).__name__
    for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EIO):
        if os.strerror(number) in text:
            return os.strerror(number)
    return text.splitlines()[0][:200]


def restore(opened: ocp.CheckpointManager, like: Any) -> tuple[int, Any] | None:
    """(step, state) of the newest checkpoint, with the structure of `like`; None where there is none yet.

    A checkpoint that is damaged is named, set aside, and the one before is taken; where none is left, None.
    Raises Refusal where the checkpoint holds another structure: it belongs to another model or program.
    """
    directory = Path(opened.directory)
    step = processes.from_first(_newest_whole(opened) if processes.first() else None)
    if not processes.first():
        opened.reload()  # process 0 may have set some aside: what each holds for saved must be the same
    return None if step is None else (step, read(directory, step, like))


def _newest_whole(opened: ocp.CheckpointManager) -> int | None:
    """The step of the newest checkpoint that is not damaged; damaged ones are named and set aside."""
    directory = Path(opened.directory)
    for step in sorted(opened.all_steps(), reverse=True):
        damage = digests.damage(directory / str(step))
        if damage is None:
            return step
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
        if processes.lost_another(error):
            raise
        reason = str(error).splitlines()[0][:120]
        raise Refusal(
            f"the checkpoint in {directory} is of another model or options, or cannot be read ({reason}); "
            "choose another --workdir, or delete it"
        ) from None


def _sweep(directory: Path) -> None:
    """Deletes what a save that was not finished left."""
    for left in directory.glob(f"*{ocp.utils.TMP_DIR_SUFFIX}*"):
        shutil.rmtree(left, ignore_errors=True)
