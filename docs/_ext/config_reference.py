"""A table of every setting: name, default and the comment beside it, read from the source of mpq_jax/config.py."""

import ast
import io
import tokenize


def config_reference(source: str) -> str:
    """Markdown from the source of the dataclasses: one heading and table a class, in order."""
    comments = {
        token.start[0]: token.string.lstrip("# ")
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT and token.start[1]
    }
    lines: list[str] = []
    nodes = ast.parse(source).body
    for node, after in zip(nodes, [*nodes[1:], None], strict=True):
        if isinstance(node, ast.ClassDef) and any("dataclass" in ast.unparse(d) for d in node.decorator_list):
            end = after.lineno if after else len(source.splitlines()) + 1
            lines += [*_table(node, comments, end), ""]
    return "\n".join(lines)


def _table(node: ast.ClassDef, comments: dict[int, str], end: int) -> list[str]:
    """The section of one class, whose last comments lie before line `end`."""
    lines = [
        f"## {'All together' if node.name == 'Config' else node.name.lower()}",
        "",
        "```{eval-rst}",
        # Of the class that holds all there is a page of its own.
        *([] if node.name == "Config" else [f".. py:class:: mpq_jax.config.{node.name}"]),
        "```",
        "",
        ast.get_docstring(node) or "",
        "",
        "| setting | default | |",
        "|---|---|---|",
    ]
    fields = [field for field in node.body if isinstance(field, ast.AnnAssign)]
    ends = [field.lineno for field in fields[1:]] + [end]
    prefix = "" if node.name == "Config" else node.name.lower() + "."
    for field, until in zip(fields, ends, strict=True):
        assert isinstance(field.target, ast.Name) and field.value is not None
        said = " ".join(comments[line] for line in range(field.lineno, until) if line in comments)
        lines.append(
            f"| `{prefix}{field.target.id}` | `{_default(field.value)}` | {said.replace('|', chr(92) + '|')} |"
        )
    return lines


def _default(value: ast.expr) -> str:
    text = ast.unparse(value)
    return "{}" if "default_factory=dict" in text else text
