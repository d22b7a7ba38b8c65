"""English text that comes with Python, as characters: the pages behind `help("…")`, some 400,000 characters."""

import pydoc_data.topics

import numpy as np

LENGTH = 64


def text() -> str:
    """All pages in the order of their names; what is no ASCII is left out."""
    pages = pydoc_data.topics.topics
    return "\n".join(pages[name] for name in sorted(pages)).encode("ascii", "ignore").decode()


def alphabet() -> str:
    return "".join(sorted(set(text())))


def windows(length: int = LENGTH, limit: int = 0) -> dict:
    """What --data names: {"tokens", "targets"}: int32 [N, length] each, the targets one character on.

    Three parts of the text that do not overlap: four fifths to train on, a tenth each to validate and to test.
    limit: characters of the text; 0: all.
    """
    known = alphabet()
    codes = np.searchsorted(np.array(list(known)), np.array(list(text()[: limit or None])))
    cuts = {"train": (0.0, 0.8), "validation": (0.8, 0.9), "test": (0.9, 1.0)}
    return {split: cut(codes[int(a * len(codes)) : int(b * len(codes))], length) for split, (a, b) in cuts.items()}


def cut(codes: np.ndarray, length: int) -> dict[str, np.ndarray]:
    count = (len(codes) - 1) // length
    take = lambda first: codes[first : first + count * length].reshape(count, length).astype(np.int32)  # noqa: E731
    return {"tokens": take(0), "targets": take(1)}
