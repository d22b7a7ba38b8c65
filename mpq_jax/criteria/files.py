"""Where a criterion's table lies in a run's folder, whether it is there and still true, and what it lacks. No JAX."""

import hashlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mpq_jax import config as config_lib
from mpq_jax import importance as importances
from mpq_jax.config import Config
from mpq_jax.criteria import CRITERIA, find
from mpq_jax.files import read_json
from mpq_jax.types import Refusal
from mpq_jax.workdir import latest_step, load_config

# What a run's float model depends on; the rest of its settings change nothing in a criterion's table.
SECTIONS = ("seed", "data", "model", "quantize", "pretrain")


def path_of(workdir: Path, name: str) -> Path:
    """<workdir>/importance_<name>.json; the learned table is the importance.json that joint training writes.

    Raises Refusal for a name that does not exist.
    """
    find(name)
    return workdir / ("importance.json" if name == "learned" else f"importance_{name}.json")


def config_of(workdir: Path, overrides: Sequence[str] = ()) -> Config:
    """The run's config, with ["--criteria.samples", "512", ...] on top; refuses options of other sections."""
    config = load_config(workdir)
    for word in overrides:
        if word.startswith("--") and not word[2:].startswith("criteria."):
            raise Refusal(f"option {word} is not for a search; --criteria.… can be given with --criterion")
    return config_lib.override(config, overrides)


def _note_unused(name: str, overrides: Sequence[str]) -> None:
    """Says which settings are other criteria's and change nothing here."""
    used = find(name).settings
    for word in overrides:
        option, _, setting = word.partition("=")[0].partition(".")
        setting = setting.replace("-", "_")
        if option == "--criteria" and hasattr(Config().criteria, setting) and setting not in used:
            has = ", ".join(f"criteria.{each}" for each in used) or "none"
            print(f"note: {name} does not use criteria.{setting}; its settings: {has}")


def default(workdir: Path) -> str:
    """The criterion that a search takes unless told: the run's search.criterion; "learned" of a folder that is no run's."""
    return load_config(workdir).search.criterion if (workdir / "config.json").is_file() else "learned"


def near(name: str, budgets: Sequence[str]) -> list[str]:
    """What a criterion that draws policies near the budgets is told of them; a latency's table it does not have."""
    texts = [text for text in budgets if not text.startswith("latency")]
    return ["--criteria.near", ";".join(texts)] if "near" in find(name).settings and texts else []


def ensure(workdir: Path, name: str, overrides: Sequence[str] = (), opened: Any = None) -> Path:
    """The criterion's file, computed if it is not there or is of other settings; only then is JAX imported.

    opened: the (run, calibrated variables) that the caller holds already; None: they are read from the folder.
    Raises Refusal for a name that does not exist, and where the run lacks what the criterion needs.
    """
    path = path_of(workdir, name)
    _note_unused(name, overrides)
    config = config_of(workdir, overrides)
    check_needs(workdir, name, config)
    if name == "learned" or is_true(path, workdir, name, config):
        _set_rules(path, config.search.rules)
        return path
    from mpq_jax.criteria.compute import compute

    log = alpha_rows_file(workdir)
    compute(
        name,
        workdir,
        config,
        path=path,
        made_from=made_from(workdir, name, config),
        rows=rows_file(workdir),
        log=log if uses_log(name) and log.is_file() else None,
        opened=opened,
    )
    return path


def check_needs(workdir: Path, name: str, config: Config) -> None:
    """Refuses, before anything starts, a criterion whose needs the run's folder does not meet."""
    _check_settings(config.criteria, find(name).settings)
    needs = set(find(name).needs)
    train = f"python train.py --config … --workdir {workdir}"
    joint_sizes = "step_sizes" in find(name).settings and config.criteria.step_sizes == "joint"
    if "checkpoint" in needs and ((step := latest_step(workdir / "pretrain")) or 0) < max(1, config.pretrain.steps):
        found = "none" if step is None else f"one at step {step} of {config.pretrain.steps}"
        raise Refusal(
            f"{name} needs the finished float checkpoint, and {workdir} has {found}; make it with: {train} --float-only"
        )
    if "rows" in needs and not rows_file(workdir).is_file():
        raise Refusal(
            f"{name} needs the log of joint training's random rows, and {rows_file(workdir)} does not exist; "
            f"make it with: {train}"
        )
    if "joint" in needs and latest_step(workdir / "joint") is None:
        raise Refusal(
            f"{name} needs the joint model, and {workdir / 'joint'} holds no checkpoint; make it with: {train}; "
            f"criteria without it: {', '.join(_untrained())}"
        )
    if ("indicators" in needs or joint_sizes) and not (workdir / "importance.json").is_file():
        raise Refusal(
            f"{name} needs the learned step sizes, and {workdir / 'importance.json'} does not exist; "
            f"finish joint training with: {train}; criteria without it: {', '.join(_untrained())}"
        )


