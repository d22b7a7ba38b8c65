"""Turns this project's docstrings, which are plain text, into reStructuredText for autodoc.

What the docstrings look like:

  name, other: what they are     a definition, where all names are parameters (of a function) or fields (of a NamedTuple)
  name(x) -> y: …                the same, of a field that is a function
  Raises Refusal …               what is raised
  Returns …  or  -> …            what comes back
  - a point                      a list
  an indented paragraph          shown as it stands

Each of them begins a line, or a sentence. It goes on in lines that are indented, and in others until a sentence ends with
its line. Everything else is text, whose stars, bars and underscores mean themselves; `code` is code.
"""

import inspect
import re
from collections.abc import Collection, Iterator, Sequence
from typing import Any

_CODE = re.compile(r"(`+[^`]+`+)")
_BRACKETS = {"(": 1, "[": 1, "{": 1, ")": -1, "]": -1, "}": -1}
_STARTS = r"Raises [A-Z]|Returns |-> "


def restructured(lines: Sequence[str], names: Collection[str]) -> list[str]:
    """The lines of a docstring as reStructuredText. names: parameters or fields that definitions may speak of."""
    out: list[str] = []
    paragraph: list[str] = []
    for line in [*lines, ""]:
        if line.strip():
            paragraph.append(line)
        elif paragraph:
            out += [*_paragraph(paragraph, names), ""]
            paragraph = []
    return out


def _paragraph(lines: Sequence[str], names: Collection[str]) -> list[str]:
    if all(line.startswith("  ") for line in lines):
        return ["::", "", *("    " + line for line in lines)]
    return [line for part in _parts(lines, names) for line in _rendered(part, names)]


def _parts(lines: Sequence[str], names: Collection[str]) -> Iterator[str]:
    """The pieces of a paragraph, each of one kind."""
    parts: list[str] = []
    for line in lines:
        goes_on = line.startswith(" ") or (
            parts and _kind(line, names) == "text" and (_kind(parts[-1], names) == "text" or parts[-1][-1] not in ".:")
        )
        if goes_on and parts:
            parts[-1] += " " + line.strip()
        else:
            parts.append(line.strip())
    known = "|".join(re.escape(name) for name in names) or "(?!)"
    sentence = re.compile(rf"(?<=[.;]) (?={_STARTS}|(?:{known})(?:, (?:{known}))*: )")
    for part in parts:
        yield from sentence.split(part)


def _kind(part: str, names: Collection[str]) -> str:
    if re.match(r"Raises [A-Z]\w+ ", part):
        return "raises"
    if part.startswith(("Returns ", "-> ")):
        return "returns"
    if part.startswith("- "):
        return "point"
    return "definition" if _term(part, names) else "text"


def _rendered(part: str, names: Collection[str]) -> list[str]:
    kind = _kind(part, names)
    if kind == "raises":
        _, error, rest = part.split(" ", 2)
        return ["", f":raises {error}: {escaped(rest)}", ""]
    if kind == "returns":
        return ["", f":returns: {escaped(part.partition(' ')[2])}", ""]
    if kind == "point":
        return ["", f"- {escaped(part[2:])}", ""]
    if kind == "definition":
        term = _term(part, names)
        return ["", f"``{term}``", f"    {escaped(part[len(term) :].removeprefix(':').strip(' ;'))}", ""]
    return ["", escaped(part), ""]


def _term(part: str, names: Collection[str]) -> str:
    """What a definition defines: "name, other", "name(x)" or "name(x) -> y"; "" for what is no definition."""
    head = re.match(r"[*\w]+(?:, [*\w]+)*", part)
    if head is None or not all(name.lstrip("*") in names for name in head[0].split(", ")):
        return ""
    rest = part[head.end() :]
    if not rest.startswith(("(", ":", " [")):
        return ""
    depth, closed = 0, 0
    for at, character in enumerate(rest):
        depth += _BRACKETS.get(character, 0)
        if not depth and character == ")":
            closed = closed or at + 1
        if not depth and rest.startswith(": ", at) and ". " not in rest[:at]:
            return part[: head.end() + at]
    return part[: head.end() + closed] if rest.startswith("(") and closed else ""


def escaped(text: str) -> str:
    """Text whose characters mean themselves, but for `code`."""
    parts = _CODE.split(text)
    return "".join(
        f"``{part.strip('`')}``" if index % 2 else re.sub(r"([\\*|_])", r"\\\1", part)
        for index, part in enumerate(parts)
    )


def names_of(what: str, thing: Any) -> Collection[str]:
    """Parameters of a function, or fields of a class, that its docstring may define."""
    if what == "class":
        return getattr(thing, "_fields", None) or getattr(thing, "__annotations__", {})
    try:
        return inspect.signature(thing).parameters
    except (TypeError, ValueError):
        return ()


def process(app: Any, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    lines[:] = restructured(lines, () if what == "module" else names_of(what, thing))


def setup(app: Any) -> dict[str, Any]:
    app.connect("autodoc-process-docstring", process)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
