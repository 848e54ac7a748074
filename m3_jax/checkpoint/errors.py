"""The one error of everything that reads or writes checkpoints."""

from collections.abc import Iterable
from pathlib import Path

LISTED = 8


class CheckpointError(ValueError):
    """A checkpoint, or the place for one, is not as it must be; the message names the file or tensor in one line."""


def listing(names: Iterable[str], limit: int = LISTED) -> str:
    """The first names in order and how many there are more, for a message."""
    ordered = sorted(names)
    more = f" and {len(ordered) - limit} more" if len(ordered) > limit else ""
    return ", ".join(ordered[:limit]) + more


def printable(text: str) -> str:
    """Text from a file without what a terminal would obey or an encoder refuse."""
    return "".join(char if char.isprintable() else f"\\x{ord(char):02x}" for char in text)


def one_line(error: BaseException, limit: int = 300) -> str:
    """An error as one printable line of bounded length."""
    text = printable(" ".join(str(error).split())) or type(error).__name__
    return text if len(text) <= limit else f"{text[:limit]}..."


def unreadable(path: Path, error: OSError) -> CheckpointError:
    """The error for a file that the operating system does not give."""
    return CheckpointError(f"{path}: {error.strerror or one_line(error)}")
