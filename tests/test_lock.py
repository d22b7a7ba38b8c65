"""A folder is one process's: others are told whose; what a killed process held is free."""

import os
import signal
import subprocess
import sys

import pytest

from mpq_jax import lock
from mpq_jax.types import Refusal

HOLD = "import sys, time; from mpq_jax import lock; from pathlib import Path\nwith lock.only_one(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"


def test_the_second_is_refused_until_the_first_is_gone(tmp_path):
    folder = tmp_path / "run"
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        words = rf"is in use by process {holder.pid} on {os.uname().nodename} since 20.*another --workdir"
        with pytest.raises(Refusal, match=words), lock.only_one(folder):
            raise AssertionError("two hold one folder")
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    with lock.only_one(folder):
        pass
    with lock.only_one(folder):  # and again: the file stays, the lock does not
        assert (folder / lock.NAME).is_file()


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(Refusal, match="cannot be written to"), lock.only_one(tmp_path / "file" / "run"):
        pass


@pytest.mark.parametrize("text", ["", "{", "[]", '{"pid": "x"}', "\xff"])
def test_a_damaged_note_names_nobody(tmp_path, text):
    (tmp_path / "note").write_bytes(text.encode("latin1"))
    handle = os.open(tmp_path / "note", os.O_RDONLY)
    assert lock._holder(handle) == "another process"
    os.close(handle)
