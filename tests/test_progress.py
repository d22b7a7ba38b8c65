"""Progress: plain lines where there is no terminal, a bar where there is one."""

import fcntl
import io
import os
import pty
import select
import struct
import termios

import pytest

from mpq_jax import progress as module
from mpq_jax.progress import progress


def test_plain_lines():
    """A line a step where every step may say so; the last line alone where none may."""
    stream = io.StringIO()
    with progress(range(5), 5, "joint", stream, every=0.0) as bar:
        for i in bar:
            bar.note(f"loss {i}")
    assert stream.getvalue().splitlines() == [f"joint {i + 1}/5 loss {i}" for i in range(5)]
    quiet = io.StringIO()
    with progress(range(5), 5, "joint", quiet, every=60.0) as bar:
        assert list(bar) == [0, 1, 2, 3, 4]
    assert quiet.getvalue() == "joint 5/5\n"


def test_lines_are_seconds_apart(monkeypatch):
    """With steps of 3 seconds and a line in 10 at most: after steps 4 and 8, and at the end."""
    clock = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: clock[0])
    stream = io.StringIO()
    with progress(range(9), 9, "float", stream, every=10.0) as bar:
        for _ in bar:
            clock[0] += 3.0
    assert stream.getvalue().splitlines() == ["float 4/9", "float 8/9", "float 9/9"]


def test_empty_says_nothing():
    stream = io.StringIO()
    with progress([], 0, "joint", stream) as bar:
        assert list(bar) == []
    assert stream.getvalue() == ""


def test_error_passes_and_says_how_far():
    """The step that failed does not count."""
    stream = io.StringIO()
    with pytest.raises(ValueError, match="row 3"), progress(range(5), 5, "joint", stream) as bar:
        for i in bar:
            if i == 3:
                raise ValueError("row 3")
    assert stream.getvalue() == "joint 3/5\n"


def test_standard_error_by_default(capsys):
    with progress(range(2), 2, "joint") as bar:
        assert list(bar) == [0, 1]
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err == "joint 2/2\n"


def test_bar_on_a_terminal():
    """The last thing the terminal shows is the full bar with the note, within its columns, on one line."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    with os.fdopen(slave, "w") as stream:
        with progress(range(3), 3, "joint", stream) as bar:
            for _ in bar:
                bar.note("loss 0.5")
        shown = ""
        while select.select([master], [], [], 1.0)[0]:  # it may come in parts
            shown += os.read(master, 65536).decode()
    os.close(master)
    last = shown.rstrip("\r\n").split("\r")[-1]
    assert "joint" in last and "100%" in last and "3/3" in last and "loss 0.5" in last
    assert shown.count("\n") == 1 and max(map(len, shown.replace("\n", "").split("\r"))) <= 100
