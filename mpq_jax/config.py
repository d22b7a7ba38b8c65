"""A run's settings: typed, one file an experiment, every value can be overridden. No JAX."""

import dataclasses
import difflib
import json
import math
import re
import runpy
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from mpq_jax.types import Refusal


@dataclasses.dataclass(frozen=True)
class Data:
    """The data set, and how its images are read."""

    name: str = "digits"  # digits, fashion_mnist, cifar10, imagenet2012, any TFDS image classification set, or
    # "my_package.module:function" for data of your own, see docs/own_model.md
    options: dict[str, Any] = dataclasses.field(default_factory=dict)  # JSON; passed to that function
    data_dir: str = ""  # where prepared sets lie; empty: data/ here, then ~/tensorflow_datasets
    validation_fraction: float = 0.1  # cut from the training split
    augment: bool = True
    image_size: int = 0  # 0: the set's own
    workers: int = 0  # processes that read ahead; 0: threads of this one


@dataclasses.dataclass(frozen=True)
class Model:
    """The float model."""

    name: str = "resnet8"  # a name in mpq_jax.models, or "my_package.module:factory"
    options: dict[str, Any] = dataclasses.field(default_factory=dict)  # JSON; passed to the model
    dtype: str = "float32"  # compute type: float32 or bfloat16; step sizes stay float32
    weights: str = ""  # in place of float training: .safetensors in timm/torchvision naming; of your own model,
    # .safetensors of Flax paths, .msgpack, or an orbax checkpoint's folder


@dataclasses.dataclass(frozen=True)
class Quantize:
    """The method and the candidates; `quantized_model.quantize` says what each means."""

    quantizer: str = "lsq"  # lsq, pact, qil or lq_nets
    bit_widths: tuple[int, ...] = (2, 3, 4, 5, 6)
    activation_bit_widths: tuple[int, ...] = ()  # empty: as bit_widths
    rules: tuple[str, ...] = ()  # "regex=8,8" (fixed), "regex=float", "regex=w2/4/8,a4/8"; first wins; ";" between
    ends: str = "8,8"  # first and last layer where no rule speaks of them; "searched": as any other
    tie_activations: bool = True
    start: str = "statistics"  # of grids: statistics, or same (a spacing of 0.1 / bits in every layer)
    per_channel: bool = False  # lsq: a step size an output channel
    power_of_two: bool = False  # lsq
    narrow: bool = False  # lsq: symmetric weight codes
    ewgs: bool = False  # lsq: rounding's gradient g (1 + 1e-3 sign(g) (x - round x))
    rescale: bool = True  # pact's weights, qil: x_hat in the units of x; false: in [-1, 1], as in the papers
    clip_penalty: float = 1e-4  # pact: lambda of lambda a^2 in the loss, a the clipping level


@dataclasses.dataclass(frozen=True)
class Pretrain:
    """Training of the float model: SGD, learning rate falling as a cosine after a linear warm-up."""

    steps: int = 400  # 0: by epochs
    epochs: float = 0.0
    batch_size: int = 128
    optimizer: str = "sgd"  # sgd or adamw
    learning_rate: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    warmup_steps: int = 50
    label_smoothing: float = 0.0


@dataclasses.dataclass(frozen=True)
class Joint:
    """Joint training of all bit-widths (LIMPQ); PAPER_JOINT has the paper's own values."""

    steps: int = 300
    epochs: float = 0.0
    batch_size: int = 64
    weights: str = "still"  # still, or trained (as in the paper)
    learning_rate: float = 0.01  # of the weights where they are trained
    end_learning_rate: float = 0.0
    momentum: float = 0.9
    weight_decay: float = 2.5e-5
    clip: float = 1.0  # gradients of weights, by value
    warmup_steps: int = 0
    step_size_optimizer: str = "log_adam"  # log_adam, or sgd (with the weights' settings, as in the paper)
    step_size_learning_rate: float = 0.1
    error_weight: float = 1.0  # of the relative quantization error in the step sizes' loss; 0 in the paper
    error_steps: int = 60  # first steps, in which step sizes follow that error alone
    slices: str = "auto"  # true: each row sees a slice of the batch of its own: a step costs one pass, not one a row;
    # false: each sees all of it; auto: slices, where each has 10 samples, weights are still, nothing is distilled, and alpha
    # is given or measured
    bit_widths: tuple[int, ...] = ()  # empty: all; else these are trained, the step sizes of the others interpolated
    random_rows: int = 1
    same_bits: bool = False  # random rows draw one width for weights and activations, as in the paper
    affine_per_row: bool = False
    rows_at_a_time: int = 0  # so many rows are mapped at once, their gradients summed; 0: one, the fastest on CPU and
    # the least memory (all are a quarter faster on a GPU), or all where distillation from the widest row needs them
    recompute: bool = False  # one row at a time with a quarter less memory, for some time; benchmarks/README.md
    accumulate: int = 1  # batches an optimizer step
    average: float = 0.0  # decay of the moving average of the parameters; 0: none
    label_smoothing: float = 0.0
    distill: float = 0.0  # weight of in-place distillation from the widest row
    settled: float = 0.0  # not 0: step sizes keep their learning rate until their means over `window` steps differ by
    # less than this (root mean square of relative differences), then cool down over two windows; `steps` at most
    window: int = 20
    alpha: str = "auto"  # fitted to losses of random policies, or a number
    alpha_policies: int = 128  # so many are measured after training, all on the same two batches (a 20th of the cost of
    # 300 steps of 6 rows): that repeats with other batches, where the random rows' own log (0) does not; docs/results.md

    def __post_init__(self) -> None:
        text = str(self.slices).lower()  # True and 1 are words for it, too
        object.__setattr__(self, "slices", {"1": "true", "0": "false"}.get(text, text))


