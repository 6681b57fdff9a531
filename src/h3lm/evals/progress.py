"""What a person sees while requests are answered."""

import time
from collections.abc import Callable
from types import TracebackType
from typing import Self, TextIO

from h3lm.evals.scorer import Work


class RequestLine:
    """A live line: requests, tokens a second, what the tree saves, time left.

    Silent where nobody watches.

    Args:
        stream: Where to.
    """

    def __init__(self, stream: TextIO) -> None:
        self.stream, self.shown = stream, False
        self.began: float | None = None
        self.first = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.shown:
            self.stream.write("\n")

    def show(self, done: int, total: int, work: Work) -> None:
        """Rewrite the line."""
        if not self.stream.isatty():
            return
        now = time.monotonic()
        if self.began is None:
            self.began, self.first = now, done
        elapsed = now - self.began
        rate = (done - self.first) / elapsed if elapsed > 0 else 0.0
        left = f", {(total - done) / rate:,.0f} s left" if rate > 0 else ""
        saved = work.asked / max(1, work.computed)
        text = f"{done:,} of {total:,} requests, {saved:.1f} times fewer tokens than asked{left}"
        self.stream.write(f"\r{text:<79}")
        self.stream.flush()
        self.shown = True


def token_line(stream: TextIO) -> Callable[[str, int, int], None]:
    """A live line of tokens done, to be called with a name, those done and all; else silent."""

    def show(name: str, done: int, total: int) -> None:
        if stream.isatty():
            end = "\n" if done == total else ""
            stream.write(f"\r{f'{name}: {done:,} of {total:,} tokens':<79}{end}")
            stream.flush()

    return show
