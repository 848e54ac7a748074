"""What is in a checkpoint, without reading a weight."""

import dataclasses
import itertools
import math
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from m3_jax.checkpoint.dtypes import ITEMSIZE, SAFETENSORS_NAMES
from m3_jax.checkpoint.errors import CheckpointError, one_line, printable
from m3_jax.checkpoint.folder import CONFIG, existing_folder
from m3_jax.checkpoint.huggingface import HuggingFaceCheckpoint, read_config
from m3_jax.checkpoint.open import is_orbax
from m3_jax.checkpoint.safetensors_files import read_folder
from m3_jax.checkpoint.store import OrbaxCheckpoint
from m3_jax.config import M3Config


class Row(NamedTuple):
    """A tensor, or `count` like ones of the experts of a layer."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    count: int
    nbytes: int


class Report(NamedTuple):
    """A folder's layout, config and tensors; `problem` says why it cannot be converted or loaded, where it cannot."""

    folder: Path
    layout: str
    config: M3Config
    rows: list[Row]
    problem: str | None


def inspect(path: Path) -> Report:
    """Reads config and headers of a folder of either layout.

    Damaged files are a `CheckpointError`; a folder that is well formed but lacks tensors is shown, with its problem.
    """
    folder = existing_folder(path)
    if is_orbax(folder):
        checkpoint = OrbaxCheckpoint(folder)
        listed = (
            (w.path, SAFETENSORS_NAMES[checkpoint.dtypes[w.path].name], w.shape)
            for part in checkpoint.parts
            for w in part.weights
        )
        return Report(folder, OrbaxCheckpoint.layout, checkpoint.config, list(_rows(listed)), None)
    _, config = read_config(folder)
    tensors = sorted(read_folder(folder).values(), key=lambda tensor: _natural_key(tensor.name))
    rows = list(_rows((tensor.name, tensor.dtype, tensor.shape) for tensor in tensors))
    try:
        HuggingFaceCheckpoint(folder)
    except CheckpointError as error:
        return Report(folder, HuggingFaceCheckpoint.layout, config, rows, one_line(error))
    return Report(folder, HuggingFaceCheckpoint.layout, config, rows, None)


def _natural_key(name: str) -> list[tuple[int, int, str]]:
    """Orders layer 10 behind layer 9, and the experts' number behind the rest, so that like ones are neighbours."""
    expert = re.search(r"\.experts\.(\d+)\.", name)
    words = name.replace(expert.group(), ".experts.") if expert else name
    key = [(0, int(word), "") if word.isdigit() else (1, 0, word) for word in words.split(".")]
    return [*key, (0, int(expert.group(1)), "")] if expert else key


def _rows(tensors: Iterable[tuple[str, str, tuple[int, ...]]]) -> Iterator[Row]:
    def alike(tensor: tuple[str, str, tuple[int, ...]]) -> tuple[str, str, tuple[int, ...]]:
        return re.sub(r"\.experts\.\d+\.", ".experts.*.", tensor[0]), tensor[1], tensor[2]

    for (name, dtype, shape), group in itertools.groupby(tensors, alike):
        count = sum(1 for _ in group)
        yield Row(printable(name), dtype, shape, count, count * math.prod(shape) * ITEMSIZE[dtype])


def config_rows(config: M3Config) -> Iterator[tuple[str, str]]:
    """Every key of a config and its value; lists over layers as the runs that they are."""
    for key, value in dataclasses.asdict(config).items():
        if isinstance(value, dict):
            yield from ((f"{key}.{name}", str(item)) for name, item in value.items())
        elif key in ("sparse_attention_layers", "moe_layers"):
            runs = ((int(item), len(list(run))) for item, run in itertools.groupby(value))
            yield key, " + ".join(f"[{item}]*{length}" for item, length in runs)
        else:
            yield key, str(value)


def size_text(nbytes: int) -> str:
    """Bytes in decimal units, as disks and downloads have them."""
    for unit, scale in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if nbytes >= scale:
            return f"{nbytes / scale:.2f} {unit}"
    return f"{nbytes} B"


CONFIG_TITLE = f"{CONFIG}, as it is understood"
