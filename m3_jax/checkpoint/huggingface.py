"""A checkpoint in the released layout, read as the model's weights."""

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from m3_jax.checkpoint.dtypes import BFLOAT16, WEIGHT_DTYPES, cast
from m3_jax.checkpoint.errors import CheckpointError, listing, one_line
from m3_jax.checkpoint.folder import CONFIG, read_json
from m3_jax.checkpoint.names import Part, Weight, is_mtp, parts
from m3_jax.checkpoint.quantised import (
    QUANTISED_DTYPE,
    SCALE_SUFFIX,
    check_scale,
    dequantise,
    scheme_of,
)
from m3_jax.checkpoint.safetensors_files import Tensor, read_folder, read_into
from m3_jax.config import M3Config

# A damaged config may ask for billions of tensors: so many missing ones are enough to say so.
MISSING_ENOUGH = 1000


def read_config(folder: Path, name: str = CONFIG) -> tuple[dict[str, Any], M3Config]:
    """config.json of a folder, as it is and as the model's config."""
    raw = read_json(folder, name)
    try:
        return raw, M3Config.from_hf(raw)
    except (ValueError, TypeError, OverflowError) as error:
        raise CheckpointError(f"{folder / name}: {one_line(error)}") from None


def check_vision_layers(config: M3Config, tensors: int, path: Path) -> None:
    """Refuses a config with more vision layers than there are tensors, before a table of them is made."""
    if config.vision is not None and config.vision.num_hidden_layers > tensors:
        layers = config.vision.num_hidden_layers
        raise CheckpointError(f"{path}: vision_config.num_hidden_layers={layers}, there are {tensors} tensors")


class HuggingFaceCheckpoint:
    """A folder in the released layout whose every tensor has its place and whose every weight is complete.

    Nothing but headers is read until `read`. Raises `CheckpointError` naming what is missing, unknown or wrong.

    Attributes:
      folder: absolute path.
      raw_config: config.json as it is.
      config: the model's config.
      parts: the weights, in parts.
      dtypes: the dtype of every weight by path; bfloat16 where the file is quantised.
      skipped: released tensors of multi-token prediction, which are left out.
      quantised: whether any tensor is.
    """

    layout = "Hugging Face"

    def __init__(self, folder: Path):
        self.folder = folder
        self.raw_config, self.config = read_config(folder)
        self._scheme = scheme_of(self.raw_config, folder / CONFIG)
        everything = read_folder(folder)
        self.skipped = sorted(filter(is_mtp, everything))
        self.tensors = {name: tensor for name, tensor in everything.items() if not is_mtp(name)}
        check_vision_layers(self.config, len(self.tensors), folder / CONFIG)
        self._check_names()
        self.parts: list[Part] = list(parts(self.config))
        self.dtypes = {w.path: self._dtype(w) for part in self.parts for w in part.weights}
        self.quantised = any(tensor.dtype == QUANTISED_DTYPE for tensor in self.tensors.values())

    def _check_names(self) -> None:
        names = (piece.name for part in parts(self.config) for w in part.weights for piece in w.slices())
        seen: set[str] = set()
        missing: list[str] = []
        for name in names:
            (seen.add if name in self.tensors else missing.append)(name)
            if len(missing) >= MISSING_ENOUGH:
                break
        scales = {
            name + SCALE_SUFFIX for name in seen if self.tensors[name].dtype == QUANTISED_DTYPE
        } & self.tensors.keys()
        problems = []
        if missing:
            problems.append(f"{len(missing)} tensors missing: {listing(missing)}")
        elif unknown := self.tensors.keys() - seen - scales:
            problems.append(f"{len(unknown)} tensors with no place in the model: {listing(unknown)}")
        if problems:
            raise CheckpointError(f"{self.folder}: {'; '.join(problems)}")

    def _dtype(self, weight: Weight) -> np.dtype:
        """Checks the tensors of a weight and gives their common dtype."""
        found: dict[np.dtype, str] = {}
        for piece in weight.slices():
            tensor = self.tensors[piece.name]
            if tensor.shape != piece.shape:
                raise CheckpointError(
                    f"{tensor.file}: tensor {piece.name!r} has shape {list(tensor.shape)}, "
                    f"{list(piece.shape)} expected from {CONFIG}"
                )
            if tensor.dtype == QUANTISED_DTYPE:
                check_scale(tensor, self.tensors.get(piece.name + SCALE_SUFFIX), self._scheme)
                found[BFLOAT16] = piece.name
            elif tensor.dtype in WEIGHT_DTYPES:
                found[WEIGHT_DTYPES[tensor.dtype]] = piece.name
            else:
                raise CheckpointError(
                    f"{tensor.file}: tensor {piece.name!r} has dtype {tensor.dtype}; "
                    f"supported: {', '.join([*WEIGHT_DTYPES, QUANTISED_DTYPE])}"
                )
        if len(found) > 1:
            kinds = ", ".join(f"{name!r} is {dtype.name}" for dtype, name in found.items())
            raise CheckpointError(f"{self.folder}: tensors of one weight must have one dtype: {kinds}")
        return next(iter(found))

    def fingerprint(self) -> str:
        """Changes when a file, a header or the config does; data is trusted to size and time, as by `make`."""
        digest = hashlib.sha256(json.dumps(self.raw_config, sort_keys=True).encode())
        for tensor in sorted(self.tensors.values()):
            digest.update(repr((*tensor[:3], tensor.file.name, *tensor[4:])).encode())
        for file in sorted({tensor.file for tensor in self.tensors.values()}):
            status = file.stat()
            digest.update(repr((file.name, status.st_size, status.st_mtime_ns)).encode())
        return digest.hexdigest()

    def read(self, weight: Weight, out: np.ndarray, start: int = 0) -> None:
        """Fills `out` with rows `start` onwards of a weight's first dimension, in out's dtype.

        `out` is contiguous and has the weight's shape but for that dimension.
        """
        for piece in weight.slices():
            if piece.index:
                if start <= piece.index[0] < start + len(out):
                    target = out[(piece.index[0] - start, *piece.index[1:])]
                    self._read_rows(self.tensors[piece.name], target.reshape(piece.shape), 0)
            else:
                # Rows of the weight are whole rows of the tensor, several where one dimension is split in two.
                ratio = piece.shape[0] // weight.shape[0]
                self._read_rows(
                    self.tensors[piece.name], out.reshape(len(out) * ratio, *piece.shape[1:]), start * ratio
                )

    def _read_rows(self, tensor: Tensor, out: np.ndarray, first_row: int) -> None:
        if tensor.dtype == QUANTISED_DTYPE:
            assert self._scheme is not None  # checked with the dtypes
            dequantise(tensor, self.tensors[tensor.name + SCALE_SUFFIX], self._scheme, out, first_row)
            return
        dtype = WEIGHT_DTYPES[tensor.dtype]
        byte_offset = first_row * math.prod(tensor.shape[1:]) * dtype.itemsize
        if dtype == out.dtype:
            read_into(tensor, out, byte_offset)
        else:
            values = np.empty(out.shape, dtype)
            read_into(tensor, values, byte_offset)
            cast(values, out)
