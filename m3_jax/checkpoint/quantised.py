"""Quantised matrices of a release, given back as numbers: MXFP8 and block-FP8.

A quantised tensor X.weight is F8_E4M3 with X.weight_scale_inv beside it:

- MXFP8 (OCP Microscaling, 1 x 32 blocks): scales U8 [out, in/32], E8M0 exponents; value = w * 2^(s - 127);
- block-FP8 (128 x 128 blocks): scales F32 [ceil(out/128), ceil(in/128)]; value = w * s.

The exponent 255 is E8M0's NaN. It would turn 32 weights into NaN, which no release means, so it is an error.
"""

import functools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from m3_jax.checkpoint.dtypes import FLOAT32, cast
from m3_jax.checkpoint.errors import CheckpointError
from m3_jax.checkpoint.safetensors_files import Tensor, read_into

QUANTISED_DTYPE = "F8_E4M3"
SCALE_SUFFIX = "_scale_inv"
NAN_EXPONENT = 255
EXPONENT_BIAS = 127
# Every float8 value by its byte.
E4M3 = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
# Elements that are worked on at a time: the float32 values stay in the cache.
TILE = 1 << 18


class Scheme(NamedTuple):
    """How scales lie over a matrix: blocks of `block` = (rows, columns), scales of safetensors type `scale_dtype`."""

    method: str
    block: tuple[int, int]
    scale_dtype: str


SCHEMES = (Scheme("mxfp8", (1, 32), "U8"), Scheme("fp8", (128, 128), "F32"))


def scheme_of(config: Mapping[str, Any], path: Path) -> Scheme | None:
    """The scheme that a config.json announces in quantization_config, None where it announces none."""
    quantisation = config.get("quantization_config")
    if quantisation is None:
        return None
    if not isinstance(quantisation, dict):
        raise CheckpointError(f"{path}: quantization_config={quantisation!r} must be an object")
    method, block = quantisation.get("quant_method"), quantisation.get("weight_block_size")
    for scheme in SCHEMES:
        if method == scheme.method and block == list(scheme.block):
            return scheme
    supported = " and ".join(f"{s.method!r} with {list(s.block)}" for s in SCHEMES)
    raise CheckpointError(
        f"{path}: quantization_config quant_method={method!r} with weight_block_size={block!r}; supported: {supported}"
    )


def check_scale(weight: Tensor, scale: Tensor | None, scheme: Scheme | None) -> None:
    """Refuses a quantised tensor whose scales are missing, or not what the scheme says."""
    if scheme is None:
        raise CheckpointError(
            f"{weight.file}: tensor {weight.name!r} is {QUANTISED_DTYPE}, but config.json has no quantization_config"
        )
    if scale is None:
        raise CheckpointError(f"{weight.file}: tensor {weight.name!r} has no {weight.name + SCALE_SUFFIX!r}")
    if len(weight.shape) != 2:
        raise CheckpointError(f"{weight.file}: tensor {weight.name!r} is {QUANTISED_DTYPE}, but not a matrix")
    (rows, columns), (out, width) = scheme.block, weight.shape
    expected = (math.ceil(out / rows), math.ceil(width / columns))
    if scheme.method == "mxfp8" and width % columns:
        raise CheckpointError(f"{weight.file}: tensor {weight.name!r}: {width} columns are not blocks of {columns}")
    if scale.dtype != scheme.scale_dtype or scale.shape != expected:
        raise CheckpointError(
            f"{scale.file}: tensor {scale.name!r} is {scale.dtype}{list(scale.shape)}, "
            f"{scheme.scale_dtype}{list(expected)} expected"
        )


def _read_scales(scale: Tensor) -> np.ndarray:
    raw = np.empty(scale.shape, np.uint8 if scale.dtype == "U8" else FLOAT32)
    read_into(scale, raw)
    if scale.dtype == "U8" and (raw == NAN_EXPONENT).any():
        raise CheckpointError(f"{scale.file}: tensor {scale.name!r} holds exponent {NAN_EXPONENT}, which is NaN")
    return raw


@functools.cache
def _products(dtype: np.dtype) -> np.ndarray:
    """Every float8 value times every power of two, by exponent byte * 256 + value byte, rounded to `dtype`."""
    exponents = np.arange(256, dtype=np.int32) - EXPONENT_BIAS
    table = np.empty((256, 256), dtype)
    with np.errstate(over="ignore"):
        cast(np.ldexp(E4M3[None, :], exponents[:, None]), table)
    return table.reshape(-1)


def _multiply_exponents(codes: np.ndarray, scales: np.ndarray, columns: int, out: np.ndarray) -> None:
    index = codes.reshape(len(codes), -1, columns) | (scales.astype(np.intp) << 8)[:, :, None]
    # The index is a byte pair: nothing wraps, but "wrap" is the mode without a check and without a buffer.
    np.take(_products(out.dtype), index.reshape(codes.shape), out=out, mode="wrap")


def _multiply_floats(codes: np.ndarray, scales: np.ndarray, columns: int, out: np.ndarray) -> None:
    values = np.take(E4M3, codes.astype(np.intp), mode="wrap")
    with np.errstate(over="ignore", invalid="ignore"):
        values *= np.repeat(scales, columns, axis=1)[:, : codes.shape[1]]
    cast(values, out)


def dequantise(weight: Tensor, scale: Tensor, scheme: Scheme, out: np.ndarray, first_row: int = 0) -> None:
    """Fills `out` [rows, in] with rows `first_row` onwards of a quantised matrix, rounded to out's dtype."""
    rows, columns = scheme.block
    count, width = out.shape
    scales = _read_scales(scale)
    multiply = _multiply_exponents if scales.dtype == np.uint8 else _multiply_floats
    step = max(1, TILE // width)
    codes = np.empty((step, width), np.uint8)
    for start in range(0, count, step):
        stop = min(start + step, count)
        tile = codes[: stop - start]
        read_into(weight, tile, (first_row + start) * width)
        multiply(tile, scales[(first_row + np.arange(start, stop)) // rows], columns, out[start:stop])
