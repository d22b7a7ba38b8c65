"""Nothing is lost: real runs killed and stopped in every phase while they write, on full and unwritable disks, with a
damaged checkpoint, and two in one folder; all end with the bits of a run that was left alone. `make soak` has the long form.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import quick

SOAK = Path(__file__).parent / "soak"


def test_runs_that_are_struck_end_with_the_same_bits(tmp_path):
    command = [sys.executable, str(SOAK / "kills.py"), "--chain", "KILL", "TERM", "TERM", "KILL", "--disk"]
    # The many processes run a few programs: compiled once, and not optimized.
    cache = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    environment = {**os.environ, **cache, **quick.environment()}
    command += ["--place", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=3000, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    counts = json.loads(done.stdout.splitlines()[-1])
    assert all(counts[phase] == 1 for phase in ("float", "joint", "search", "finetune")), counts
    assert counts["during a write"] == 4 and counts["left a write unfinished"] >= 1 and counts["slowest end"] < 10
    assert counts["full disks"] == counts["that stopped a run"] == counts["read-only folders"] == 1
    assert counts["two runs in one folder"] == 1 and counts["wrong"] == 0
