"""Functions of the user's, named "my_package.module:function" on the command line. No JAX."""

import difflib
import importlib
import importlib.util
import inspect
import os
import sys
import traceback
from collections.abc import Mapping
from typing import Any

from mpq_jax.types import Refusal


class Needed(Refusal):
    """Of a function that was not given what it cannot be called without. option: its name."""

    def __init__(self, message: str, option: str):
        super().__init__(message)
        self.option = option


def is_factory(name: str) -> bool:
    """Whether a name is of the form module:function, not that of something that comes with the package."""
    return ":" in name


def made(option: str, name: str, options: Mapping[str, Any], offered: Mapping[str, Any] | None = None) -> Any:
    """What the function `name` returns. option: where the name was given ("--model"), for messages.

    options: what it is called with, as the user gave it. offered: what it is called with besides, if it takes it.
    The current directory can be imported from. Raises Refusal, in one line with the place, for whatever goes wrong: Needed
    for what was not given.
    """
    function = found(option, name)
    parameters = inspect.signature(function.__init__ if inspect.isclass(function) else function).parameters
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    names = [p for p in parameters if p != "self"]
    given = {key: value for key, value in (offered or {}).items() if takes_all or key in parameters}
    if not takes_all and (unknown := [key for key in options if key not in parameters]):
        takes = f"it takes {', '.join(names)}" if names else "it takes none"
        raise Refusal(f"{option} {name} has no option {unknown[0]!r}; {takes} ({option}.options, a JSON object)")
    given |= options
    needed = [n for n, p in parameters.items() if n in names and _needed(p) and n not in given]
    if needed:
        raise Needed(
            f"{option} {name} needs {needed[0]!r}, and nobody gave it; give it a default, or "
            f"{option}.options '{{\"{needed[0]}\": …}}'",
            needed[0],
        )
    try:
        return function(**given)
    except Refusal:
        raise
    except Exception as error:
        raise Refusal(f"{option} {name} failed: {told(error)}") from None


def found(option: str, name: str) -> Any:
    """The function itself, imported."""
    module, _, attribute = name.partition(":")
    if not module or not attribute or module.endswith(".py") or "/" in module:
        meant = module.removesuffix(".py").strip("./").replace("/", ".") or "my_package.module"
        raise Refusal(f"{option} {name!r} is no name of a function; write {meant}:{attribute or 'function'}")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # commands that pip installs do not have it there
    try:
        imported = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name and (module == error.name or module.startswith(f"{error.name}.")):
            raise Refusal(
                f"{option} {name}: there is no module {error.name!r} here or among the installed ones; "
                "start from the folder that holds it, or install it"
            ) from None
        raise Refusal(f"{option} {name} cannot be imported: {told(error)}") from None
    except Exception as error:
        raise Refusal(f"{option} {name} cannot be imported: {told(error)}") from None
    if not hasattr(imported, attribute):
        known = [each for each in vars(imported) if callable(getattr(imported, each)) and not each.startswith("_")]
        near = difflib.get_close_matches(attribute, known, n=1)
        meant = f"did you mean {near[0]}?" if near else f"it has {', '.join(known[:6]) or 'no functions'}"
        raise Refusal(f"{option} {name}: module {module} has no {attribute!r}; {meant}")
    function = getattr(imported, attribute)
    if not callable(function):
        raise Refusal(f"{option} {name} is {type(function).__name__}, not a function; name one that returns it")
    return function


def told(error: BaseException) -> str:
    """An exception in one line: its type, its first line, and the innermost place that is not in a library."""
    first = str(error).strip().splitlines()[:1]
    text = f"{type(error).__name__}: {first[0]}" if first else type(error).__name__
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if "site-packages" not in f.filename and os.sep + "mpq_jax" + os.sep not in f.filename]
    own = [f for f in own if os.path.isfile(f.filename) and "lib" + os.sep + "python" not in f.filename]
    return f"{text} ({os.path.relpath(own[-1].filename)}:{own[-1].lineno})" if own else text


def _needed(parameter: inspect.Parameter) -> bool:
    return parameter.default is parameter.empty and parameter.kind in (
        parameter.POSITIONAL_OR_KEYWORD,
        parameter.KEYWORD_ONLY,
        parameter.POSITIONAL_ONLY,
    )
