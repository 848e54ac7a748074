"""This project's layout: a manifest, config.json, the tokenizer's files, and one Orbax checkpoint for each part.

    DST/m3_checkpoint.json       format, version, and the shape and dtype of every weight, part by part
    DST/config.json              as released, without quantization_config
    DST/tokenizer.json, ...      as they came
    DST/parts/layers.00003/      {"layers": {"3": {...}}}, readable by plain Orbax

The manifest is written last: a folder without it is not a checkpoint.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from m3_jax.checkpoint.dtypes import SAFETENSORS_NAMES, WEIGHT_DTYPES
from m3_jax.checkpoint.errors import CheckpointError, listing
from m3_jax.checkpoint.folder import MAX_JSON_BYTES, read_json
from m3_jax.checkpoint.huggingface import check_vision_layers, read_config
from m3_jax.checkpoint.names import Part, Weight, parts

MANIFEST = "m3_checkpoint.json"
PARTS = "parts"
# Written next to the parts while a conversion goes on; see m3_jax.checkpoint.partial.
STATE = "m3_partial.json"
FORMAT, VERSION = "m3-jax", 1


def manifest_of(checkpoint_parts: list[Part], dtypes: Mapping[str, np.dtype], origin: Mapping[str, str]) -> bytes:
    """The manifest of a checkpoint whose weights have these dtypes; `origin` tells what it was made from."""
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "origin": origin,
        "parts": {
            part.name: {
                weight.path: {"dtype": dtypes[weight.path].name, "shape": list(weight.shape)} for weight in part.weights
            }
            for part in checkpoint_parts
        },
    }
    data = json.dumps(manifest, indent=1).encode()
    assert len(data) <= MAX_JSON_BYTES
    return data


def weight_bytes(weight: Weight, dtype: np.dtype) -> int:
    """Bytes of a weight's values."""
    return math.prod(weight.shape) * dtype.itemsize


class OrbaxCheckpoint:
    """A folder of this project's layout whose manifest fits its config; see `HuggingFaceCheckpoint` for the attributes.

    `origin` is what `manifest_of` was given.

    Raises `CheckpointError` for an unfinished or foreign folder, and for weights that the config does not ask for.
    """

    layout = "m3-jax"

    def __init__(self, folder: Path):
        self.folder = folder
        manifest = self._read_manifest()
        self.origin = manifest.get("origin")
        listed = manifest["parts"]
        self.raw_config, self.config = read_config(folder)
        check_vision_layers(self.config, sum(map(len, listed.values())), folder / MANIFEST)
        if (count := self.config.num_hidden_layers) > len(listed):
            raise CheckpointError(
                f"{folder / MANIFEST}: {len(listed)} parts, but config.json has num_hidden_layers={count}"
            )
        self.parts: list[Part] = list(parts(self.config))
        self.dtypes: dict[str, np.dtype] = {}
        self._check(listed)
        for part in self.parts:
            self._check_part(part)

    def _read_manifest(self) -> dict[str, Any]:
        path = self.folder / MANIFEST
        if not path.exists() and (self.folder / STATE).exists():
            raise CheckpointError(
                f"{self.folder}: an incomplete conversion or save; run the same m3-convert command, or save, again"
            )
        manifest = read_json(self.folder, MANIFEST)
        if manifest.get("format") != FORMAT or manifest.get("version") != VERSION:
            raise CheckpointError(
                f"{path}: format {manifest.get('format')!r} version {manifest.get('version')!r}; "
                f"supported: {FORMAT!r} version {VERSION}"
            )
        listed = manifest.get("parts")
        if not isinstance(listed, dict) or not all(isinstance(weights, dict) for weights in listed.values()):
            raise CheckpointError(f"{path}: parts must map names to weights")
        return manifest

    def _check(self, listed: dict[str, dict[str, Any]]) -> None:
        path = self.folder / MANIFEST
        expected = {(part.name, weight.path): weight for part in self.parts for weight in part.weights}
        found = {(part, weight): entry for part, weights in listed.items() for weight, entry in weights.items()}
        if missing := expected.keys() - found.keys():
            raise CheckpointError(f"{path}: {len(missing)} weights missing: {listing(w for _, w in missing)}")
        if unknown := found.keys() - expected.keys():
            raise CheckpointError(
                f"{path}: {len(unknown)} weights with no place in the model: {listing(w for _, w in unknown)}"
            )
        names = {dtype.name: dtype for dtype in WEIGHT_DTYPES.values()}
        for key, weight in expected.items():
            entry = found[key]
            if not isinstance(entry, dict) or entry.get("shape") != list(weight.shape):
                raise CheckpointError(
                    f"{path}: {weight.path!r} is {entry!r}, shape {list(weight.shape)} expected from config.json"
                )
            if not isinstance(dtype := entry.get("dtype"), str) or dtype not in names:
                raise CheckpointError(
                    f"{path}: {weight.path!r} has dtype {dtype!r}; supported: {', '.join(SAFETENSORS_NAMES)}"
                )
            self.dtypes[weight.path] = names[dtype]

    def _check_part(self, part: Part) -> None:
        folder = self.part_folder(part)
        if not folder.is_dir():
            raise CheckpointError(f"{folder}: folder not found")
        if not folder.resolve().is_relative_to(self.folder.resolve()):
            raise CheckpointError(f"{folder}: links to {folder.resolve()}, outside the checkpoint")

    def part_folder(self, part: Part) -> Path:
        """The Orbax checkpoint of a part."""
        return self.folder / PARTS / part.name

    def read(self, weight: Weight, out: np.ndarray, start: int = 0) -> None:
        """Fills `out` with rows `start` onwards of a weight's first dimension, in out's dtype."""
        # tensorstore takes a third of a second to import, and a listing does not need it.
        from m3_jax.checkpoint.orbax_parts import read_rows

        part = next(part for part in self.parts if weight in part.weights)
        read_rows(self.part_folder(part), weight.path, out, start)
