"""Digests of checkpoints: whether one still is what was written. No JAX.

<stage>/<step>.sha256 lists the files of <stage>/<step> as sha256sum does (`cd <stage>; sha256sum -c <step>.sha256`). It is
written last, when all that it lists has reached the disk.
"""

import hashlib
import os
from pathlib import Path

from mpq_jax.files import write_text


def write(checkpoint: Path) -> None:
    """Brings a checkpoint's files to the disk, then writes their digests beside it."""
    lines = []
    for file in sorted(path for path in checkpoint.rglob("*") if path.is_file()):
        with open(file, "rb") as opened:
            lines.append(
                f"{hashlib.file_digest(opened, 'sha256').hexdigest()}  {file.relative_to(checkpoint.parent)}\n"
            )
            os.fsync(opened.fileno())
    write_text(_beside(checkpoint), "".join(lines))


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint: the first file that is missing or changed. None where nothing is, or where no
    digests were written (an older program, or one that was killed in between: the checkpoint is whole all the same).
    """
    try:
        lines = _beside(checkpoint).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        return f"its digests cannot be read: {error}"
    for line in lines:
        digest, _, name = line.partition("  ")
        try:
            with open(checkpoint.parent / name, "rb") as opened:
                same = hashlib.file_digest(opened, "sha256").hexdigest() == digest
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
        if not same:
            return f"{name} is not what was written"
    return None


def set_aside(checkpoint: Path) -> Path:
    """Renames a damaged checkpoint, so that its step can be saved again. -> its new path"""
    aside = checkpoint.with_name(f"damaged-{checkpoint.name}")
    number = 1
    while aside.exists():
        number += 1
        aside = checkpoint.with_name(f"damaged-{checkpoint.name}-{number}")
    checkpoint.rename(aside)
    _beside(checkpoint).unlink(missing_ok=True)
    return aside


def sweep(stage: Path) -> None:
    """Deletes digests of checkpoints that are no longer there."""
    for file in stage.glob("*.sha256"):
        if not (stage / file.stem).exists():
            file.unlink(missing_ok=True)


def _beside(checkpoint: Path) -> Path:
    return checkpoint.with_name(f"{checkpoint.name}.sha256")
