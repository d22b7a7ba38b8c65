"""SIGTERM, which schedulers send some seconds before they take a machine away: save, say how to go on, exit with code 0.

What a command keeps is whole at every moment (files.whole, checkpoints, the journals of searches), so that it can be ended
anywhere. Only a training loop has more than what it saved last: it gets GRACE seconds to end its step and save. A thread
watches, because the main thread may compile for minutes, in which Python sees no signal.
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator

GRACE = 8.0  # seconds

_asked = threading.Event()
_looping = threading.Event()
_done = threading.Event()
_sender: int | None = None  # the end of the pipe that signals are written to


class Stopped(BaseException):
    """A training loop has saved and ended because it was asked to. Its text says what was saved."""


def asked() -> bool:
    """Whether SIGTERM has come."""
    return _asked.is_set()


@contextlib.contextmanager
def saves() -> Iterator[None]:
    """For a block that looks at `asked` after each of its steps, then saves and raises Stopped."""
    _looping.set()
    try:
        yield
    finally:
        _looping.clear()


@contextlib.contextmanager
def on_sigterm() -> Iterator[None]:
    """Inside the block SIGTERM ends the process with exit code 0, or sets `asked` where a loop `saves`."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may say what a signal does
        return
    global _sender
    for event in (_asked, _looping, _done):
        event.clear()
    receiver, _sender = os.pipe()
    os.set_blocking(_sender, False)
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    # Python's own handlers wait until the main thread comes back from C++; the byte in this pipe does not.
    before_fd = signal.set_wakeup_fd(_sender, warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(receiver,), daemon=True).start()
    try:
        yield
    finally:
        _done.set()
        # Asked once, the process ends with what it has said; another SIGTERM must not turn that into an error.
        signal.signal(signal.SIGTERM, signal.SIG_IGN if _asked.is_set() else before)
        signal.set_wakeup_fd(before_fd)
        os.close(_sender)
        _sender = None


def _watch(receiver: int) -> None:
    while number := os.read(receiver, 1):
        if number[0] == signal.SIGTERM and not _done.is_set():
            _asked.set()
            if not (_looping.is_set() and _done.wait(GRACE)):
                _leave()
    os.close(receiver)


def _leave() -> None:
    """Ends the process here and now, whatever the main thread does."""
    line = "stopped by SIGTERM: what was saved before is kept; the same command goes on from there\n"
    os.write(2, line.encode())
    # The main thread may hold the lock of standard output.
    flush = threading.Thread(target=sys.stdout.flush, daemon=True)
    flush.start()
    flush.join(1.0)
    os._exit(0)


# A child shares the pipe, and a SIGTERM of its own is not its parent's: none comes until the child has let go of the pipe.


def _before_fork() -> None:
    if _sender is not None:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})


def _in_parent() -> None:
    if _sender is not None:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})


def _in_child() -> None:
    if _sender is not None:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})


os.register_at_fork(before=_before_fork, after_in_parent=_in_parent, after_in_child=_in_child)
