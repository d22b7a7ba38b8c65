"""A run's folder: whose it is, and what lies where. No JAX."""

import json
from pathlib import Path

from mpq_jax import config as config_lib
from mpq_jax.files import read_json, write_json
from mpq_jax.types import Refusal

# What float and joint training depend on; fine-tuning may be repeated with other settings.
_LEARNING = ("seed", "data", "model", "quantize", "pretrain", "joint")
# These change how a run goes, not what comes out of it.
_FREE = ("data.data_dir", "data.workers", "joint.rows_at_a_time")


def claim(workdir: Path, config: config_lib.Config, finetuning: bool) -> None:
    """Makes the folder this run's, or checks that it is.

    Raises Refusal where it holds a run with other settings, naming them.
    """
    path = workdir / "config.json"
    mine = config_lib.to_json(config)
    if not path.exists():
        if finetuning:
            raise Refusal(f"{workdir} holds no run; train first, without --policy")
        if workdir.exists() and not workdir.is_dir():
            raise Refusal(f"{workdir} is a file; choose another --workdir")
        write_json(path, {"format": "mpq-run", "version": 1, "config": mine})
        return
    theirs = read_json(path, "mpq-run", 1, "python train.py --config … --workdir …")["config"]
    changed = [key for key in config_lib.differences(mine, theirs, _LEARNING) if key not in _FREE]
    if changed:
        shown = ", ".join(f"{key} is {_at(theirs, key)} there, {_at(mine, key)} now" for key in changed[:3])
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        raise Refusal(f"{workdir} is another run's ({shown}{more}); choose another --workdir, or the same options")


def check_policy(workdir: Path, policy: str | Path) -> None:
    """Refuses a policy that is not of this run's model, before JAX is imported."""
    from mpq_jax.importance import load_importance
    from mpq_jax.policy import load_policy

    importance = load_importance(importance_of(workdir, policy))
    load_policy(policy, importance.layers, importance.bit_widths, importance.activation_bit_widths)


def importance_of(workdir: Path, policy: str | Path) -> Path:
    """The table in a run's folder that a policy was made from: by its SHA-256 where the policy says it, else
    importance.json.

    Raises Refusal where the folder has none.
    """
    from mpq_jax.importance import sha256

    tables = sorted(workdir.glob("importance*.json"))
    wanted = read_json(policy, "mpq-policy", 1, "python search.py --workdir … --budget …").get("importance_sha256")
    same = [path for path in tables if sha256(path) == wanted]
    path = same[0] if same else workdir / "importance.json"
    if not path.exists():
        raise Refusal(
            f"{path} does not exist: joint training is not done, or its quantizer makes none; run train.py without "
            "--policy first, or put the table that the policy was made from into the folder"
        )
    return path


def _at(config: dict, key: str) -> str:
    section, _, name = key.rpartition(".")
    return json.dumps(config.get(section, {}).get(name) if section else config.get(name))
