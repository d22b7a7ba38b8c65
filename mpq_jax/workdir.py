"""A run's folder: whose it is, and what lies where. No JAX."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from mpq_jax import config as config_lib
from mpq_jax import digests, lock
from mpq_jax.files import read_json, write_json
from mpq_jax.types import Refusal

# What float and joint training depend on; fine-tuning may be repeated with other settings.
_LEARNING = ("seed", "data", "model", "quantize", "pretrain", "joint")
# Which table searches take, how it is measured and with which rules: as the last training command says.
_TABLES = ("search", "criteria")
# These change how a run goes, not what comes out of it.
_FREE = ("data.data_dir", "data.workers", "joint.rows_at_a_time", "joint.recompute", "finetune.recompute")


def check_place(workdir: Path, finetuning: bool) -> None:
    """Refuses a folder that cannot be a run's, or holds none to fine-tune, before anything is written there."""
    if workdir.exists() and not workdir.is_dir():
        raise Refusal(f"{workdir} is a file; choose another --workdir")
    if finetuning and not (workdir / "config.json").exists():
        raise Refusal(f"{workdir} holds no run; train first, without --policy")


def claim(workdir: Path, config: config_lib.Config, finetuning: bool) -> bool:
    """Makes the folder this run's, or checks that it is. -> whether it was made so now

    Raises Refusal where it holds a run with other settings, naming them.
    """
    check_place(workdir, finetuning)
    path = workdir / "config.json"
    mine = config_lib.to_json(config)
    if not path.exists():
        write_json(path, {"format": "mpq-run", "version": 1, "config": mine})
        return True
    theirs = config_lib.to_json(load_config(workdir))  # values that its program did not have yet, at their defaults
    changed = [key for key in config_lib.differences(mine, theirs, _LEARNING) if key not in _FREE]
    if changed:
        shown = ", ".join(f"{key} is {_at(theirs, key)} there, {_at(mine, key)} now" for key in changed[:3])
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        raise Refusal(f"{workdir} is another run's ({shown}{more}); choose another --workdir, or the same options")
    return False


def keep_table_settings(workdir: Path, config: config_lib.Config) -> None:
    """Makes the settings of the searched table those of `config`: of the last command that trains, once it is not refused."""
    path = workdir / "config.json"
    mine, theirs = config_lib.to_json(config), config_lib.to_json(load_config(workdir))
    if any(mine[section] != theirs[section] for section in _TABLES):
        write_json(path, {"format": "mpq-run", "version": 1, "config": theirs | {name: mine[name] for name in _TABLES}})


def release(workdir: Path) -> None:
    """Gives back a folder that was claimed by a command which was then refused: if nothing else came to be in it."""
    if {path.name for path in workdir.iterdir()} <= {"config.json", lock.NAME}:
        for path in workdir.iterdir():
            path.unlink()
        workdir.rmdir()


def settings(config: config_lib.Config) -> dict[str, Any]:
    """The config as JSON, for others to read: without what changes nothing that comes out (where data lies, workers)."""
    value = config_lib.to_json(config)
    for section, _, name in (key.partition(".") for key in _FREE):
        del value[section][name]
    del value["parallel"]
    return value


def load_config(workdir: Path) -> config_lib.Config:
    """The config that a run was started with. Raises Refusal where the folder holds no run, or an older program's."""
    path = workdir / "config.json"
    saved = read_json(path, "mpq-run", 1, "python train.py --config … --workdir …").get("config")
    try:
        # How the run was spread over devices says nothing of what reads it.
        return dataclasses.replace(config_lib.from_json(saved), parallel=config_lib.Parallel())
    except (KeyError, TypeError, ValueError) as error:
        raise Refusal(f"{path} is not of this program ({error}); train anew in another --workdir") from None


def latest_step(stage: Path) -> int | None:
    """The step of the newest whole checkpoint in a stage's folder; None where there is none."""
    return max(_steps(stage), default=None)


def latest_whole(stage: Path) -> tuple[int | None, str | None]:
    """(the step of the newest checkpoint that is not damaged, what is damaged in a newer one); None where none is."""
    newest = None
    for step in sorted(_steps(stage), reverse=True):
        damage = digests.damage(stage / str(step))
        if damage is None:
            return step, newest
        newest = newest or f"the checkpoint of step {step} is damaged: {damage}"
    return None, newest


def _steps(stage: Path) -> list[int]:
    return [int(each.name) for each in stage.iterdir() if each.name.isdigit()] if stage.is_dir() else []


def importance_of(workdir: Path, policy: str | Path) -> Path:
    """The importance file in the folder that a policy was found with, by its digest; else the one that searches take.

    Raises Refusal where there is neither.
    """
    return _importance_of(workdir, policy)[0]


def _importance_of(workdir: Path, policy: str | Path) -> tuple[Path, bool]:
    """(the file, whether the policy was found with it)"""
    from mpq_jax.criteria import files as criteria
    from mpq_jax.importance import sha256
    from mpq_jax.policy import FORMAT, MADE_BY, VERSION

    digest = read_json(policy, FORMAT, VERSION, MADE_BY).get("importance_sha256")
    learned, others = workdir / "importance.json", sorted(workdir.glob("importance_*.json"))
    for file in (learned, *others):
        if file.is_file() and sha256(file) == digest:
            return file, True
    for file in (criteria.path_of(workdir, criteria.default(workdir)), learned):
        if file.is_file():
            return file, False
    raise Refusal(
        f"{policy} was not found with any importance in {workdir}; find one with: python search.py --workdir "
        f"{workdir} --criterion … --budget …, or finish joint training: run train.py without --policy"
    )


def check_policy(workdir: Path, policy: str | Path, start: str) -> None:
    """Refuses a policy that is not of this run's model, before JAX is imported. start: config.finetune.start."""
    from mpq_jax.importance import load_importance
    from mpq_jax.policy import load_policy

    path, found_with = _importance_of(workdir, policy)
    if not found_with:
        print(f"note: {policy} was found with no table that is in {workdir} now; it is shown beside {path.name}")
    importance = load_importance(path)
    if start == "joint" and latest_step(workdir / "joint") is None:
        raise Refusal(
            f"fine-tuning starts from the joint model, and joint training is not done in {workdir}; "
            "add --finetune.start float, or run train.py without --policy first"
        )
    load_policy(policy, importance.layers, importance.bit_widths, importance.activation_bit_widths)


def _at(config: dict, key: str) -> str:
    section, _, name = key.rpartition(".")
    return json.dumps(config.get(section, {}).get(name) if section else config.get(name))
