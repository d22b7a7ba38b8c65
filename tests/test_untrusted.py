"""Files that anyone may have written: mutated ones are accepted or refused in one line; `make soak` reads thousands."""

import json
import subprocess
import sys
from pathlib import Path

SOAK = Path(__file__).parent / "soak"
KINDS = ("importance", "policy", "latency", "pickle", "packed", "config", "indicators", "journal")


def test_mutated_files(tmp_path):
    command = [sys.executable, str(SOAK / "untrusted.py"), "--together", "--inputs", "150", "--seed", "3"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    counts = json.loads(done.stdout.splitlines()[-1])
    assert set(counts) == set(KINDS)
    for kind, found in counts.items():
        assert found["wrong"] == 0 and found["inputs"] == 150, kind
        assert found["refused"] > 75 and found["accepted"] > 0, (
            kind
        )  # mutations that change nothing would prove nothing
