"""Rules: ordered (regex, value) pairs over layer paths; the first that matches wins."""

import contextlib
import difflib
import re
import signal
import threading
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from mpq_jax.types import Bits, Refusal


class Candidates(NamedTuple):
    """The bit-widths a layer may be given: of its weights, and of the activations it reads."""

    w: tuple[int, ...]
    a: tuple[int, ...]


# A rule's value: candidates to search, Bits that are fixed, or "float" for a layer that is left alone.
RuleValue = Candidates | Bits | str
Rules = Sequence[tuple[str, Any]]
SECONDS = 1.0  # for one regex on all layers


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


@contextlib.contextmanager
def _at_most(seconds: float, refusal: str) -> Iterator[None]:
    """Ends the block with a Refusal after so many seconds. A table may come from anyone, and so may its regexes: some
    need time that doubles with every letter. Only the main thread can be watched so."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def over(*_: Any) -> None:
        raise Refusal(refusal)

    before = signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def first_match(rules: Rules, path: str) -> Any:
    """The value of the first rule whose regex is found in `path`; None where no rule matches."""
    return next((value for pattern, value in rules if re.search(pattern, path)), None)


def compiled(pattern: str, what: str = "rule") -> re.Pattern[str]:
    """The regex. Raises Refusal for one that is none."""
    try:
        return re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise Refusal(f"{what} {pattern!r} is not a regular expression: {error}") from None


def check_rules(rules: Rules, paths: Sequence[str], what: str = "rule") -> None:
    """Raises Refusal for a pattern that is no regex, matches none of `paths`, or takes longer than SECONDS on them all."""
    for pattern, _ in rules:
        regex = compiled(pattern, what)
        with _at_most(SECONDS, f"{what} {pattern!r} takes too long on these layers; write it without nested repeats"):
            matches = [path for path in paths if regex.search(path)]
        if not matches:
            near = difflib.get_close_matches(pattern, paths, n=3, cutoff=0.3) or list(paths[:3])
            raise Refusal(f"{what} {pattern!r} matches no layer; the layers nearest to it are {', '.join(near)}")
