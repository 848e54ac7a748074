"""Quantised releases against a dequantisation written from the formats' definitions, number by number."""

import dataclasses
import json
import math
import re
from pathlib import Path

import ml_dtypes
import models
import numpy as np
import pytest
from releases import as_release, converted, m3_convert, random_tensors, read_release, refused, write_release

from m3_jax import M3Config, load

MXFP8 = {"quant_method": "mxfp8", "weight_block_size": [1, 32]}
BLOCK_FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
QUANTISED = re.compile(r"(\.[qkvo]_proj|gate_proj|up_proj|down_proj|\.w[123])\.weight$")
# Rows and columns in several blocks of 128, the last ones not full; columns in blocks of 32.
CONFIG = dataclasses.replace(
    M3Config.tiny(),
    hidden_size=160,
    dense_intermediate_size=288,
    moe_intermediate_size=64,
    shared_intermediate_size=96,
    num_experts=4,
    num_attention_heads=10,
)


def float8(code: int) -> float:
    """E4M3 by its definition (OCP 8-bit floating point, 1.0): no infinities, 0x7f is NaN."""
    sign, exponent, mantissa = -1.0 if code & 0x80 else 1.0, (code >> 3) & 15, code & 7
    if code & 0x7F == 0x7F:
        return math.nan
    if exponent == 0:
        return sign * mantissa / 8 * 2.0**-6
    return sign * (1 + mantissa / 8) * 2.0 ** (exponent - 7)


FLOAT8 = np.array([float8(code) for code in range(256)])


def quantised_release(scheme: dict, seed: int = 0) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """A quantised release, and the float64 values of its quantised matrices."""
    rng = np.random.default_rng(seed)
    tensors, values = {}, {}
    for name, a in random_tensors(CONFIG).items():
        if not QUANTISED.search(name) or "vision" in name:
            tensors[name] = a
            continue
        rows, columns = a.shape
        codes = rng.choice(np.delete(np.arange(256), [0x7F, 0xFF]), a.shape).astype(np.uint8)
        tensors[name] = codes.view(ml_dtypes.float8_e4m3fn)
        if scheme is MXFP8:
            scale = rng.integers(110, 140, (rows, columns // 32)).astype(np.uint8)
            scale.flat[0] = 0  # 2^-127, below every normal float32
            expanded = np.repeat(2.0 ** (scale.astype(np.float64) - 127), 32, axis=1)
        else:
            scale = rng.uniform(1e-3, 3, (-(-rows // 128), -(-columns // 128))).astype(np.float32)
            expanded = scale.astype(np.float64)[np.ix_(np.arange(rows) // 128, np.arange(columns) // 128)]
        tensors[f"{name}_scale_inv"] = scale
        values[name] = FLOAT8[codes] * expanded
    return tensors, values


@pytest.mark.parametrize("target", ["keep", "float32"])
@pytest.mark.parametrize("scheme", [MXFP8, BLOCK_FP8], ids=["mxfp8", "fp8"])
def test_values(tmp_path: Path, scheme: dict, target: str) -> None:
    tensors, values = quantised_release(scheme)
    src = write_release(tmp_path / "src", CONFIG, tensors, shards=2, quantization=scheme)
    dst = converted(src, tmp_path / "dst", "--dtype", target)
    assert m3_convert("verify", src, dst).exit_code == 0
    assert m3_convert("export", dst, tmp_path / "out").exit_code == 0
    dtype = np.float32 if target == "float32" else ml_dtypes.bfloat16
    plain = {name: a for name, a in tensors.items() if name not in values and not name.endswith("_scale_inv")}
    if target == "float32":
        plain = {name: a.astype(np.float32) for name, a in plain.items()}
    # The product of a float8 and a float32 has 28 bits: float32 rounds it once, as the formats say, then bfloat16.
    expected = {name: value.astype(np.float32).astype(dtype) for name, value in values.items()}
    assert read_release(tmp_path / "out") == as_release(plain | expected)
    assert "quantization_config" not in json.loads((dst / "config.json").read_text())
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())


def test_a_quantised_folder_loads_directly(tmp_path: Path) -> None:
    tensors, values = quantised_release(MXFP8)
    model = load(write_release(tmp_path / "src", CONFIG, tensors, quantization=MXFP8))
    name = "language_model.model.layers.3.block_sparse_moe.experts.2.w3.weight"
    weight = models.weights_by_path(model)["layers.3.mlp.experts.gate_up_proj.weight"][2, 1]
    np.testing.assert_array_equal(weight, values[name].astype(np.float32).astype(ml_dtypes.bfloat16))


NAME = "language_model.model.layers.2.self_attn.q_proj.weight"
SCALE = NAME + "_scale_inv"


@pytest.mark.parametrize(
    ("scheme", "change", "message"),
    [
        (MXFP8, {SCALE: None}, f"tensor '{NAME}' has no '{SCALE}'"),
        (MXFP8, {NAME: None}, f"1 tensors missing: {NAME}"),
        (MXFP8, {NAME: np.zeros((160, 160), np.float32)}, f"no place in the model: {SCALE}"),
        (MXFP8, {SCALE: np.zeros((160, 4), np.uint8)}, f"tensor '{SCALE}' is U8.160, 4., U8.160, 5. expected"),
        (MXFP8, {SCALE: np.zeros((160, 5), np.float32)}, f"tensor '{SCALE}' is F32.160, 5., U8.160, 5. expected"),
        (BLOCK_FP8, {SCALE: np.zeros((2, 3), np.float32)}, f"tensor '{SCALE}' is F32.2, 3., F32.2, 2. expected"),
        (MXFP8, {SCALE: np.full((160, 5), 255, np.uint8)}, f"tensor '{SCALE}' holds exponent 255, which is NaN"),
        (None, {}, "is F8_E4M3, but config.json has no quantization_config"),
        ({"quant_method": "mxfp8", "weight_block_size": [1, 16]}, {}, "weight_block_size=.1, 16.; supported: 'mxfp8'"),
        ({"quant_method": "awq"}, {}, "quant_method='awq'"),
        (["mxfp8"], {}, "quantization_config=.* must be an object"),
    ],
)
def test_refusals(tmp_path: Path, scheme: dict, change: dict, message: str) -> None:
    tensors, _ = quantised_release(BLOCK_FP8 if scheme is BLOCK_FP8 else MXFP8)
    # The tensor is made to have 160 rows, as many as columns, so that one shape serves all cases.
    assert tensors[NAME].shape == (160, 160)
    tensors |= change
    tensors = {name: a for name, a in tensors.items() if a is not None}
    src = write_release(tmp_path / "src", CONFIG, tensors, quantization=scheme)
    assert re.search(message, refused(m3_convert("convert", src, tmp_path / "dst")))
    assert not (tmp_path / "dst").exists()
