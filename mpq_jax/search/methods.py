"""The searches by name, and the settings of those that measure policies on data. No JAX.

Every setting can be given on the command line under its method's name: --evolution.population 20.
"""

import dataclasses
import difflib
import math
from collections.abc import Sequence
from typing import Any, get_type_hints

from mpq_jax.config import parse_value
from mpq_jax.types import Refusal


@dataclasses.dataclass(frozen=True)
class Measuring:
    """How a policy is measured: the joint model with its bits, normalisation statistics re-estimated."""

    examples: int = 0  # of the validation split; 0: all
    statistics_batches: int = 0  # training batches for the statistics; 0: as many as the run's config says
    finetune_steps: int = 0  # steps of the run's fine-tuning before a policy is measured


@dataclasses.dataclass(frozen=True)
class Evolution(Measuring):
    """Guo et al., "Single Path One-Shot Neural Architecture Search with Uniform Sampling", ECCV 2020."""

    generations: int = 20
    population: int = 50
    top: int = 10  # parents of the next generation
    mutations: int = 25  # of a generation
    crossovers: int = 25
    probability: float = 0.1  # that a mutation changes a layer


@dataclasses.dataclass(frozen=True)
class Supernet(Measuring):
    """What both forms of differentiable search share."""

    steps: int = 600  # of the weights, and of theta after the warm-up, in turn
    warmup_steps: int = 100  # of the weights alone
    batch_size: int = 64
    theta_fraction: float = 0.2  # of the training split: theta's; the rest is the weights'
    learning_rate: float = 0.01
    step_size_learning_rate: float = 0.005
    theta_learning_rate: float = 0.02
    beta: float = 0.1  # of the loss CE * beta (log cost)^gamma
    gamma: float = 0.9


@dataclasses.dataclass(frozen=True)
class Gumbel(Supernet):
    """Wu et al., "Mixed Precision Quantization of ConvNets via Differentiable NAS", 2018 (DNAS)."""

    temperature: float = 5.0  # at the first step of theta; then it falls exponentially
    end_temperature: float = 0.1


@dataclasses.dataclass(frozen=True)
class Edmips(Supernet):
    """Cai and Vasconcelos, "Rethinking Differentiable Search for Mixed-Precision Neural Networks", CVPR 2020."""


@dataclasses.dataclass(frozen=True)
class Agents(Measuring):
    """DDPG as in HAQ."""

    finetune_steps: int = 20
    episodes: int = 600
    warmup_episodes: int = 20  # of random actions, without learning
    hidden: int = 300  # units of both hidden layers
    actor_learning_rate: float = 1e-4
    critic_learning_rate: float = 1e-3
    discount: float = 1.0
    tau: float = 0.01  # of the target networks
    batch_size: int = 64
    replay: int = 128  # episodes that are kept
    noise: float = 0.5  # standard deviation of the truncated normal
    noise_decay: float = 0.99  # an episode, after the warm-up


@dataclasses.dataclass(frozen=True)
class Haq(Agents):
    """Wang et al., "HAQ: Hardware-Aware Automated Quantization with Mixed Precision", CVPR 2019."""


@dataclasses.dataclass(frozen=True)
class Autoq(Agents):
    """Lou et al., "AutoQ: Automated Kernel-Wise Neural Network Quantization", ICLR 2020."""

    extrinsic: float = 0.5  # share of the extrinsic reward in the low level's; the rest is the intrinsic one
    cost_weight: float = 1.0  # points of accuracy that a whole budget is worth
    channel_discount: float = 0.0  # of the low level: each channel is credited with its layer's reward
    channel_updates: int = 100  # of the low level, an episode
    channel_replay: int = 100_000  # transitions of the low level that are kept


