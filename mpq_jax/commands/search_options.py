"""Finds the best bit-widths under budgets, and proves it. `python search.py --help` lists every option.

python search.py --budget bitops=W3A4                              the newest run under runs/
python search.py --workdir runs/digits --budget bitops=W3A4 --budget size=12.2x
python search.py --importance importance.json --budget bitops=55.3G --rule "attn=4,8|8,8"
python search.py --workdir runs/digits --frontier 64 [--budget size=W4]
python search.py --workdir runs/digits --policy edited.json --check
python search.py --workdir runs/digits --budget bitops=W3A4 --method evolution [--evaluations 200]
python search.py --import-limpq indicators.pkl --config configs/imagenet_resnet50.py --budget bitops=W3A4
python search.py --config configs/digits.py --describe [--json]
python search.py --model my_package.module:factory --data my_package.module:function --describe
"""

import argparse
import difflib
import math
from collections.abc import Sequence
from pathlib import Path

from mpq_jax.command_line import Parser, add_model, short
from mpq_jax.criteria import CRITERIA
from mpq_jax.search import methods
from mpq_jax.types import Refusal


def make_parser() -> Parser:
    """The options of search.py."""
    parser = Parser("search.py", __doc__)
    add = parser.add_argument
    add(
        "--budget",
        action="append",
        default=[],
        help="bitops=W3A4 | 55.3G | 76x; size=W3 | 8MB | 12.2x; latency=3ms; memory=256KB; wbits=3.2; abits=4; repeatable",
    )
    add("--workdir", type=Path, help="a run; default: the newest under runs/")
    add("--importance", type=Path, help="an importance.json of any origin, in place of a run")
    add("--import-limpq", type=Path, help="indicators of LIMPQ's code (.pkl) or a .csv; needs --config for the layers")
    names = ", ".join(CRITERIA)
    add("--criterion", help=f"whose table, computed once and kept: {names} (default: the run's search.criterion)")
    add(
        "--rule",
        action="append",
        default=[],
        help='regex=8,8 | 4,4|4,8 | w2/4,a8 | w4+ | 4- | "not w2" | equal | share; repeatable, all hold together',
    )
    add("--alpha", default="auto", help="factor of the weights' table, or auto: the table's own (default)")
    add(
        "--out",
        type=Path,
        help="where the policy is written; default: policy.json beside the importance; "
        "what stood there is replaced, and named",
    )
    add("--latency", type=Path, help="latency.json, for a latency budget")
    add("--frontier", type=int, metavar="N", help="also the best policies at N limits of the first budget (bitops)")
    add("--report", type=Path, metavar="HTML", help="also a page with plots: bits, importance, frontier, budgets")
    add("--policy", type=Path, help="with --check: a policy.json, edited by hand perhaps")
    add("--check", action="store_true", help="what --policy costs, and what it loses against the best")
    add(
        "--psd", action="store_true", help="project the interactions as CLADO does first (it changes what is minimised)"
    )
    add("--time-limit", type=float, help="of ilp: seconds of wall-clock for the solver (default 60)")
    add("--random", type=int, help="of ilp: random policies shown beside (default 20)")
    add("--method", choices=methods.METHODS, default="ilp", help="ilp proves the least importance; the others measure")
    add("--evaluations", type=int, help="of a method that measures: policies measured at most")
    add("--seconds", type=float, help="of a method that measures: seconds after which it stops")
    add("--seed", type=int, help="of a method that measures (default 0)")
    add_model(parser, "with --describe and --import-limpq, as --model and --data: ")
    add("--describe", action="store_true", help="layers, parameters, MACs and uniform costs; no data, no training")
    add("--json", action="store_true", help="with --describe: JSON and nothing else")
    parser.formatter_class, parser.epilog = argparse.RawDescriptionHelpFormatter, methods.help_text()
    return parser


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """Arguments, and overrides of the config; refuses what can be refused before CVXPY or JAX is imported."""
    parser = make_parser()
    arguments, rest = parser.parse_known_args(argv)
    if arguments.json and not arguments.describe:
        raise Refusal("--json goes with --describe; leave it out, or add --describe --config …")
    rest = methods.check_options(arguments, rest)
    arguments.time_limit = 60.0 if arguments.time_limit is None else arguments.time_limit
    arguments.random = 20 if arguments.random is None else arguments.random
    settings = [word for word in rest if word.startswith("--criteria.") or not word.startswith("--")]
    rest = [*short(arguments), *rest]
    modelled = arguments.config or arguments.model
    of_run = arguments.method == "ilp" and not (arguments.importance or arguments.import_limpq or arguments.check)
    allowed = rest if modelled else settings if of_run or arguments.criterion else []
    if strange := [word for word in rest if word not in allowed]:
        known = [option for action in parser._actions for option in action.option_strings]
        near = difflib.get_close_matches(strange[0].partition("=")[0], known, n=1, cutoff=0.0)
        raise Refusal(f"unknown option {strange[0]}; the nearest is {near[0]} (search.py --help lists all)")
    if arguments.alpha != "auto":
        try:
            alpha = float(arguments.alpha)
        except ValueError:
            alpha = -1.0
        if not 0 < alpha < math.inf:
            raise Refusal(f"--alpha is {arguments.alpha!r}; write auto or a positive number")
    if not 0 < arguments.time_limit < math.inf:
        raise Refusal(f"--time-limit is {arguments.time_limit:g}; write a positive number of seconds")
    if not 0 <= arguments.random <= 100_000:
        raise Refusal(f"--random is {arguments.random}; write a number of policies from 0 to 100000")
    if arguments.frontier is not None and not 2 <= arguments.frontier <= 10_000:
        raise Refusal(f"--frontier is {arguments.frontier}; write a number of limits from 2 to 10000, e.g. 64")
    if arguments.check != (arguments.policy is not None):
        raise Refusal("--policy and --check go together: --policy policy.json --check")
    if arguments.check and arguments.frontier is not None:
        raise Refusal("--check and --frontier are two questions; ask one of them")
    if arguments.report and (arguments.check or arguments.method != "ilp" or not arguments.budget):
        raise Refusal("--report shows what an ilp search found; give it with --budget, without --check and --method")
    if (modelled or arguments.data) and not (arguments.describe or arguments.import_limpq):
        name = next(name for name in ("config", "model", "data") if getattr(arguments, name))
        raise Refusal(f"--{name} goes with --describe or --import-limpq; leave it out, or add one of them")
    if arguments.import_limpq and not modelled:
        raise Refusal(
            "--import-limpq needs the model's layers; add --config, e.g. --config configs/imagenet_resnet50.py"
        )
    if arguments.method != "ilp" and (arguments.criterion or arguments.frontier or arguments.check or arguments.psd):
        raise Refusal(
            f"--method {arguments.method} measures policies; --criterion, --frontier, --check and --psd go with ilp"
        )
    if arguments.criterion and (arguments.importance or arguments.import_limpq):
        raise Refusal(
            "--criterion names a table of a run, --importance and --import-limpq a table itself; give one of them"
        )
    sources = [o for o in ("workdir", "importance", "import_limpq") if getattr(arguments, o) is not None]
    if len(sources) > 1:
        names = " and ".join("--" + name.replace("_", "-") for name in sources)
        raise Refusal(f"{names} both name a table; give one of them")
    asks = arguments.budget or arguments.frontier or arguments.check or arguments.describe
    asks = asks or arguments.import_limpq or arguments.criterion
    if not asks:
        raise Refusal("no budget given; write e.g. --budget bitops=W3A4 (or --frontier 64)")
    if arguments.describe and (arguments.budget or arguments.frontier):
        raise Refusal("--describe shows layers and what uniform policies cost; leave out --budget and --frontier")
    if arguments.rule and not (arguments.budget or arguments.frontier or arguments.check):
        raise Refusal("--rule narrows a search; add a budget, e.g. --budget bitops=W3A4")
    return arguments, rest
