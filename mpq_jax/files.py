"""Files that are written whole or not at all, and read with advice when they are not what was expected."""

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mpq_jax.types import Refusal


@contextlib.contextmanager
def whole(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`; moves it into place when the block ends without an error."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # The suffix stays: writers such as matplotlib choose the format by it.
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=path.suffix)
    os.close(handle)
    try:
        yield Path(name)
        os.chmod(name, 0o644)
        _to_disk(name)  # before the name is: a machine that goes down leaves the old file or the new one
        os.replace(name, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)


def _to_disk(path: str | Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def check_out(out: Path, read: Sequence[Path | None], option: str = "--out") -> None:
    """Raises Refusal for a place where no file can be written, or where it would replace a file that is read.

    option: what the place was given with.
    """
    if out.is_dir():
        raise Refusal(f"{option} {out} is a folder; name a file in it")
    if any(path is not None and _same(out, path) for path in read):
        raise Refusal(f"{option} {out} would replace a file that this command reads or writes; give another {option}")
    above = next((parent for parent in out.parents if parent.exists()), None)
    if above is not None and not above.is_dir():
        raise Refusal(f"{option} {out} cannot be written: {above} is no folder; give another {option}")


def _same(one: Path, other: Path) -> bool:
    both = one.exists() and other.exists()
    return one.samefile(other) if both else one.resolve() == other.resolve()


def write_text(path: str | Path, text: str) -> None:
    """Writes `text` to `path`, whole or not at all."""
    with whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: Any) -> None:
    """Writes `value` as JSON (no NaN, no infinity), whole or not at all."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def read_json(path: str | Path, format: str, version: int, made_by: str) -> dict[str, Any]:
    """Reads a JSON file of ours: an object with the given "format" and "version".

    made_by: the command that makes such a file, for the advice. Raises Refusal for anything else.
    """
    try:
        with open(path, encoding="utf-8") as file:
            value = json.load(file)
    except FileNotFoundError:
        raise Refusal(f"{path} does not exist; make it with: {made_by}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise Refusal(f"{path} cannot be read: {error}; make it again with: {made_by}") from None
    except json.JSONDecodeError as error:
        raise Refusal(
            f"{path} is not whole JSON (line {error.lineno}: {error.msg}); make it again with: {made_by}"
        ) from None
    except ValueError as error:  # an integer with more digits than Python reads
        raise Refusal(f"{path} cannot be read: {str(error).split(';')[0]}; make it again with: {made_by}") from None
    except RecursionError:
        raise Refusal(f"{path} is nested too deeply to be a {format} file; make it again with: {made_by}") from None
    found = value.get("format") if isinstance(value, dict) else None
    if found != format:
        raise Refusal(f'{path} is no {format} file (its "format" is {found!r}); make one with: {made_by}')
    if type(value.get("version")) is not int or value["version"] != version:
        raise Refusal(
            f"{path} is {format} version {value.get('version')!r}, this program reads version {version}; "
            f"make it again with: {made_by}"
        )
    return value