@dataclasses.dataclass(frozen=True)
class Search:
    """What every search of the run takes and respects."""

    criterion: str = "output_fisher"  # whose table is searched unless --criterion names one; "learned" is LIMPQ's own
    rules: tuple[str, ...] = ()  # "regex=value" of search.py --rule; kept in each criterion's table, all hold together


@dataclasses.dataclass(frozen=True)
class Finetune:
    """Training with one policy (LIMPQ); PAPER_FINETUNE has the paper's own values."""

    start: str = "joint"  # weights and step sizes from the joint model, or from float
    steps: int = 300
    epochs: float = 0.0
    batch_size: int = 128
    optimizer: str = "sgd"  # of the weights: sgd or adamw
    learning_rate: float = 0.04
    momentum: float = 0.9
    weight_decay: float = 2.5e-5
    warmup_steps: int = 20
    step_size_learning_rate: float = 0.005
    label_smoothing: float = 0.0
    distill: float = 0.0  # weight of distillation from the float model
    accumulate: int = 1
    average: float = 0.0
    recompute: bool = False
    compare: bool = True  # also fine-tune the best uniform policy that fits, and random ones
    random_policies: int = 1


@dataclasses.dataclass(frozen=True)
class Criteria:
    """How criteria are measured; each names the settings that change it (`criteria.CRITERIA`)."""

    samples: int = 1024  # training images that criteria measure on
    batch_size: int = 64
    step_sizes: str = "calibrated"  # of the quantization errors: calibrated, or joint (learned)
    alpha: float = 0.3333  # output_fisher: what fine-tuning leaves of the weights' harm; 1: of a model as it is
    hessian_samples: int = 256  # hawq: images that the Hessian is of
    relative_error: float = 0.05  # hawq_v2: standard error of a trace; hawq: residual of an eigenvalue
    max_draws: int = 500  # … or so many draws or iterations, whichever comes first
    uniform_activations: int = 0  # hawq, hawq_v2, mpqco: weights only, all activations at so many bits, as published;
    # 0: the same formula on activations too
    others: str = "float"  # one_at_a_time: all else in float, or at its widest
    policies: int = 240  # sampled: random policies that are measured
    near: tuple[
        str, ...
    ] = ()  # sampled: budgets that they are drawn near, such as "bitops=W3A3"; search.py gives its own
    monotone: bool = False  # regression, sampled: harm must not rise with bits
    settled: float = 0.5  # regression: share of the random rows' log, from its end, that is used


@dataclasses.dataclass(frozen=True)
class Logs:
    """What is written of a run beside log.jsonl, which every stage's folder has."""

    tensorboard: bool = False  # also to WORKDIR/tensorboard; needs tensorboardX
    wandb: str = ""  # also to Weights & Biases, as a run of this project; needs wandb
    profile: int = 0  # steps of each stage that are traced, to WORKDIR/profile; train.py --profile: 10


@dataclasses.dataclass(frozen=True)
class Parallel:
    """How a run is spread over devices and processes; of no consequence for what comes out but rounding. See parallel.py."""

    data: int = 1  # devices that share a batch; 0: all that row leaves
    row: int = 1  # devices that share the rows of joint training
    fsdp: bool = False  # parameters and optimizer split over data, not copied
    distributed: bool = False  # several processes, which JAX finds: TPU pods, Slurm, Open MPI
    coordinator: str = ""  # host:port of process 0, where JAX cannot find the processes; with the next two
    processes: int = 0
    process: int = -1  # this one's number, from 0


