"""A folder that comes into being whole: built as DST.partial beside DST, renamed at the very end.

Whoever dies on the way leaves DST.partial, which no loader takes for a checkpoint and which the same command, run
again, takes up or begins anew. A lock keeps two of them apart; it dies with its process.
"""

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from m3_jax.checkpoint.errors import CheckpointError, unreadable
from m3_jax.checkpoint.folder import read_json
from m3_jax.checkpoint.store import STATE

# What a death between the folder's making and its state can leave.
_STATE_DRAFT = STATE + ".tmp"


class Partial:
    """DST.partial while it is written to.

    Attributes:
      path: DST.partial.
      resumed: the state that an earlier run left, None where there was none.
    """

    def __init__(self, dst: Path, path: Path, resumed: dict[str, Any] | None):
        self.dst, self.path, self.resumed = dst, path, resumed

    def begin(self, state: dict[str, Any]) -> None:
        """Records what this folder is to become."""
        write_file(self.path / STATE, json.dumps(state, indent=1).encode())

    def restart(self) -> None:
        """Empties the folder of what an earlier run left."""
        for path in self.path.iterdir():
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        self.resumed = None

    def discard(self) -> None:
        """Removes the folder."""
        shutil.rmtree(self.path, ignore_errors=True)

    def commit(self) -> None:
        """Makes DST of it: the files first, the name last."""
        sync_tree(self.path)
        os.rename(self.path, self.dst)
        (self.dst / STATE).unlink()
        _sync(self.dst)
        _sync(self.dst.parent)


@contextlib.contextmanager
def partial_of(dst: Path) -> Iterator[Partial]:
    """DST.partial under a lock. Raises `CheckpointError` where DST exists or DST.partial is not ours to write to."""
    if dst.exists() or dst.is_symlink():
        raise CheckpointError(f"{dst}: already exists")
    if not dst.parent.is_dir():
        raise CheckpointError(f"{dst.parent}: folder not found")
    path = dst.with_name(dst.name + ".partial")
    try:
        path.mkdir(exist_ok=True)
        lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError as error:
        raise unreadable(path, error) from None
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CheckpointError(f"{path}: another process is writing to it") from None
        # The process that held the lock before may have renamed or removed what was opened here.
        if dst.exists() or not path.exists() or not os.path.samestat(os.stat(path), os.fstat(lock)):
            raise CheckpointError(f"{dst}: another process has just finished with it")
        state = None
        if (path / STATE).exists():
            state = read_json(path, STATE)
        elif set(os.listdir(path)) - {_STATE_DRAFT}:
            raise CheckpointError(f"{path}: exists and was not made by m3-convert or save; move it out of the way")
        yield Partial(dst, path, state)
    finally:
        os.close(lock)


def write_file(path: Path, data: bytes) -> None:
    """Writes a small file so that it is there whole or not at all."""
    draft = path.with_name(path.name + ".tmp")
    try:
        with open(draft, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    except OSError as error:
        draft.unlink(missing_ok=True)
        raise unreadable(path, error) from None


def copy_file(source: Path, target: Path) -> None:
    """Copies a file's data and sees that it lasts."""
    try:
        shutil.copyfile(source, target)
        _sync(target)
    except OSError as error:
        raise unreadable(Path(error.filename or target), error) from None


def check_space(folder: Path, nbytes: int) -> None:
    """Refuses to begin what cannot end: `nbytes` must be free where `folder` is."""
    free = shutil.disk_usage(folder).free
    if free < nbytes:
        raise CheckpointError(f"{folder}: {nbytes / 1e9:.1f} GB needed, {free / 1e9:.1f} GB free on its disk")


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def sync_tree(root: Path) -> None:
    """Makes the names below `root` last; whoever wrote the files has done so for their data."""
    for folder, _, _ in os.walk(root):
        _sync(Path(folder))
