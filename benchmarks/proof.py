"""Are the bits it chooses better than those anyone else would choose? What docs/results.md is made from.

  python -m benchmarks.proof --net resnet8 --seed 0 --stages learn random
  python -m benchmarks.proof_document            lines -> docs/results.md and its figures

A net and a seed are one run under <root>/<net>/seed<k>; every finished measurement is one JSON line of the run's
lines.jsonl, keyed by what it is of, and a second call goes on from there. Stages, each needing those before it:

  learn      float and joint training, as train.py does them
  random     random policies within 2 % of a budget: validation loss of the joint model, statistics re-estimated
  samples    many more of them, and some all over, on a few training batches: what regressions are fitted to
  tune       some of the random policies after a short fine-tuning: validation loss
  repeats    a few of those once more, on other batches
  alone      depthwise and pointwise layers, one at a time at few bits: what they cost, and their step sizes
  criteria   the importance table of every criterion but those of stage hessian
  hessian    those of HAWQ and HAWQ-v2
  sliced     what the default's joint training chooses, with slices of the batch
  search     what evolution, DNAS and EdMIPS choose at every budget
  predicted  what every table says of the random policies
  accuracy   every contestant at every budget, fine-tuned alike: validation and test loss and accuracy
  longer     the same after more steps; of the uniform policies the one that was best
  statistics the same in two orders of the batches, with statistics measured anew and with those of training
  parts      what two tables say of all those policies, weights and activations apart

Nothing is chosen on the test set: it is read after a policy has been chosen, by the tables that training images made.
"""

import dataclasses
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.proof_contest import accuracy, longer, search, sliced, statistics
from benchmarks.proof_lines import BUDGETS, LEVELS
from benchmarks.proof_policies import alone, random, repeats, samples, tune
from benchmarks.proof_run import CONTESTANTS, NETS, SAMPLED, SEARCHES, Bench, Settings, open_bench
from benchmarks.proof_tables import HESSIAN, criteria, parts, predicted
from mpq_jax import command_line
from mpq_jax.criteria import CRITERIA

FUNCTIONS: Mapping[str, Callable[[Bench], None]] = {
    "learn": lambda bench: None,  # opening it has done it
    "random": random,
    "samples": samples,
    "tune": tune,
    "repeats": repeats,
    "alone": alone,
    "criteria": lambda bench: criteria(bench, [name for name in CRITERIA if name not in (*HESSIAN, *SAMPLED)]),
    "hessian": lambda bench: criteria(bench, HESSIAN),
    "sliced": sliced,
    "search": search,
    "predicted": lambda bench: predicted(bench.workdir),
    "accuracy": accuracy,
    "longer": longer,
    "statistics": statistics,
    "parts": lambda bench: parts(bench.workdir),
}


@command_line.command
def main(argv: Sequence[str] | None = None) -> int:
    parser = command_line.Parser("benchmarks.proof", __doc__)
    parser.add_argument("--net", required=True, choices=sorted(NETS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stages", nargs="+", choices=sorted(FUNCTIONS), default=list(FUNCTIONS))
    parser.add_argument("--root", type=Path, default=Path("runs/proof"))
    for field in dataclasses.fields(Settings):
        if isinstance(field.default, int):
            parser.add_argument(f"--{field.name}", type=int, default=field.default)
    parser.add_argument("--budgets", nargs="+", choices=list(BUDGETS), default=list(LEVELS))
    parser.add_argument("--contestants", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS))
    arguments, overrides = parser.parse_known_args(argv)
    mine = [word for word in overrides if word[2:].partition(".")[0] in SEARCHES]
    overrides = [word for word in overrides if word not in mine]
    numbers = {f.name: getattr(arguments, f.name) for f in dataclasses.fields(Settings) if f.name != "search"}
    settings = Settings(**numbers, search=(*Settings().search, *mine))
    began = time.perf_counter()
    bench = open_bench(arguments.net, arguments.seed, arguments.root, settings, overrides)
    for name in FUNCTIONS:
        if name in arguments.stages:
            FUNCTIONS[name](bench)
            print(f"{bench.net} seed {bench.seed}: {name}, {time.perf_counter() - began:.0f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
