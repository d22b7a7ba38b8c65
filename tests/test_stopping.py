"""SIGTERM: exit code 0 and a line, at once or after a loop has saved; never more than the seconds of grace."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

BEGIN = """
import hashlib, os, signal, sys, threading, time
from mpq_jax import stopping
from mpq_jax.command_line import command
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell in the background has it ignored
stopping.GRACE = 0.5
def compiling():  # as XLA does: in C, for long, without a look at signals
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)
@command
def main(argv):
    print("not flushed yet")
    open(sys.argv[1], "w").close()
    {body}
    return 0
sys.exit(main([]))
"""
LOOP = """
    with stopping.saves():
        while not stopping.asked():
            time.sleep(0.01)
        time.sleep(0.2)
        print("saved")
        raise stopping.Stopped("step 3 of 9 is saved in W")
"""


def stopped(body, signals=(signal.SIGTERM,), between=0.05):
    """Runs a command with this body, sends the signals once it has begun. -> (exit code, stdout, stderr, seconds)"""
    text = BEGIN.replace("{body}", body.strip())
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with tempfile.TemporaryDirectory() as folder:
        begun, pipes = Path(folder) / "begun", {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        child = subprocess.Popen([sys.executable, "-c", text, str(begun)], **pipes, text=True, env=environment)
        while not begun.exists() and child.poll() is None:
            time.sleep(0.005)
    time.sleep(0.1)
    began = time.monotonic()
    for number in signals:
        child.send_signal(number)
        time.sleep(between)
    out, err = child.communicate(timeout=30)
    return child.returncode, out, err, time.monotonic() - began


@pytest.mark.parametrize(
    "body",
    [
        "time.sleep(60)",
        "compiling()",
        "with stopping.saves(): compiling()",
        "raise SystemExit(stopping.saves().__enter__() or compiling())",
    ],
    ids=["in Python", "in C", "in C, in a loop", "in a loop that never looks"],
)
def test_it_ends_with_a_line_wherever_it_comes(body):
    code, out, err, seconds = stopped(body)
    assert code == 0 and out == "not flushed yet\n" and seconds < 5
    assert err == "stopped by SIGTERM: what was saved before is kept; the same command goes on from there\n"


@pytest.mark.parametrize("signals", [[signal.SIGTERM], [signal.SIGTERM] * 3], ids=["once", "again and again"])
def test_a_loop_saves(signals):
    code, out, err, _ = stopped(LOOP, signals)
    assert code == 0 and out == "not flushed yet\nsaved\n"
    assert err == "stopped by SIGTERM: step 3 of 9 is saved in W; the same command goes on from there\n"


def test_interrupted():
    code, _, err, _ = stopped("time.sleep(60)", [signal.SIGINT])
    assert code == 130 and err == "interrupted; the same command goes on from what was saved\n"


def test_a_childs_sigterm_is_its_own():
    body = """
    pid = os.fork()
    if not pid:
        time.sleep(60)
    os.kill(pid, signal.SIGTERM)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
    compiling()
"""
    code, out, err, _ = stopped(body)
    assert code == 0 and "-15\n" in out and err.count("\n") == 1
