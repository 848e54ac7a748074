"""One way in for both layouts."""

from pathlib import Path

from m3_jax.checkpoint.folder import existing_folder
from m3_jax.checkpoint.huggingface import HuggingFaceCheckpoint
from m3_jax.checkpoint.store import MANIFEST, PARTS, STATE, OrbaxCheckpoint

Checkpoint = HuggingFaceCheckpoint | OrbaxCheckpoint


def is_orbax(folder: Path) -> bool:
    """Whether a folder is, or was to become, of this project's layout."""
    return any((folder / name).exists() for name in (MANIFEST, STATE, PARTS))


def open_checkpoint(path: str | Path) -> Checkpoint:
    """The checkpoint in a folder of either layout, checked but not read. Raises `CheckpointError`."""
    folder = existing_folder(Path(path))
    return OrbaxCheckpoint(folder) if is_orbax(folder) else HuggingFaceCheckpoint(folder)
