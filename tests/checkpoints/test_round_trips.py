"""What is converted and exported again is what it was, byte for byte."""

import dataclasses
import json
import math
import os
import subprocess
from pathlib import Path

import ml_dtypes
import models
import numpy as np
import orbax.checkpoint as ocp
import pytest
from releases import (
    as_release,
    config_with_vision,
    converted,
    m3_convert,
    random_tensors,
    read_release,
    shapes,
    write_release,
)

from m3_jax import M3Config, load
from m3_jax.checkpoint.names import parts

TIED = dataclasses.replace(M3Config.tiny(), tie_word_embeddings=True)


def test_the_table_has_every_tensor_of_the_release() -> None:
    weights = [weight for part in parts(M3Config.m3()) for weight in part.weights]
    assert sum(math.prod(weight.shape) for weight in weights) == 427_040_140_160
    assert sum(1 for weight in weights for _ in weight.slices()) == 23_416


@pytest.mark.parametrize("config", [config_with_vision(), TIED], ids=["vision", "tied"])
def test_the_table_is_the_description(config: M3Config) -> None:
    pieces = [piece for part in parts(config) for weight in part.weights for piece in weight.slices()]
    assert {piece.name: piece.shape for piece in pieces} == shapes(config)
    assert len(pieces) == len(shapes(config))


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float32])
def test_keep_gives_every_tensor_back(tmp_path: Path, dtype: type, shards: int) -> None:
    config = config_with_vision()
    tensors = random_tensors(config, dtype)
    src = write_release(tmp_path / "src", config, tensors, shards=shards)
    dst = converted(src, tmp_path / "dst")
    assert m3_convert("verify", src, dst).exit_code == 0
    out = tmp_path / "out"
    # About 40 shards: experts of one weight fall in several.
    result = m3_convert("export", dst, out, "--max-shard-size", "20KB")
    assert result.exit_code == 0, result.output
    assert len(list(out.glob("*.safetensors"))) > 10
    assert read_release(out) == as_release(tensors)
    weight_map = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    assert weight_map.keys() == tensors.keys()
    assert json.loads((out / "config.json").read_text()) == json.loads((src / "config.json").read_text())
    assert (out / "tokenizer.json").read_text() == (src / "tokenizer.json").read_text()
    assert not (dst / "modeling_m3.py").exists()
    assert m3_convert("verify", dst, out).exit_code == 0
    assert m3_convert("verify", src, out).exit_code == 0


def test_tied_and_bfloat16_router(tmp_path: Path) -> None:
    """transformers writes a bfloat16 router where the model was bfloat16; its bytes come back too."""
    tensors = {name: a.astype(ml_dtypes.bfloat16) for name, a in random_tensors(TIED).items()}
    dst = converted(write_release(tmp_path / "src", TIED, tensors), tmp_path / "dst")
    assert m3_convert("export", dst, tmp_path / "out").exit_code == 0
    assert [path.name for path in (tmp_path / "out").glob("*.safetensors*")] == ["model.safetensors"]
    assert read_release(tmp_path / "out") == as_release(tensors)
    gate = models.weights_by_path(load(dst))["layers.2.mlp.gate.weight"]
    expected = tensors["language_model.model.layers.2.block_sparse_moe.gate.weight"].astype(np.float32)
    assert gate.dtype == np.float32
    np.testing.assert_array_equal(gate, expected)


@pytest.mark.parametrize("stored", [ml_dtypes.bfloat16, np.float32])
@pytest.mark.parametrize("target", ["bfloat16", "float32"])
def test_casts(tmp_path: Path, stored: type, target: str) -> None:
    config = config_with_vision()
    tensors = random_tensors(config, stored)
    src = write_release(tmp_path / "src", config, tensors)
    dst = converted(src, tmp_path / "dst", "--dtype", target)
    assert m3_convert("export", dst, tmp_path / "out").exit_code == 0
    kept = ("block_sparse_moe.gate.weight", "e_score_correction_bias", "patch_embedding.weight")
    expected = {name: a.astype(np.float32 if name.endswith(kept) else np.dtype(target)) for name, a in tensors.items()}
    assert read_release(tmp_path / "out") == as_release(expected)
    assert json.loads((dst / "config.json").read_text())["dtype"] == target
    result = m3_convert("verify", src, dst)
    assert result.exit_code == 0
    assert ("after a cast" in result.stdout) == (np.dtype(stored) != np.dtype(target))


def test_plain_orbax_reads_the_parts(tmp_path: Path) -> None:
    config = M3Config.tiny()
    tensors = random_tensors(config)
    dst = converted(write_release(tmp_path / "src", config, tensors), tmp_path / "dst")
    with ocp.StandardCheckpointer() as checkpointer:
        layer = checkpointer.restore(dst / "parts" / "layers.00003")["layers"]["3"]
    prefix = "language_model.model.layers.3."
    experts = layer["mlp"]["experts"]["gate_up_proj"]["weight"]
    assert experts.shape == (11, 2, 20, 48)
    assert experts.dtype == ml_dtypes.bfloat16
    for row, name in enumerate(("w1", "w3")):
        np.testing.assert_array_equal(experts[7, row], tensors[f"{prefix}block_sparse_moe.experts.7.{name}.weight"])
    q = tensors[f"{prefix}self_attn.q_proj.weight"].reshape(6, 16, 48)
    np.testing.assert_array_equal(layer["self_attn"]["q_proj"]["weight"], q)


