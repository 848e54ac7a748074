"""The checkpoint that comes with the repository: converted by our command line, it says what transformers says."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import parity_reference
import pytest
import safetensors.numpy
from flax import nnx

from m3_jax import M3Config, generate, load

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "examples" / "tiny-m3"
SCRIPT = ROOT / "scripts" / "make_tiny_checkpoint.py"
GOLDEN = json.loads((parity_reference.HERE / "goldens" / "tiny_m3.json").read_text())


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny") / "converted"
    command = [str(Path(sys.executable).with_name("m3-convert")), "convert", str(TINY), str(folder)]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    return folder


@pytest.fixture(scope="module")
def model(converted: Path) -> Any:
    return load(converted, dtype=jnp.float32)


def _contents(file: Path) -> Any:
    """What a file says, whatever the order and the blanks that one release or another of a library gives it."""
    if file.suffix == ".safetensors":
        tensors = safetensors.numpy.load_file(file)
        return {name: (str(value.dtype), value.shape, value.tobytes()) for name, value in tensors.items()}
    return json.loads(file.read_bytes()) if file.suffix == ".json" else file.read_bytes()


def _same_tokens(model: Any, golden: dict[str, Any]) -> None:
    entries = golden["continuations"]
    output = generate(model, [entry["prompt"] for entry in entries], max_new_tokens=golden["new_tokens"])
    assert output.tokens == [entry["tokens"] for entry in entries]


def test_convert_load_generate_gives_the_tokens_of_transformers(model: Any) -> None:
    _same_tokens(model, GOLDEN)


def test_the_same_with_transformers_here_and_now(model: Any, tmp_path: Path) -> None:
    """Makes the checkpoint again: the same contents, and tokens from transformers as it is installed."""
    python = parity_reference.interpreter()
    if python is None:
        pytest.skip(f"{parity_reference.INTERPRETER} is not set")
    parity_reference.run_script(python, SCRIPT, str(tmp_path / "tiny"), str(tmp_path / "golden.json"))
    assert {file.name for file in (tmp_path / "tiny").iterdir()} == {file.name for file in TINY.iterdir()}
    for file in TINY.iterdir():
        assert _contents(tmp_path / "tiny" / file.name) == _contents(file), file.name
    _same_tokens(model, json.loads((tmp_path / "golden.json").read_text()))


def test_the_golden_prompts_exercise_selection() -> None:
    config = M3Config.from_hf(json.loads((TINY / "config.json").read_text()))
    sparse = config.sparse_attention
    lengths = [len(entry["prompt"]) for entry in GOLDEN["continuations"]]
    assert min(lengths) < sparse.topk_blocks * sparse.block_size
    assert max(lengths) > 3 * sparse.topk_blocks * sparse.block_size
    assert min(entry["least_margin"] for entry in GOLDEN["continuations"]) >= 0.05
    assert sum(config.sparse_attention_layers) >= 2
    assert config.sparse_attention_layers != config.moe_layers


def test_the_indexer_chooses(model: Any) -> None:
    long = max(GOLDEN["continuations"], key=lambda entry: len(entry["prompt"]))
    chosen = model.chosen_blocks(np.array([long["prompt"]], np.int32))
    sparse = model.config.sparse_attention
    assert sorted(chosen) == [n for n, is_sparse in enumerate(model.config.sparse_attention_layers) if is_sparse]
    for layer, ids in chosen.items():
        tail = np.asarray(ids)[0, -64:]
        assert tail.shape == (64, model.config.num_key_value_heads, sparse.topk_blocks)
        assert (tail >= 0).all()
        # Neither the newest blocks alone nor the same ones for all heads.
        assert len({tuple(sorted(row)) for row in tail.reshape(-1, sparse.topk_blocks).tolist()}) > 8, layer


def test_without_selection_the_long_prompt_goes_on_otherwise(model: Any) -> None:
    """So that the comparison with transformers would notice a model that attends to everything."""
    long = max(GOLDEN["continuations"], key=lambda entry: len(entry["prompt"]))
    dense = nnx.clone(model)
    for layer in dense.layers:
        if layer.self_attn.indexer is not None:
            layer.self_attn.indexer.topk_blocks = 32
    output = generate(dense, [long["prompt"]], max_new_tokens=GOLDEN["new_tokens"])
    assert output.tokens[0] != long["tokens"]


def test_sizes_that_coincide_in_m3_differ_here() -> None:
    config = M3Config.from_hf(json.loads((TINY / "config.json").read_text()))
    sparse, vision = config.sparse_attention, config.vision
    assert vision is not None
    for group in (
        (config.head_dim, sparse.index_dim, sparse.block_size, config.num_experts),
        (config.num_key_value_heads, config.num_experts_per_tok, sparse.topk_blocks),
        (config.moe_intermediate_size, config.shared_intermediate_size, config.dense_intermediate_size),
        (config.hidden_size, vision.projector_hidden_size, vision.hidden_size),
        (config.rotary_dim, config.head_dim // 2),
    ):
        assert len(set(group)) == len(group), group


def test_it_is_small_and_complete() -> None:
    files = {file.name: file.stat().st_size for file in TINY.iterdir()}
    assert sum(files.values()) < 2_000_000
    assert files.keys() == {
        "config.json",
        "model.safetensors",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    }
