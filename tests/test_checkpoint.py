"""Checkpoints: the newest one that is not damaged; nothing that a killed save left; what is wrong is said."""

import os
import shutil
import subprocess

import jax
import numpy as np
import pytest

from mpq_jax import checkpoint, digests
from mpq_jax.types import Refusal
from mpq_jax.workdir import latest_whole


def state(step):
    return {"w": jax.numpy.arange(6.0) * step, "n": jax.numpy.int32(step)}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A stage with the checkpoints of steps 4 and 6; that of step 2 was the third and is gone."""
    stage = tmp_path_factory.mktemp("stage") / "joint"
    with checkpoint.manager(stage) as manager:
        for step in (2, 4, 6):
            checkpoint.save(manager, step, state(step))
    return stage


@pytest.fixture
def stage(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "joint")
    return tmp_path / "joint"


def restored(stage):
    with checkpoint.manager(stage) as manager:
        found = checkpoint.restore(manager, state(0))
    return None if found is None else (found[0], np.asarray(found[1]["w"]).tolist())


def test_two_are_kept_and_digests_are_sha256sums(saved):
    assert sorted(p.name for p in saved.iterdir()) == ["4", "4.sha256", "6", "6.sha256"]
    done = subprocess.run(["sha256sum", "--quiet", "-c", "4.sha256", "6.sha256"], cwd=saved, capture_output=True)
    assert done.returncode == 0, done.stderr
    listed = {line.split("  ")[1] for line in (saved / "6.sha256").read_text().splitlines()}
    assert listed == {str(p.relative_to(saved)) for p in (saved / "6").rglob("*") if p.is_file()}


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 16
    file.write_bytes(content)


DAMAGES = {
    "is not what was written": [flip, lambda file: os.truncate(file, file.stat().st_size // 2)],
    "is missing": [lambda file: file.unlink(), lambda file: shutil.rmtree(file.parent)],
}


@pytest.mark.parametrize(
    "words, damage",
    [(words, damage) for words, each in DAMAGES.items() for damage in each],
    ids=["flip", "cut", "file", "folder"],
)
def test_the_one_before_is_taken(stage, capsys, words, damage):
    damage(next(iter((stage / "6" / "default" / "d").iterdir())))
    assert latest_whole(stage)[0] == 4 and words in latest_whole(stage)[1]
    assert restored(stage) == (4, (4 * np.arange(6.0)).tolist())
    said = capsys.readouterr().err
    assert "step 6" in said and words in said and "step 4 is taken in its place" in said
    assert (stage / "damaged-6").is_dir() and not (stage / "6.sha256").exists()
    with checkpoint.manager(stage) as manager:  # the step can be saved again
        checkpoint.save(manager, 6, state(6))
    assert restored(stage)[0] == 6


def test_all_damaged_starts_again_and_says_so(stage, capsys):
    for step in (4, 6):
        flip(stage / str(step) / "default" / "_METADATA")
    assert latest_whole(stage)[0] is None
    assert restored(stage) is None and "this stage starts from its beginning" in capsys.readouterr().err


def test_without_digests_a_checkpoint_counts_as_whole(stage):
    """Those of a program that wrote none, and of a kill between the checkpoint and its digests."""
    (stage / "6.sha256").unlink()
    assert digests.damage(stage / "6") is None and restored(stage)[0] == 6


def test_what_a_killed_save_left_is_deleted(stage):
    (stage / "8.orbax-checkpoint-tmp" / "default").mkdir(parents=True)
    (stage / "2.sha256").write_text("")
    assert latest_whole(stage) == (6, None)
    with checkpoint.manager(stage) as manager:
        checkpoint.save(manager, 8, state(8))
    assert sorted(p.name for p in stage.iterdir()) == ["6", "6.sha256", "8", "8.sha256"]


def test_another_structure_is_refused(stage):
    with checkpoint.manager(stage) as manager, pytest.raises(Refusal, match="another model or options"):
        checkpoint.restore(manager, {"w": state(0)["w"], "v": state(0)["w"]})
