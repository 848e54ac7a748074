"""How far it is: called with bytes as they are done."""

import contextlib
import sys
from collections.abc import Callable, Iterator

Advance = Callable[[int], None]


def silent(nbytes: int) -> None:
    """Says nothing."""


@contextlib.contextmanager
def progress_bar(title: str, total: int, done: int = 0) -> Iterator[Advance]:
    """A bar with bytes and rate on stderr; nothing where stderr is not a terminal."""
    if not sys.stderr.isatty():
        yield silent
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (TextColumn(title), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(title, total=total, completed=done)
        yield lambda nbytes: bar.advance(task, nbytes)
