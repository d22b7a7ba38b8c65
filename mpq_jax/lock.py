"""One run at a time in a folder. No JAX.

The lock is the operating system's, on the file .lock in the folder: it ends with the process that holds it, however that
ends, and holds between the hosts that share a folder over NFS. What the file says is only who to name.
"""

import contextlib
import fcntl
import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from mpq_jax.types import Refusal

NAME = ".lock"


@contextlib.contextmanager
def only_one(folder: Path) -> Iterator[None]:
    """Holds the folder, which is made if need be. Raises Refusal where another process does, or it cannot be written.

    A POSIX lock, not flock's: a process that this one forks does not hold it on after a kill.
    """
    handle = _opened(folder / NAME)
    try:
        _take(handle, folder)
        about = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        os.ftruncate(handle, 0)
        os.pwrite(handle, json.dumps(about).encode(), 0)
        yield
    finally:
        os.close(handle)


def _take(handle: int, folder: Path) -> None:
    try:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise Refusal(
            f"{folder} is in use by {_holder(handle)}; wait until it ends, or choose another --workdir"
        ) from None
    except OSError as error:
        print(f"note: {folder / NAME} cannot be locked ({error.strerror}); start one run there only", file=sys.stderr)


def _opened(path: Path) -> int:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise Refusal(f"{path.parent} cannot be written to ({error.strerror}); choose another --workdir") from None


def _holder(handle: int) -> str:
    try:
        about = json.loads(os.pread(handle, 4096, 0))
        return f"process {int(about['pid'])} on {str(about['host'])[:80]} since {str(about['since'])[:20]}"
    except (ValueError, KeyError, TypeError):
        return "another process"
