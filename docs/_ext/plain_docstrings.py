"""Turns this project's docstrings, which are plain text, into reStructuredText for autodoc.

What the docstrings look like:

  name, other: what they are     a definition, where all names are parameters (of a function) or fields (of a NamedTuple);
      lines that are indented    go on with it
  name(x) -> y: …                the same, of a field that is a function
  Raises Refusal …               what is raised
  Returns …  or  -> …            what comes back
  - a point                      a list
  an indented paragraph          shown as it stands

Everything else is text, whose stars, bars and underscores mean themselves; `code` is code.
"""

import inspect
import re
from collections.abc import Collection, Sequence
from typing import Any

_CODE = re.compile(r"(`+[^`]+`+)")
_BRACKETS = {"(": 1, "[": 1, "{": 1, ")": -1, "]": -1, "}": -1}


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
    """One paragraph: parts of different kinds, each with the indented lines that belong to it."""
    if all(line.startswith("  ") for line in lines):
        return ["::", "", *("    " + line for line in lines)]
    parts: list[list[str]] = []
    text = False
    for line in lines:
        starts = _kind(line, names) != "text"
        if starts or not parts or not (text or line.startswith(" ")):
            parts.append([line.strip()])
            text = not starts
        else:
            parts[-1].append(line.strip())
    out: list[str] = []
    for part in parts:
        out += _rendered(part, names)
    return out


def _kind(line: str, names: Collection[str]) -> str:
    if line.startswith(" "):
        return "text"
    if re.match(r"Raises [A-Z]\w+", line):
        return "raises"
    if re.match(r"(Returns|->)\s", line):
        return "returns"
    if line.startswith("- "):
        return "point"
    return "definition" if _term(line, names) else "text"


def _rendered(part: Sequence[str], names: Collection[str]) -> list[str]:
    kind = _kind(part[0], names)
    text = " ".join(part)
    if kind == "raises":
        _, error, rest = text.split(" ", 2) if text.count(" ") > 1 else (*text.split(" "), "")
        return ["", f":raises {error.rstrip('.,')}: {escaped(rest)}", ""]
    if kind == "returns":
        return ["", f":returns: {escaped(text.partition(' ')[2])}", ""]
    if kind == "point":
        return ["", f"- {escaped(text[2:])}", ""]
    if kind == "definition":
        term = _term(text, names)
        rest = text[len(term) :].removeprefix(":").strip()
        return ["", f"``{term}``", f"    {escaped(rest)}", ""]
    return ["", *map(escaped, part), ""]


def _term(line: str, names: Collection[str]) -> str:
    """What a definition defines: "name, other", "name(x)" or "name(x) -> y"; "" for a line that is none."""
    head = re.match(r"[*\w]+(?:, [*\w]+)*", line)
    if head is None or not all(name.lstrip("*") in names for name in head[0].split(", ")):
        return ""
    rest = line[head.end() :]
    if not rest.startswith(("(", ":", " [")):
        return ""
    depth, closed = 0, 0
    for at, character in enumerate(rest):
        depth += _BRACKETS.get(character, 0)
        if not depth and character in ")]":
            closed = closed or at + 1
        if not depth and rest.startswith(": ", at) or not depth and rest[at:] == ":":
            return line[: head.end() + at]
    return line[: head.end() + closed] if rest.startswith("(") and closed else ""


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
