"""Files of a folder that nobody vouches for: no links out of it, regular files alone, strict JSON of bounded size."""

import json
import os
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn

from m3_jax.checkpoint.errors import CheckpointError, one_line, unreadable

# The largest JSON file or header that is read; the index of the released model has 2.3 MB, a tokenizer about 20 MB.
MAX_JSON_BYTES = 100_000_000
CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
WEIGHTS = "model.safetensors"
# What travels with the weights from one layout to the other: data for tokenizers and processors, never code.
SIDE_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "processor_config.json",
)


def regular_file(folder: Path, name: str) -> Path:
    """The file `name` directly in `folder`, an absolute path without links.

    Links are followed as long as they stay in the folder. The layout of the Hugging Face cache, whose links lead to a
    folder of blobs beside the snapshot, is refused for that reason: `hf download --local-dir` makes plain files.
    """
    if Path(name).name != name or name in (".", "..") or "\\" in name or "\0" in name:
        raise CheckpointError(f"{folder}: file name {name!r} must be a plain name inside the folder")
    path = folder / name
    try:
        real, root = path.resolve(strict=True), folder.resolve(strict=True)
        if not real.is_relative_to(root):
            raise CheckpointError(f"{path}: links to {real}, outside the folder; use a folder of plain files")
        # Opening a pipe or a device could wait forever: look first.
        if not stat.S_ISREG(os.stat(real).st_mode):
            raise CheckpointError(f"{path}: must be a regular file")
    except FileNotFoundError:
        raise CheckpointError(f"{path}: file not found") from None
    except (OSError, RuntimeError) as error:  # a loop of links is a RuntimeError before Python 3.13
        raise CheckpointError(f"{path}: {one_line(error)}") from None
    return real


def existing_folder(path: Path) -> Path:
    """`path` as an absolute path, which must be a folder."""
    if not path.exists():
        raise CheckpointError(f"{path}: folder not found")
    if not path.is_dir():
        raise CheckpointError(f"{path}: must be a folder")
    return path.absolute()


def _unique(path: Path, pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise CheckpointError(f"{path}: key {key!r} is there twice")
        result[key] = value
    return result


def parse_json(path: Path, data: bytes) -> dict[str, Any]:
    """A JSON object, strictly: UTF-8, no key twice, no NaN. `path` is for the message alone."""

    def refuse(constant: str) -> NoReturn:
        raise CheckpointError(f"{path}: {constant} is not JSON")

    try:
        value = json.loads(
            data.decode("utf-8"), object_pairs_hook=lambda pairs: _unique(path, pairs), parse_constant=refuse
        )
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON: {one_line(error)}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: must hold a JSON object")
    return value


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """The JSON object in file `name` of `folder`."""
    path = regular_file(folder, name)
    try:
        if (size := path.stat().st_size) > MAX_JSON_BYTES:
            raise CheckpointError(f"{path}: {size} bytes, at most {MAX_JSON_BYTES} are read")
        return parse_json(path, path.read_bytes())
    except OSError as error:
        raise unreadable(path, error) from None
