"""Trains: float, then joint; with --policy, fine-tunes and reports. `python train.py --help` lists every option.

python train.py --config configs/digits.py --workdir runs/digits
python search.py --workdir runs/digits --budget bitops=W3A3
python train.py --config configs/digits.py --workdir runs/digits --policy runs/digits/policy.json
python train.py --model my_package.module:factory --data my_package.module:function --workdir runs/mine
"""

import argparse
import contextlib
from collections.abc import Sequence
from pathlib import Path

from mpq_jax import command_line, lock, processes, workdir
from mpq_jax import config as config_lib
from mpq_jax.types import Refusal


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, config_lib.Config]:
    """Arguments and config; refuses what can be refused before anything heavy is imported."""
    parser = command_line.Parser("train.py", __doc__)
    command_line.add_model(parser)
    parser.add_argument("--workdir", help="where the run is kept; default: runs/<name of the config, or of the model>")
    parser.add_argument("--policy", help="fine-tune with this policy.json (from search.py) and report")
    parser.add_argument("--float-only", action="store_true", help="stop after float training: enough for most criteria")
    parser.add_argument(
        "--profile",
        nargs="?",
        const="10",
        metavar="STEPS",
        help="trace STEPS steps (10) of each stage, to WORKDIR/profile",
    )
    parser.add_argument("--quantizer", help="short for --quantize.quantizer: lsq, pact, qil or lq_nets")
    command_line.add_help(parser)
    known, rest = parser.parse_known_args(argv)
    own = ("--config", "--model", "--data", "--workdir", "--policy", "--float-only", "--profile", "--quantizer")
    command_line.refuse_misspelt(rest, own, parser.prog)
    if known.quantizer is not None:
        rest = [*rest, "--quantize.quantizer", known.quantizer]
    if known.profile is not None:
        rest = [*rest, "--logs.profile", known.profile]
    config = command_line.of_model(known, rest)
    if known.float_only and known.policy:
        raise Refusal("--float-only stops before what --policy does; give one of them")
    name = known.config.stem if known.config else config.model.name.rpartition(":")[2]
    known.workdir = Path(known.workdir or Path("runs") / name)
    return known, config


def run(arguments: argparse.Namespace, config: config_lib.Config) -> None:
    """The stages that were asked for, in a folder that is this run's."""
    if arguments.float_only:
        from mpq_jax.pipeline import learn_float

        learn_float(config, arguments.workdir)
    elif arguments.policy is None:
        from mpq_jax.pipeline import learn

        learn(config, arguments.workdir)
    else:
        workdir.check_policy(arguments.workdir, arguments.policy, config.finetune.start)
        from mpq_jax.pipeline import finish

        finish(config, arguments.workdir, Path(arguments.policy))


@command_line.command
def main(argv: Sequence[str] | None = None) -> int:
    """train.py: float and joint training, or with --policy fine-tuning. -> exit code"""
    arguments, config = parse(argv)
    finetuning = arguments.policy is not None
    workdir.check_place(arguments.workdir, finetuning)
    with processes.started(config.parallel), contextlib.ExitStack() as held:

        def taken() -> bool:
            held.enter_context(lock.only_one(arguments.workdir))
            return workdir.claim(arguments.workdir, config, finetuning)

        claimed = processes.first_only(taken)
        try:
            run(arguments, config)
        except Refusal:
            if claimed:
                workdir.release(arguments.workdir)
            raise
    return 0