@dataclasses.dataclass(frozen=True)
class Config:
    """All settings of a run. In an option's name: --seed, --joint.steps."""

    seed: int = 0
    data: Data = Data()
    model: Model = Model()
    quantize: Quantize = Quantize()
    pretrain: Pretrain = Pretrain()
    joint: Joint = Joint()
    search: Search = Search()
    finetune: Finetune = Finetune()
    criteria: Criteria = Criteria()
    logs: Logs = Logs()
    parallel: Parallel = Parallel()
    eval_batch_size: int = 500
    statistics_batches: int = 50  # training batches that normalisation statistics are re-estimated on; too few miss
    # what a channel that is almost always dead does when it is not
    checkpoint_every: int = 200  # steps
    log_every: int = 20  # steps between lines of log.jsonl


# The paper's own recipe, as read in its public code (Tang et al. 2022); epochs and batch size are each experiment's.
PAPER_JOINT = Joint(
    steps=0,
    weights="trained",
    learning_rate=0.01,
    end_learning_rate=1e-5,
    momentum=0.9,
    weight_decay=2.5e-5,
    clip=1.0,
    step_size_optimizer="sgd",
    error_weight=0.0,
    slices="false",
    same_bits=True,
    affine_per_row=True,
    label_smoothing=0.1,
)
PAPER_FINETUNE = Finetune(
    start="float", steps=0, epochs=95, learning_rate=0.04, weight_decay=2.5e-5, label_smoothing=0.1
)


# Numbers that 0 is no sense of, and shares that 1 is none of; all others are 0 or more.
# Of criteria's settings, those that are used are checked where they are.
_FROM_ONE = re.compile(
    r"(?!criteria).*batch_size|.*\.accumulate|joint\.window|checkpoint_every|log_every|statistics_batches"
)
_UP_TO_ONE = re.compile(r".*\.distill")
_BELOW_ONE = re.compile(r".*\.(average|momentum|label_smoothing)")
_MOST = 2**31 - 1  # JAX's integers, NumPy's seeds
_ANY = ("parallel.process",)  # -1: JAX finds it


def check(config: Config) -> Config:
    """The config itself. Raises Refusal for a number that no setting of that name can be, before anything is run."""
    for key, (kind, value) in options(config).items():
        if kind not in (int, float) or key in _ANY:
            continue
        if not math.isfinite(value) or value < 0:
            raise Refusal(f"{key} is {value}; give a number of 0 or more")
        if kind is int and value > _MOST:
            raise Refusal(f"{key} is {value}; give a whole number up to {_MOST}")
        if _FROM_ONE.fullmatch(key) and value < 1:
            raise Refusal(f"{key} is {value}; give a whole number of 1 or more")
        if _UP_TO_ONE.fullmatch(key) and value > 1:
            raise Refusal(f"{key} is {value}; give a share from 0 to 1: the rest of the loss is that of the labels")
        if _BELOW_ONE.fullmatch(key) and value >= 1:
            raise Refusal(f"{key} is {value}; give a number from 0 up to, not including, 1")
    return config


def load(path: str | Path | None, overrides: Sequence[str] = ()) -> Config:
    """The `config` that a config file defines, with command-line overrides (["--joint.steps", "100"]).

    path: a file, or the name of one that comes with the package, such as `digits`; None: a config of defaults.
    Raises Refusal for a file that is missing or defines none, for unknown or ill-typed overrides, and for numbers that no
    such setting can be.
    """
    if path is None:
        return check(override(Config(), overrides))
    path = find(path)
    try:
        config = runpy.run_path(str(path)).get("config")
    except Exception as error:
        raise Refusal(f"config {path} cannot be run: {type(error).__name__}: {error}") from None
    if not isinstance(config, Config):
        raise Refusal(f"config {path} must define `config = Config(...)` (from mpq_jax.config import Config)")
    return check(override(config, overrides))


def find(path: str | Path) -> Path:
    """The config file at `path`, or the one of that name which comes with the package. Raises Refusal for neither."""
    if Path(path).is_file():
        return Path(path)
    # In a wheel they lie in the package, in a checkout beside it.
    here = Path(__file__).parent
    folder = next((f for f in (here / "configs", here.parent / "configs") if f.is_dir()), here / "configs")
    there = {file.stem: file for file in sorted(folder.glob("*.py"))}
    if str(path) not in there:
        names = ", ".join(there)
        raise Refusal(f"config {path} does not exist; name a file, or one of those that come with mpq_jax: {names}")
    return there[str(path)]


def options(config: Config) -> dict[str, tuple[Any, Any]]:
    """{"joint.steps": (type, value), ...}, every value that can be overridden."""
    result: dict[str, tuple[Any, Any]] = {}
    for name, kind in get_type_hints(Config).items():
        value = getattr(config, name)
        if dataclasses.is_dataclass(value):
            for inner, inner_kind in get_type_hints(kind).items():
                result[f"{name}.{inner}"] = (inner_kind, getattr(value, inner))
        else:
            result[name] = (kind, value)
    return result


