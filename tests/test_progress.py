"""Progress: plain lines where there is no terminal, a bar where there is one."""

import fcntl
import io
import os
import pty
import struct
import termios

from mpq_jax.progress import progress


def test_plain_lines():
    stream = io.StringIO()
    with progress(range(5), 5, "joint", stream, every=0.0) as bar:
        for i in bar:
            bar.note(f"loss {i}")
    lines = stream.getvalue().splitlines()
    assert lines == [f"joint {i + 1}/5 loss {i}" for i in range(5)]
    quiet = io.StringIO()
    with progress(range(5), 5, "joint", quiet, every=60.0) as bar:
        assert list(bar) == [0, 1, 2, 3, 4]
    assert quiet.getvalue().splitlines() == ["joint 5/5"]


def test_bar_on_a_terminal():
    """The last thing the terminal shows is the full bar with the note."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    with os.fdopen(slave, "w") as stream:
        with progress(range(3), 3, "joint", stream) as bar:
            for _ in bar:
                bar.note("loss 0.5")
        shown = os.read(master, 65536).decode()
    os.close(master)
    assert "joint" in shown and "3/3" in shown and "loss 0.5" in shown and "\r" in shown
