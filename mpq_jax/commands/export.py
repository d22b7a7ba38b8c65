"""Writes a fine-tuned model as files that are as small as the search promised, and checks them.

python -m mpq_jax.export --workdir runs/digits [--policy runs/digits/policy.json] [--out runs/digits/export]
                         [--formats packed,stablehlo,onnx,qonnx,qwix,litert] [--fold] [--c-header] [--check 1000]
python -m mpq_jax.export --evaluate runs/digits/export/model.safetensors
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from mpq_jax import command_line, workdir
from mpq_jax import config as config_lib
from mpq_jax.types import Refusal

FORMATS = ("packed", "stablehlo", "onnx", "qonnx", "qwix", "litert")
_OWN = ("--workdir", "--policy", "--out", "--formats", "--fold", "--c-header", "--check", "--evaluate")


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """Arguments, and what overrides the config. Refuses what can be refused before anything heavy is imported."""
    parser = command_line.Parser("python -m mpq_jax.export", __doc__)
    parser.add_argument("--workdir", type=Path, help="the run's folder")
    parser.add_argument("--policy", type=Path, help="the policy it was fine-tuned with; default: WORKDIR/policy.json")
    parser.add_argument("--out", type=Path, help="folder to write to; default: WORKDIR/export")
    parser.add_argument("--formats", default="packed", help=f"which files, of {','.join(FORMATS)}; default: packed")
    parser.add_argument("--fold", action="store_true", help="fold BatchNorm and biases into one pair a channel")
    parser.add_argument("--c-header", action="store_true", help="write the packed weights as a C header, too")
    parser.add_argument(
        "--check", default="1000", help="test images to compare the file with the model on: a number, or all; 0: none"
    )
    parser.add_argument("--evaluate", type=Path, metavar="FILE", help="measure a model.safetensors on its test set")
    command_line.add_help(parser)
    known, rest = parser.parse_known_args(argv)
    command_line.refuse_misspelt(rest, _OWN, parser.prog)
    if (known.workdir is None) == (known.evaluate is None):
        raise Refusal("give either --workdir (to write files) or --evaluate FILE (to measure one)")
    if known.check != "all" and not known.check.isdecimal():
        raise Refusal(f"--check {known.check!r} is no number of images; write a number, or all")
    known.check = None if known.check == "all" else int(known.check)
    known.formats = [name.strip() for name in known.formats.split(",")]
    for name in known.formats:
        if name not in FORMATS:
            raise Refusal(f"format {name!r} is not known; choose of {', '.join(FORMATS)}")
    if known.c_header and "packed" not in known.formats:
        raise Refusal("--c-header is made from the packed file; add packed to --formats")
    if known.workdir is not None:
        known.policy = known.policy or known.workdir / "policy.json"
        known.out = known.out or known.workdir / "export"
        if known.out.exists() and not known.out.is_dir():
            raise Refusal(f"--out {known.out} is a file; name a folder")
    return known, rest


@command_line.command
def main(argv: Sequence[str] | None = None) -> int:
    """export.py: writes a fine-tuned run's files, or with --evaluate measures such a file. -> exit code"""
    arguments, overrides = parse(argv)
    if arguments.evaluate is not None:
        free = ("--data.", "--model.name")
        if not all(word.startswith(free) or not word.startswith("--") for word in overrides):
            raise Refusal(
                "with --evaluate the config is the file's own; only --data options and --model.name can be given"
            )
        from mpq_jax.export.command import evaluate

        evaluate(arguments.evaluate, overrides, arguments.check)
    else:
        config = config_lib.override(workdir.load_config(arguments.workdir), overrides)
        workdir.check_policy(arguments.workdir, arguments.policy, config.finetune.start)
        from mpq_jax.export.command import write

        write(config, arguments)
    return 0
