"""Have the indicators learned anything, or do they still stand where they were started?

Joint training from two starts, the statistics of the tensors and the same value 0.1 / b for every layer, on the same
float model with the same batches; then, for each bit-width, the rank correlation over layers of the two ends, their
median relative difference, and the difference of the end losses (validation images, statistics of the batch). Beside
it: the rank correlation of each start with its own end. For our recipe and for the paper's.

  python benchmarks/convergence.py --models resnet8 resnet20 --seeds 0 1 2 --recipes ours paper

Each finished run is one line of runs/convergence/results.jsonl; a second call goes on from there.
"""

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
from scipy.stats import spearmanr

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from mpq_jax import data, joint, row_policies, stages
from mpq_jax.config import PAPER_JOINT, Config, Data, Joint, Model, Pretrain, Quantize
from mpq_jax.criteria.learned import learned


def config_of(model: str, seed: int, recipe: str, start: str, steps: int, pretrain_steps: int) -> Config:
    return Config(
        seed=seed,
        data=Data(name="fashion_mnist"),
        model=Model(name=model),
        quantize=Quantize(start=start),
        pretrain=Pretrain(steps=pretrain_steps),
        joint=replace(PAPER_JOINT if recipe == "paper" else Joint(), steps=steps, batch_size=64),
    )


def one_run(root: Path, model: str, seed: int, recipe: str, start: str, steps: int, pretrain_steps: int) -> dict:
    config = config_of(model, seed, recipe, start, steps, pretrain_steps)
    run = stages.open_run(config, root / f"{model}-{seed}")
    variables = stages.pretrain(run)
    began = time.time()
    calibrated = stages.calibrated(run, variables)
    run = run._replace(workdir=root / f"{model}-{seed}" / f"{recipe}-{start}")
    state, _ = stages.joint_train(run, calibrated)
    seconds = time.time() - began
    losses = end_losses(run, state)
    first, last = learned(run.model, calibrated), learned(run.model, joint.row_variables(state, 0))
    return {
        "losses": losses,
        "seconds": seconds,
        "initial": {"weight": first.weight.tolist(), "activation": first.activation.tolist()},
        "learned": {"weight": last.weight.tolist(), "activation": last.activation.tolist()},
    }


def end_losses(run: stages.Run, state: joint.TrainState) -> list[float]:
    """Each uniform row's loss as training sees it (statistics of the batch), on validation images in batches of 500."""
    model, task, count = run.model, joint.classification(), len(run.model.bit_widths)
    policies = row_policies.uniform_rows(model.layers, model.bit_widths, model.activation_bit_widths)
    rows = jax.tree.map(lambda x: x[:count], state.rows)
    loss = jax.jit(lambda params, rows, batch: joint.joint_loss(model, task, params, rows, policies, batch)[1][0])
    batches = data.eval_batches(run.dataset, "validation", 500)
    return np.mean([loss(state.params, rows, batch) for batch in batches], axis=0).tolist()


def compare(a: dict, b: dict) -> dict:
    """Per kind and bit-width: rank correlation of the ends, median relative difference, each start with its end."""
    result: dict = {"loss difference": [abs(y / x - 1) for x, y in zip(a["losses"], b["losses"], strict=True)]}
    for kind in ("weight", "activation"):
        x, y = np.array(a["learned"][kind]), np.array(b["learned"][kind])
        x0 = np.array(a["initial"][kind])
        columns = range(x.shape[1])
        result[kind] = {
            "rank": [float(spearmanr(x[:, k], y[:, k]).statistic) for k in columns],
            "difference": np.median(np.abs(x - y) / ((x + y) / 2), axis=0).tolist(),
            # The same-value start is one value: it has no ranks.
            "own start": [float(spearmanr(x[:, k], x0[:, k]).statistic) for k in columns],
            "moved": np.median(np.abs(x / x0 - 1), axis=0).tolist(),
        }
    return result


def show(model: str, seed: int, recipe: str, found: dict) -> None:
    def row(values):
        return " ".join(f"{v:7.3f}" for v in values)

    print(f"\n{model} seed {seed}, recipe {recipe} (columns: bit-widths)")
    for kind in ("weight", "activation"):
        print(f"  {kind:10} rank of the two ends      {row(found[kind]['rank'])}")
        print(f"  {'':10} median difference         {row(found[kind]['difference'])}")
        print(f"  {'':10} rank, start and own end   {row(found[kind]['own start'])}")
        print(f"  {'':10} median move from start    {row(found[kind]['moved'])}")
    print(f"  {'loss':10} difference of the ends    {row(found['loss difference'])}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["resnet8", "resnet20"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--recipes", nargs="+", default=["ours", "paper"], choices=["ours", "paper"])
    parser.add_argument("--steps", type=int, default=Joint.steps)
    parser.add_argument("--pretrain-steps", type=int, default=600)
    parser.add_argument("--root", type=Path, default=Path("runs/convergence"))
    arguments = parser.parse_args()
    file = arguments.root / "results.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    known = {}
    if file.exists():
        for line in file.read_text().splitlines():
            entry = json.loads(line)
            known[tuple(entry["key"])] = entry["result"]
    for recipe in arguments.recipes:
        for model in arguments.models:
            for seed in arguments.seeds:
                pair = []
                for start in ("statistics", "same"):
                    key = (model, seed, recipe, start, arguments.steps, arguments.pretrain_steps)
                    if key not in known:
                        known[key] = one_run(arguments.root, *key)
                        with file.open("a") as out:
                            out.write(json.dumps({"key": key, "result": known[key]}) + "\n")
                    pair.append(known[key])
                show(model, seed, recipe, compare(*pair))


if __name__ == "__main__":
    main()