def test_large_weights_are_cut_and_come_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of a few rows, and memory for two of them at once."""
    from m3_jax.checkpoint import orbax_parts

    monkeypatch.setattr(orbax_parts, "CHUNK_BYTES", 1024)
    monkeypatch.setattr(orbax_parts, "IN_FLIGHT_BYTES", 2048)
    config = config_with_vision()
    tensors = random_tensors(config)
    src = write_release(tmp_path / "src", config, tensors, shards=2)
    dst = converted(src, tmp_path / "dst")
    assert len(list((dst / "parts" / "embed" / "embed_tokens.weight").glob("c/*/*"))) == 32  # 320 rows of 96 bytes
    assert m3_convert("verify", src, dst).exit_code == 0
    assert m3_convert("export", dst, tmp_path / "out").exit_code == 0
    assert read_release(tmp_path / "out") == as_release(tensors)


def test_mtp_is_skipped_with_a_note(tmp_path: Path) -> None:
    config = M3Config.tiny()
    tensors = random_tensors(config)
    extra = {f"language_model.mtp.layers.{n}.norm.weight": np.zeros(48, np.float32) for n in range(3)}
    src = write_release(tmp_path / "src", config, tensors | extra)
    result = m3_convert("convert", src, tmp_path / "dst")
    assert result.exit_code == 0
    assert result.stderr == "note: 3 tensors of multi-token prediction (mtp.*) were left out\n"
    assert m3_convert("export", tmp_path / "dst", tmp_path / "out").exit_code == 0
    assert read_release(tmp_path / "out") == as_release(tensors)


def test_verify_names_what_differs(tmp_path: Path) -> None:
    config = M3Config.tiny()
    tensors = random_tensors(config)
    first = write_release(tmp_path / "first", config, tensors)
    name = "language_model.model.layers.2.block_sparse_moe.experts.4.w3.weight"
    changed = tensors[name].copy()
    changed.view(np.uint16)[-1, -1] ^= 1  # the last bit of the last number
    second = converted(write_release(tmp_path / "src", config, tensors | {name: changed}), tmp_path / "second")
    for pair in ((first, second), (second, first)):
        result = m3_convert("verify", *pair)
        assert result.exit_code == 1
        assert "1 of 63 weights differ: layers.2.mlp.experts.gate_up_proj.weight" in result.stderr
    other = write_release(tmp_path / "other", dataclasses.replace(config, swiglu_limit=6.0), tensors)
    result = m3_convert("verify", first, other)
    assert result.exit_code == 1
    assert "swiglu_limit (5.0, 6.0)" in result.stderr


TRANSFORMERS = """
import sys, torch
from transformers import MiniMaxM3VLConfig
from transformers.models.minimax_m3_vl.modeling_minimax_m3_vl import MiniMaxM3SparseForConditionalGeneration as Model
mode, folder, logits = sys.argv[1:]
if mode == "write":
    torch.manual_seed(0)
    model = Model(MiniMaxM3VLConfig(
        text_config=dict(
            vocab_size=97, hidden_size=40, intermediate_size=24, dense_intermediate_size=56,
            shared_intermediate_size=28,
            num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=2, head_dim=16, rotary_dim=8,
            rope_parameters=dict(rope_type="default", rope_theta=1e4, partial_rotary_factor=0.5),
            num_experts_per_tok=3, num_local_experts=5, index_n_heads=2, index_head_dim=20, index_block_size=8,
            index_topk_blocks=3, index_local_blocks=1, max_position_embeddings=512,
            mlp_layer_types=["dense", "sparse", "sparse"],
            layer_types=["full_attention", "minimax_m3_sparse", "minimax_m3_sparse"]),
        vision_config=dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1,
            num_attention_heads=2, image_size=28),
        projector_hidden_size=36, image_token_index=95, video_token_index=96)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
else:
    model, info = Model.from_pretrained(folder, output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    model.eval()
with torch.no_grad():
    torch.save(model(input_ids=torch.arange(64)[None] % 95).logits, logits)
if mode == "read":
    assert torch.equal(torch.load(logits), torch.load(logits + ".first")), "logits differ"
"""


def test_transformers_loads_the_export_with_equal_logits(tmp_path: Path) -> None:
    python = os.environ.get("M3_TRANSFORMERS_PYTHON")
    if not python:
        pytest.skip("M3_TRANSFORMERS_PYTHON does not name an interpreter with torch and transformers")

    def transformers(*arguments: object) -> None:
        subprocess.run([python, "-c", TRANSFORMERS, *map(str, arguments)], check=True)

    transformers("write", tmp_path / "src", tmp_path / "logits.first")
    dst = converted(tmp_path / "src", tmp_path / "dst")
    assert m3_convert("export", dst, tmp_path / "out", "--max-shard-size", "200KB").exit_code == 0
    assert read_release(tmp_path / "out") == read_release(tmp_path / "src")
    transformers("read", tmp_path / "out", tmp_path / "logits")