SHARES = ("probability", "discount", "channel_discount", "tau", "extrinsic", "noise_decay", "theta_fraction")
MAY_BE_ZERO = (
    *("examples", "statistics_batches", "finetune_steps", "mutations", "crossovers", "warmup_steps", "gamma"),
    *("probability", "discount", "channel_discount", "extrinsic", "warmup_episodes", "cost_weight", "channel_updates"),
)
SETTINGS: dict[str, type[Measuring]] = {
    "evolution": Evolution,
    "gumbel": Gumbel,
    "edmips": Edmips,
    "haq": Haq,
    "autoq": Autoq,
}
METHODS = ("ilp", *SETTINGS)


def settings(method: str, overrides: Sequence[str] = ()) -> Any:
    """The settings of a method, with ["--evolution.population", "20", ...] applied.

    Raises Refusal for an unknown option, naming the nearest, and for a value that it cannot have.
    """
    kind = SETTINGS[method]
    hints = get_type_hints(kind)
    known = {f"--{method}.{field.name}": field.name for field in dataclasses.fields(kind)}
    changes: dict[str, Any] = {}
    rest = list(overrides)
    while rest:
        option, given, value = rest.pop(0).partition("=")
        if option not in known:
            near = difflib.get_close_matches(option, known, n=1, cutoff=0.0)
            raise Refusal(f"unknown option {option}; the nearest is {near[0]} (search.py --help lists all)")
        if not given and not rest:
            raise Refusal(f"option {option} needs a value, e.g. {option} {getattr(kind, known[option])}")
        name = known[option]
        changes[name] = parse_value(option[2:], hints[name], value if given else rest.pop(0))
    chosen = kind(**changes)
    for name, value in dataclasses.asdict(chosen).items():
        zero = name in MAY_BE_ZERO
        if not ((value > 0 or (zero and value == 0)) and value <= (1 if name in SHARES else 2**31)):
            limits = "from 0 to 1" if name in SHARES else "from 0" if zero else "above 0"
            raise Refusal(f"option --{method}.{name} is {value}; give a number {limits}")
    if isinstance(chosen, Supernet) and chosen.steps <= chosen.warmup_steps:
        raise Refusal(
            f"--{method}.steps is {chosen.steps}, and theta moves after {chosen.warmup_steps} steps alone: all bits would be "
            f"as likely; give more, or fewer --{method}.warmup_steps"
        )
    return chosen


def check_options(arguments: Any, rest: Sequence[str]) -> list[str]:
    """Refuses options that do not go with the chosen method; takes the method's settings, as `arguments.settings`.

    rest: options that are not known otherwise. -> those that are left
    """
    if arguments.method == "ilp":
        for name in ("evaluations", "seconds", "seed"):
            if getattr(arguments, name) is not None:
                raise Refusal(f"--{name} goes with a method that measures: --method {', '.join(SETTINGS)}")
        return list(rest)
    if arguments.time_limit is not None:
        raise Refusal(f"--time-limit is of --method ilp; --method {arguments.method} stops after --seconds: give that")
    if arguments.random is not None:
        raise Refusal("--random is of --method ilp, which shows random policies beside; leave it out")
    if arguments.importance is not None:
        raise Refusal(f"--method {arguments.method} measures policies on a run's joint model; give --workdir in place")
    if arguments.alpha != "auto":
        raise Refusal(f"--method {arguments.method} measures policies and uses no table's alpha; leave --alpha out")
    for name in ("evaluations", "seconds"):
        value = getattr(arguments, name)
        if value is not None and not 0 < value < math.inf:
            raise Refusal(f"--{name} is {value}; write a positive number")
    arguments.seed = arguments.seed or 0
    if arguments.seed < 0:
        raise Refusal(f"--seed is {arguments.seed}; write a number from 0")
    arguments.settings = settings(arguments.method, rest)
    return []


def help_text() -> str:
    """Every setting of every method, for --help."""
    lines = ["settings of the methods that measure policies:"]
    for method, kind in SETTINGS.items():
        lines += [f"  --{method}.{field.name}  (default {field.default})" for field in dataclasses.fields(kind)]
    return "\n".join(lines)
