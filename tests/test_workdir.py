"""A run's folder: whose it is, which checkpoint is the newest whole one, and which table a policy was found with."""

import json
from pathlib import Path

import pytest
from tables import made

from mpq_jax import Bits, Refusal, workdir
from mpq_jax import config as config_lib
from mpq_jax.importance import save_importance, sha256


def test_workdir_of_another_run(tmp_path):
    config = config_lib.Config()
    with pytest.raises(Refusal, match="train first"):
        workdir.claim(tmp_path / "run", config, finetuning=True)
    workdir.claim(tmp_path / "run", config, finetuning=False)
    workdir.claim(tmp_path / "run", config, finetuning=False)
    free = config_lib.override(config, ["--joint.rows_at_a_time", "2", "--finetune.steps", "9", "--log_every", "5"])
    workdir.claim(tmp_path / "run", free, finetuning=True)
    other = config_lib.override(config, ["--joint.steps", "9"])
    with pytest.raises(Refusal, match=r"joint.steps is 300 there, 9 now"):
        workdir.claim(tmp_path / "run", other, finetuning=False)
    (tmp_path / "file").write_text("")
    with pytest.raises(Refusal, match="is a file"):
        workdir.claim(tmp_path / "file", config, finetuning=False)
    (tmp_path / "run" / "config.json").write_text("{")
    with pytest.raises(Refusal, match="not whole JSON"):
        workdir.claim(tmp_path / "run", config, finetuning=False)


def test_a_refused_command_leaves_no_claim(tmp_path, capsys):
    """A folder that a refused run had just made its own is free again; one with a checkpoint in it stays."""
    import train

    run = tmp_path / "runs" / "digits"
    arguments = ["--config", "configs/digits.py", "--workdir", str(run), "--data.data_dir", str(tmp_path / "data")]
    assert train.main([*arguments, "--quantizer", "lsqq"]) == 2
    assert "choose one of lsq" in capsys.readouterr().err and not run.exists()
    assert workdir.claim(run, config_lib.Config(), finetuning=False)
    (run / "pretrain").mkdir()
    workdir.release(run)
    assert (run / "config.json").exists() and not workdir.claim(run, config_lib.Config(), finetuning=False)


def test_config_of_a_run(tmp_path):
    """What a folder says of its settings is the config again, of every config there is; no run and old ones are refused."""
    for number, file in enumerate(sorted(Path("configs").glob("*.py"))):
        config = config_lib.load(file)
        workdir.claim(tmp_path / str(number), config, finetuning=False)
        assert workdir.load_config(tmp_path / str(number)) == config
    assert number >= 6
    (tmp_path / "config.json").write_text('{"format": "mpq-run", "version": 1, "config": {"joint": {"stepz": 1}}}')
    with pytest.raises(Refusal, match="not of this program"):
        workdir.load_config(tmp_path)
    with pytest.raises(Refusal, match="does not exist"):
        workdir.load_config(tmp_path / "none")


def test_settings_are_what_changes_the_result():
    """Two runs that differ in where data lies, workers and rows at a time say the same; any other difference shows."""
    config = config_lib.Config()
    free = config_lib.override(config, ["--data.data_dir", "/x", "--data.workers", "3", "--joint.rows_at_a_time", "2"])
    assert workdir.settings(free) == workdir.settings(config) != config_lib.to_json(config)
    for other in (["--seed", "9"], ["--data.name", "cifar10"], ["--finetune.steps", "9"]):
        assert workdir.settings(config_lib.override(config, other)) != workdir.settings(config)


def test_the_newest_checkpoint_is_the_largest_number(tmp_path):
    """Not the last by name; folders that are no checkpoints do not count. Digests that do not fit are damage."""
    assert workdir.latest_step(tmp_path / "none") is None and workdir.latest_whole(tmp_path / "none") == (None, None)
    for name in ("9", "100", "20", "damaged-300", "100.orbax-checkpoint-tmp"):
        (tmp_path / name).mkdir()
    assert workdir.latest_step(tmp_path) == 100 and workdir.latest_whole(tmp_path) == (100, None)
    (tmp_path / "100.sha256").write_text(f"{'0' * 64}  100/gone\n")
    step, damage = workdir.latest_whole(tmp_path)
    assert step == 20 and damage == "the checkpoint of step 100 is damaged: 100/gone is missing"


def test_the_table_of_a_policy_is_found_by_its_digest(tmp_path):
    """Of several tables the one whose file has the digest; where none has, the one that searches of the run take."""
    files = [tmp_path / name for name in ("importance.json", "importance_hawq.json", "importance_random.json")]
    for seed, file in enumerate(files):
        save_importance(file, made(seed))
    bits = {layer.path: list(layer.bits or Bits(2, 2)) for layer in made(0).layers}

    def found(digest):
        text = {"format": "mpq-policy", "version": 1, "bits": bits, "importance_sha256": digest}
        (tmp_path / "policy.json").write_text(json.dumps(text))
        return workdir.importance_of(tmp_path, tmp_path / "policy.json")

    assert [found(sha256(file)) for file in files] == files
    assert found("0" * 64) == files[0]  # a folder that is no run's
    config = config_lib.to_json(config_lib.Config(search=config_lib.Search(criterion="hawq")))
    (tmp_path / "config.json").write_text(json.dumps({"format": "mpq-run", "version": 1, "config": config}))
    assert found("0" * 64) == files[1] and found(sha256(files[0])) == files[0]
    files[1].unlink()
    assert found("0" * 64) == files[0]
    files[0].unlink()
    with pytest.raises(Refusal, match="was not found with any importance in"):
        found("0" * 64)


def test_a_policy_is_checked_before_anything_starts(tmp_path):
    save_importance(tmp_path / "importance.json", made(0))
    bits = {layer.path: list(layer.bits or Bits(2, 2)) for layer in made(0).layers}
    (tmp_path / "policy.json").write_text(json.dumps({"format": "mpq-policy", "version": 1, "bits": bits}))
    workdir.check_policy(tmp_path, tmp_path / "policy.json", "float")
    with pytest.raises(Refusal, match="joint training is not done in"):
        workdir.check_policy(tmp_path, tmp_path / "policy.json", "joint")
    (tmp_path / "joint" / "7").mkdir(parents=True)
    workdir.check_policy(tmp_path, tmp_path / "policy.json", "joint")
    bits["layer0"] = [7, 7]
    (tmp_path / "policy.json").write_text(json.dumps({"format": "mpq-policy", "version": 1, "bits": bits}))
    with pytest.raises(Refusal, match="layer0"):
        workdir.check_policy(tmp_path, tmp_path / "policy.json", "joint")