def override(config: Config, arguments: Sequence[str]) -> Config:
    """`config` with ["--key", "value", "--key=value", ...] applied.

    Raises Refusal for an unknown key, naming the nearest, for one without a value, and for a value of another type.
    """
    known = options(config)
    changes: dict[str, Any] = {}
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            raise Refusal(f"{word!r} stands alone; options look like --joint.steps 100")
        key, given, value = word[2:].partition("=")
        key = key.replace("-", "_")
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.0)
            raise Refusal(f"unknown option --{key}; the nearest is --{near[0]} (train.py --help lists all)")
        if not given:
            if not rest:
                raise Refusal(f"option --{key} needs a value, e.g. --{key} {as_text(known[key][1]) or 'X'}")
            value = rest.pop(0)
        parsed = parse_value(key, known[key][0], value)
        # Rules add up, as those of search.py do; of other options the last counts.
        changes[key] = (*changes[key], *parsed) if key == "quantize.rules" and key in changes else parsed
    for key, value in changes.items():
        section, _, name = key.rpartition(".")
        if section:
            config = dataclasses.replace(
                config, **{section: dataclasses.replace(getattr(config, section), **{name: value})}
            )
        else:
            config = dataclasses.replace(config, **{name: value})
    return config


def parse_value(key: str, kind: Any, text: str) -> Any:
    """The value of option --key from its text. Raises Refusal where it is not of the type `kind`."""
    try:
        if kind is bool:
            return {"true": True, "false": False, "1": True, "0": False}[text.lower()]
        if get_origin(kind) is tuple:
            item = get_args(kind)[0]
            separator = ";" if item is str else ","
            return tuple(item(part.strip()) for part in text.split(separator) if part.strip())
        if get_origin(kind) is dict:
            value = json.loads(text)
            if not isinstance(value, dict):
                raise ValueError
            return value
        return kind(text)
    except (KeyError, ValueError):
        example = {bool: "true or false", int: "an integer", float: "a number"}.get(kind)
        if example is None:
            example = "a JSON object" if get_origin(kind) is dict else "a list such as 2,3,4"
        raise Refusal(f"option --{key} takes {example}, found {text!r}") from None


def as_text(value: Any) -> str:
    """A value as it would be typed on the command line."""
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return json.dumps(value) if isinstance(value, dict) else str(value)


def to_json(config: Config) -> dict[str, Any]:
    """Plain JSON values, section by section."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def from_json(value: Any) -> Config:
    """The config that `to_json` made; what it does not name is at its default.

    Raises ValueError, KeyError or TypeError for what is no such value.
    """
    sections: dict[str, Any] = {}
    if not isinstance(value, dict):
        raise TypeError("no settings")
    if unknown := set(value) - set(get_type_hints(Config)):
        raise KeyError(min(unknown))
    for name, kind in get_type_hints(Config).items():
        if name not in value:
            continue
        if dataclasses.is_dataclass(kind):
            hints = get_type_hints(kind)
            if not isinstance(value[name], dict):
                raise TypeError(f"{name} holds no settings")
            # A run from before there were slices trained on whole batches.
            saved = {"slices": "false", **value[name]} if name == "joint" else value[name]
            given = {key: _typed(f"{name}.{key}", hints[key], v) for key, v in saved.items()}
            sections[name] = kind(**given)  # type: ignore[operator]
        else:
            sections[name] = _typed(name, kind, value[name])
    return Config(**sections)


def _typed(key: str, kind: Any, value: Any) -> Any:
    """A JSON value as a setting of type `kind`. Raises TypeError where it is of another."""
    if get_origin(kind) is tuple and isinstance(value, list):
        return tuple(_typed(key, get_args(kind)[0], item) for item in value)
    number = type(value) is int or (type(value) is float and math.isfinite(value))
    if kind is float and number and abs(value) < 1e300:
        return value
    if get_origin(kind) is dict and isinstance(value, dict):
        return value
    if key == "joint.slices" and type(value) is bool:
        return str(value).lower()  # as it was before there was "auto"
    if type(value) is not kind or (kind is int and abs(value) >= 2**63):
        raise TypeError(f"{key} is {str(value)[:80]!r}")
    return value


def differences(mine: dict[str, Any], theirs: dict[str, Any], sections: Sequence[str]) -> list[str]:
    """Keys of `sections` in which two configs (as JSON) differ."""
    found = []
    for section in sections:
        a, b = mine.get(section), theirs.get(section)
        if isinstance(a, dict) and isinstance(b, dict):
            found += [f"{section}.{key}" for key in {**a, **b} if a.get(key) != b.get(key)]
        elif a != b:
            found.append(section)
    return found