def _check_settings(settings: config_lib.Criteria, used: Sequence[str]) -> None:
    """Refuses a value that no criterion can have, of those that this one uses."""
    if "step_sizes" in used and settings.step_sizes not in ("calibrated", "joint"):
        raise Refusal(f'criteria.step_sizes {settings.step_sizes!r} is not known; choose "calibrated" or "joint"')
    for name, least in (("samples", 1), ("batch_size", 1), ("hessian_samples", 1), ("max_draws", 2), ("policies", 20)):
        if name in used and getattr(settings, name) < least:
            raise Refusal(f"criteria.{name} is {getattr(settings, name)}; give a number from {least}")
    if "alpha" in used and not 0 < settings.alpha < math.inf:
        raise Refusal(f"criteria.alpha is {settings.alpha:g}; give a positive number, e.g. 1")
    if "relative_error" in used and not 0 < settings.relative_error < 1:
        raise Refusal(
            f"criteria.relative_error is {settings.relative_error:g}; give a share between 0 and 1, e.g. 0.05"
        )


def is_true(path: Path, workdir: Path, name: str, config: Config) -> bool:
    """Whether the file is there and was made from what is in the folder now, under these settings.

    Raises Refusal for a file that says nothing of what it was made from: it is somebody's own.
    """
    if not path.exists():
        return False
    about = read_json(path, importances.FORMAT, importances.VERSION, importances.MADE_BY).get("about")
    if not isinstance(about, dict) or "made_from" not in about:
        raise Refusal(
            f"{path} does not say what it was made from; use it as it is with --importance {path}, or move it away"
        )
    return about["made_from"] == made_from(workdir, name, config)


def _set_rules(path: Path, rules: tuple[str, ...]) -> None:
    """The run's rules in a table that was kept under others, where they change nothing that was measured."""
    table = importances.load_importance(path)
    if table.rules != rules:
        about = read_json(path, importances.FORMAT, importances.VERSION, importances.MADE_BY).get("about")
        importances.save_importance(path, table._replace(rules=rules), about)


def made_from(workdir: Path, name: str, config: Config) -> dict[str, Any]:
    """All that a criterion's table depends on: settings, and digests of the files it is made from. Plain JSON."""
    criterion = find(name)
    run, settings = config_lib.to_json(config), config_lib.to_json(config)["criteria"]
    result: dict[str, Any] = {
        "config": {section: run[section] for section in SECTIONS},
        "criteria": {key: settings[key] for key in criterion.settings},
    }
    if "near" in criterion.settings:  # policies are drawn, and keep them
        result["rules"] = run["search"]["rules"]
    for free in ("data_dir", "workers"):  # where data lie, and how they are read
        result["config"]["data"].pop(free)
    files = []
    if "checkpoint" in criterion.needs:
        files.append(workdir / "pretrain" / str(latest_step(workdir / "pretrain")) / "_CHECKPOINT_METADATA")
    if "joint" in criterion.needs:
        files.append(workdir / "joint" / str(latest_step(workdir / "joint")) / "_CHECKPOINT_METADATA")
    if "rows" in criterion.needs:
        files.append(rows_file(workdir))
    if uses_log(name) and alpha_rows_file(workdir).is_file():
        files.append(alpha_rows_file(workdir))
    if "indicators" in criterion.needs or result["criteria"].get("step_sizes") == "joint":
        files.append(workdir / "importance.json")
    # By their places in the run: the checkpoints of two stages have one name.
    result["files"] = {file.relative_to(workdir).as_posix(): _digest(file) for file in files}
    return result


def uses_log(name: str) -> bool:
    """Whether alpha is fitted to measured policies or random rows, where there are any: to what `learned`'s is."""
    return name in ("initial", "power_law", "constant")


def rows_file(workdir: Path) -> Path:
    """Where joint training keeps the log of its random rows (`learned.RowLog`)."""
    return workdir / "joint" / "random_rows.npz"


def alpha_rows_file(workdir: Path) -> Path:
    """What alpha is fitted to: policies measured after joint training, or else its random rows."""
    measured = workdir / "joint" / "alpha_rows.npz"
    return measured if measured.is_file() else rows_file(workdir)


def _digest(path: Path) -> str:
    """Of a file; "" where there is none."""
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""


def _untrained() -> list[str]:
    return [name for name, row in CRITERIA.items() if not {"rows", "joint", "indicators"} & set(row.needs)]
