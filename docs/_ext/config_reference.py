"""A table of every setting: name, default and the comment beside it, read from the source of mpq_jax/config.py."""

import ast
import io
import tokenize


def config_reference(source: str) -> str:
    """Markdown from the source of the dataclasses: one heading and table a class, in order."""
    comments = {
        token.start[0]: token.string.lstrip("# ")
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    lines: list[str] = []
    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef) and any("dataclass" in ast.unparse(d) for d in node.decorator_list):
            lines += [*_table(node, comments), ""]
    return "\n".join(lines)


def _table(node: ast.ClassDef, comments: dict[int, str]) -> list[str]:
    lines = [
        f"## {'All together' if node.name == 'Config' else node.name.lower()}",
        "",
        "```{eval-rst}",
        # Of the class that holds all there is a page of its own.
        *([] if node.name == "Config" else [f".. py:class:: mpq_jax.config.{node.name}"]),
        "```",
        "",
        "| setting | default | |",
        "|---|---|---|",
    ]
    fields = [field for field in node.body if isinstance(field, ast.AnnAssign)]
    ends = [field.lineno for field in fields[1:]] + [(node.end_lineno or 0) + 1]
    prefix = "" if node.name == "Config" else node.name.lower() + "."
    for field, end in zip(fields, ends, strict=True):
        assert isinstance(field.target, ast.Name) and field.value is not None
        said = " ".join(comments[line] for line in range(field.lineno, end) if line in comments)
        lines.append(
            f"| `{prefix}{field.target.id}` | `{_default(field.value)}` | {said.replace('|', chr(92) + '|')} |"
        )
    return lines


def _default(value: ast.expr) -> str:
    text = ast.unparse(value)
    return "{}" if "default_factory=dict" in text else text
