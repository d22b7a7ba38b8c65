"""Files that are written whole or not at all: failures at every point, real processes killed, and what is no file of ours."""

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from mpq_jax import Refusal, files

ROOT = Path(__file__).parent.parent


def test_what_was_there_stays_until_all_is_written(tmp_path):
    """A block that fails leaves the old file and nothing beside it; the temporary name keeps the suffix."""
    path = tmp_path / "deep" / "report.svg"
    files.write_text(path, "old")
    with pytest.raises(ZeroDivisionError), files.whole(path) as temporary:
        temporary.write_text("half of it")
        assert temporary.parent == path.parent and temporary.suffix == ".svg" and path.read_text() == "old"
        raise ZeroDivisionError
    assert path.read_text() == "old" and list(path.parent.iterdir()) == [path]
    files.write_text(path, "new")
    assert path.read_text() == "new" and stat.S_IMODE(path.stat().st_mode) == 0o644


def test_a_process_killed_while_it_writes_leaves_the_old_file(tmp_path):
    files.write_text(tmp_path / "a.json", "old")
    code = (
        "import os, signal, sys\n"
        "from mpq_jax import files\n"
        "with files.whole(sys.argv[1]) as temporary:\n"
        "    temporary.write_text('new')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "a.json")], cwd=ROOT)
    assert done.returncode == -9 and (tmp_path / "a.json").read_text() == "old"


def test_the_disk_has_the_content_before_the_name_does(tmp_path, monkeypatch):
    """In this order: contents to the disk, then the name."""
    order, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda *a: order.append("contents") or fsync(*a))
    monkeypatch.setattr(os, "replace", lambda *a: order.append("name") or replace(*a))
    files.write_text(tmp_path / "a", "x")
    assert order == ["contents", "name"]


def test_json_as_written(tmp_path):
    value = {"format": "f", "version": 2, "text": "ä", "numbers": [1, 2.5, None]}
    files.write_json(tmp_path / "a.json", value)
    assert (
        files.read_json(tmp_path / "a.json", "f", 2, "make") == json.loads((tmp_path / "a.json").read_text()) == value
    )
    for number in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="JSON compliant"):
            files.write_json(tmp_path / "a.json", {"x": number})
    assert files.read_json(tmp_path / "a.json", "f", 2, "make") == value


@pytest.mark.parametrize(
    "content, words",
    [
        (None, "does not exist; make it with: make it"),
        (b"{", "is not whole JSON .line 1"),
        (b"\xff\xfe", "cannot be read"),
        (b"9" * 5000, "cannot be read: Exceeds the limit"),
        (b"[" * 100_000, "nested too deeply"),
        (b"[]", 'is no f file .its "format" is None'),
        (b'{"format": "g", "version": 2}', "is no f file .its \"format\" is 'g'"),
        (b'{"format": "f", "version": 3}', "is f version 3, this program reads version 2"),
        (b'{"format": "f", "version": 2.0}', "is f version 2.0, this program reads version 2"),
        (b'{"format": "f", "version": true}', "is f version True"),
        (b'{"format": "f"}', "is f version None"),
    ],
)
def test_what_is_refused(tmp_path, content, words):
    path = tmp_path / "a.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(Refusal, match=words) as refusal:
        files.read_json(path, "f", 2, "make it")
    assert "\n" not in str(refusal.value) and str(refusal.value).startswith(str(path))
    path.unlink(missing_ok=True)
    path.mkdir()
    with pytest.raises(Refusal, match="cannot be read"):
        files.read_json(path, "f", 2, "make it")


def test_places_to_write(tmp_path):
    """Folders, files that are read (by other names too), and places below files are refused; all others are free."""
    read = tmp_path / "importance.json"
    read.write_text("x")
    (tmp_path / "link.json").symlink_to(read)
    for free in (tmp_path / "policy.json", tmp_path / "new" / "deep" / "policy.json", Path("policy.json")):
        files.check_out(free, [read, None])
    refused = {
        tmp_path: "is a folder; name a file in it",
        read: "would replace a file",
        tmp_path / "link.json": "would replace a file",
        tmp_path / "sub" / ".." / "importance.json": "would replace a file",
        read / "policy.json": "is no folder",
    }
    for place, words in refused.items():
        with pytest.raises(Refusal, match=f"^--to .*{words}"):
            files.check_out(place, [None, read], "--to")
    with pytest.raises(Refusal, match="would replace a file"):
        files.check_out(tmp_path / "a" / ".." / "b", [tmp_path / "b"])  # neither is there yet
