"""Rules: ordered (regex, value) pairs over layer paths; the first that matches wins."""

import difflib
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from mpq_jax.types import Bits, Refusal


class Candidates(NamedTuple):
    """The bit-widths a layer may be given: of its weights, and of the activations it reads."""

    w: tuple[int, ...]
    a: tuple[int, ...]


# A rule's value: candidates to search, Bits that are fixed, or "float" for a layer that is left alone.
RuleValue = Candidates | Bits | str
Rules = Sequence[tuple[str, Any]]


def parse_value(value: Any) -> RuleValue:
    """A rule's value from Python or from text: "float", "8,8" (fixed W8A8), "w2/4/8,a4/8" (candidates).

    Raises Refusal for anything else.
    """
    if isinstance(value, (Candidates, Bits)) or value == "float":
        return value
    if isinstance(value, (tuple, list)) and len(value) == 2:
        if all(isinstance(b, int) for b in value):
            return Bits(*value)
        if all(isinstance(b, (tuple, list)) for b in value):
            return Candidates(tuple(value[0]), tuple(value[1]))
    if isinstance(value, str):
        if fixed := re.fullmatch(r"(\d+),(\d+)", value):
            return Bits(int(fixed[1]), int(fixed[2]))
        if lists := re.fullmatch(r"w(\d+(?:/\d+)*),a(\d+(?:/\d+)*)", value):
            return Candidates(*(tuple(int(b) for b in group.split("/")) for group in lists.groups()))
    raise Refusal(f'rule value {value!r} is not known; write "float", "8,8" (fixed) or "w2/4/8,a4/8" (candidates)')


def first_match(rules: Rules, path: str) -> Any:
    """The value of the first rule whose regex is found in `path`; None where no rule matches."""
    return next((value for pattern, value in rules if re.search(pattern, path)), None)


def check_rules(rules: Rules, paths: Sequence[str], what: str = "rule") -> None:
    """Raises Refusal for a pattern that is no regex, or matches none of `paths`."""
    for pattern, _ in rules:
        try:
            compiled = re.compile(pattern)
        except re.error as error:
            raise Refusal(f"{what} {pattern!r} is not a regular expression: {error}") from None
        if not any(compiled.search(path) for path in paths):
            near = difflib.get_close_matches(pattern, paths, n=3, cutoff=0.3) or list(paths[:3])
            raise Refusal(f"{what} {pattern!r} matches no layer; the layers nearest to it are {', '.join(near)}")
