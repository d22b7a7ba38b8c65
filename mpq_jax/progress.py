"""Progress: a bar on a terminal, plain lines elsewhere."""

import contextlib
import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any, TextIO

from tqdm import tqdm


class Bar:
    """Iterates over `iterable`; `note(text)` says how it goes."""

    def __init__(self, iterable: Iterable[Any], total: int, label: str, stream: TextIO, every: float):
        self._iterable, self._total, self._label, self._stream = iterable, total, label, stream
        self._every, self._said, self._done, self._text = every, time.monotonic(), 0, ""
        self._said_at = 0
        self._tqdm = tqdm(total=total, desc=label, file=stream, dynamic_ncols=True) if stream.isatty() else None

    def __iter__(self) -> Iterator[Any]:
        for item in self._iterable:
            yield item
            self._done += 1
            if self._tqdm is not None:
                self._tqdm.update()
            elif time.monotonic() - self._said >= self._every:
                self._say()

    def note(self, text: str) -> None:
        """Text beside the bar, or at the end of the next plain line."""
        self._text = text
        if self._tqdm is not None:
            self._tqdm.set_postfix_str(text)

    def close(self) -> None:
        """Ends the bar; says the last line where that was not said yet."""
        if self._tqdm is not None:
            self._tqdm.close()
        elif self._done > self._said_at:
            self._say()

    def _say(self) -> None:
        self._said, self._said_at = time.monotonic(), self._done
        print(f"{self._label} {self._done}/{self._total} {self._text}".rstrip(), file=self._stream, flush=True)


@contextlib.contextmanager
def progress(
    iterable: Iterable[Any], total: int, label: str, stream: TextIO | None = None, every: float = 10.0
) -> Iterator[Bar]:
    """A Bar over `iterable`. Where `stream` (standard error) is no terminal: at most one line in `every` seconds."""
    bar = Bar(iterable, total, label, stream or sys.stderr, every)
    try:
        yield bar
    finally:
        bar.close()
