"""What all commands share: their options, how a mistake is told, and how they end. No JAX."""

import argparse
import difflib
import errno
import functools
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn, get_args

from mpq_jax import compilation_cache, stopping
from mpq_jax.config import Config, as_text, load, options
from mpq_jax.types import Refusal

# What a disk or its permissions answer; any other OSError is a mistake of the program.
_DISK = (
    *("ENOSPC", "EDQUOT", "EFBIG", "EROFS", "EACCES", "EPERM", "EIO", "ESTALE", "ENAMETOOLONG", "ENOTDIR", "EISDIR"),
    *("ELOOP", "EMFILE", "ENFILE", "EBUSY", "ETXTBSY"),
)


def command(function: Callable[[Sequence[str] | None], int]) -> Callable[..., int]:
    """A command's main(argv=None): a Refusal, and what a disk refuses, become one line on stderr and exit code 2.

    SIGTERM (stopping.py) ends it with 0, Ctrl-C with 130; the line says how to go on. XLA's programs are kept for the
    next time (compilation_cache.py).
    """

    @functools.wraps(function)
    def main(argv: Sequence[str] | None = None) -> int:
        try:
            with stopping.on_sigterm():
                compilation_cache.switch_on()
                code = function(argv)
                sys.stdout.flush()  # here, where a reader that has gone is looked for
                return code
        except Refusal as refusal:
            print(f"error: {one_line(as_typed(str(refusal)))}", file=sys.stderr)
            return 2
        except BrokenPipeError:
            # Whoever read on has enough (| head). What Python still flushes when it ends has nowhere to go.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        except OSError as error:
            if errno.errorcode.get(error.errno or 0) not in _DISK:
                raise
            where = f"{error.filename}: " if error.filename is not None else ""
            print(f"error: {where}{error.strerror}; mend that, and give the same command again", file=sys.stderr)
            return 2
        except stopping.Stopped as stopped:
            print(f"stopped by SIGTERM: {stopped}; the same command goes on from there", file=sys.stderr)
            return 0
        except KeyboardInterrupt:
            print("interrupted; the same command goes on from what was saved", file=sys.stderr)
            return 130

    return main


class Parser(argparse.ArgumentParser):
    """argparse, but a mistake is one line: it raises Refusal in place of printing the usage. No abbreviations."""

    def __init__(self, program: str, description: str | None):
        """program: as in a checkout, e.g. "search.py". description: its first line is shown."""
        first = (description or "").partition("\n")[0]
        super().__init__(prog=as_typed(program), description=as_typed(first), allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        """Raises Refusal."""
        raise Refusal(f"{message} ({self.prog} --help lists all options)")


def add_model(parser: argparse.ArgumentParser, also: str = "") -> None:
    """The options --config, --model and --data of a command. also: what --config is good for there."""
    parser.add_argument("--config", type=Path, help=f"{also}a config file, e.g. configs/digits.py")
    parser.add_argument("--model", help="short for --model.name: one of mpq_jax.models, or my_package.module:factory")
    parser.add_argument("--data", help="short for --data.name: a data set, or my_package.module:function")


def of_model(arguments: argparse.Namespace, overrides: Sequence[str]) -> Config:
    """The config that the options of `add_model` and overrides give. Without --config all else is at its default.

    Raises Refusal where there is neither --config nor --model, and as `load` does.
    """
    if arguments.config is None and arguments.model is None:
        raise Refusal("give --config, e.g. --config configs/digits.py, or your own --model my_package.module:factory")
    return load(arguments.config, [*short(arguments), *overrides])


def short(arguments: argparse.Namespace) -> list[str]:
    """--model and --data as overrides."""
    pairs = (("--model.name", arguments.model), ("--data.name", arguments.data))
    return [word for key, value in pairs if value is not None for word in (key, value)]


def refuse_misspelt(arguments: Sequence[str], own: Sequence[str], program: str) -> None:
    """Raises Refusal for a word that is no value of the config but close to one of the command's `own` options."""
    known = options(Config())
    for word in arguments:
        name = word.partition("=")[0]
        if name.startswith("--") and name[2:].replace("-", "_") not in known:
            near = difflib.get_close_matches(name, own, n=1, cutoff=0.75)
            if near:
                raise Refusal(f"unknown option {name}; the nearest is {near[0]} ({program} --help lists all)")


def add_help(parser: argparse.ArgumentParser, config: Config | None = None) -> None:
    """Lists every overridable value, with its type and default, in the parser's --help."""
    lines = ["any value of the config can be overridden:"]
    for key, (kind, value) in options(config or Config()).items():
        name = getattr(kind, "__name__", str(kind)) if not get_args(kind) else str(kind).replace("typing.", "")
        lines.append(f"  --{key}  ({name}, default {as_text(value) or 'empty'})")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = "\n".join(lines)


def as_typed(text: str) -> str:
    """`text` with the commands under the names that they have here: where an installed one runs (mpq-search), mpq-train
    for `python train.py`, mpq-search for `python search.py`, mpq-export for `python -m mpq_jax.export`, and so on."""
    if not Path(sys.argv[0]).name.startswith("mpq-"):
        return text
    text = re.sub(r"(?:python +)?\b(train|search)\.py", r"mpq-\1", text)
    return re.sub(r"python -m mpq_jax\.(export|latency)", r"mpq-\1", text)


def one_line(text: str, most: int = 1000) -> str:
    """`text` without line breaks, its middle cut out where it is too long: what a file holds may be of any length."""
    text = " ".join(text.split())
    return text if len(text) <= most else f"{text[: most * 2 // 3]} … {text[-most // 4 :]}"
