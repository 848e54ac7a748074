"""Parity with transformers 5.23 on random configurations: logits, greedy continuations, config forms.

With M3_TRANSFORMERS_PYTHON naming an interpreter that has torch and transformers, transformers runs here and its
own files are loaded; without, the goldens beside this file and the same weights, drawn again, stand for it.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax.numpy as jnp
import numpy as np
import parity_cases
import parity_checkpoint
import parity_reference
import pytest
from parity_reference import Answer, Reference

from m3_jax import M3Config, generate, load

CASES = parity_cases.cases()
LOGITS_TOLERANCE = 1e-4  # of the largest logit of the prompt
MARGIN = 1e-3  # a greedy choice that is closer than this may fall either way in float32
each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])


@functools.lru_cache(maxsize=1)
def _load(folder: Any) -> Any:
    return load(folder, dtype=jnp.float32)


def _padded(prompts: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    tokens = np.zeros((len(prompts), lengths.max()), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    return tokens, lengths


# The two tests of a case stand beside each other, so that each checkpoint is loaded once.
@pytest.mark.parametrize("what", ["logits", "greedy"])
@each_case
def test_same_as_transformers(case: dict[str, Any], what: str, reference: Reference) -> None:
    model, answer = _load(reference.checkpoint(case)), reference.answers[case["name"]]
    if what == "logits":
        _check_logits(model, case, answer)
    else:
        _check_greedy(model, case, answer)


def _check_logits(model: Any, case: dict[str, Any], answer: Answer) -> None:
    """One batch, the shorter prompt padded on the right; every position where the reference is live."""
    numbers = case["logits_of"]
    tokens, lengths = _padded([case["prompts"][number] for number in numbers])
    got = np.asarray(model(tokens, lengths))
    assert got.dtype == np.float32
    assert got.shape == (*tokens.shape, case["text"]["vocab_size"])
    for row, number in enumerate(numbers):
        positions, wanted = answer.logits[number]
        error = np.abs(got[row, positions] - wanted).max() / np.abs(wanted).max()
        assert error <= LOGITS_TOLERANCE, f"prompt {number}: logits differ by {error:.2e} of the largest"


def _check_greedy(model: Any, case: dict[str, Any], answer: Answer) -> None:
    """All prompts in one batch; each continuation up to the first step that is too close to call."""
    output = generate(model, case["prompts"], max_new_tokens=case["new_tokens"])
    compared = 0
    for number, tokens in enumerate(output.tokens):
        close = np.flatnonzero(answer.margins[number] <= MARGIN)
        steps = int(close[0]) if close.size else case["new_tokens"]
        assert tokens[:steps] == answer.tokens[number, :steps].tolist(), f"prompt {number}"
        compared += steps
    assert output.finish_reasons == ["length"] * len(case["prompts"])
    assert compared >= 0.9 * answer.tokens.size, "the margins leave too little to compare"


@each_case
def test_both_config_forms_say_the_same(case: dict[str, Any]) -> None:
    flat = M3Config.from_hf(parity_checkpoint.flat_config(case))
    released = M3Config.from_hf(parity_checkpoint.released_config(case))
    # The released form keeps the special tokens in generation_config.json alone.
    assert dataclasses.replace(flat, bos_token_id=None, eos_token_ids=()) == released


@each_case
def test_every_part_of_the_model_shows_in_the_logits(case: dict[str, Any], reference: Reference) -> None:
    moved, text = reference.answers[case["name"]].ablations, case["text"]
    assert moved["dense"] > 0.1, "block selection"
    assert moved["no_bias"] > 0.05, "the router's correction bias"
    if text["index_local_blocks"]:
        assert moved["no_local"] > 0.05, "forced local blocks"
    if text["swiglu_limit"] < 2:
        assert moved["no_limit"] > 0.05, "the clamp of SwiGLU-OAI"


def test_the_cases_cover_what_is_promised() -> None:
    texts = [case["text"] for case in CASES]
    assert len(CASES) >= 12
    for key, least in {
        "num_attention_heads": 5,
        "num_key_value_heads": 4,
        "head_dim": 4,
        "rotary_dim": 4,
        "index_head_dim": 4,
        "index_block_size": 3,
        "index_topk_blocks": 4,
        "num_local_experts": 4,
        "num_experts_per_tok": 4,
        "rope_theta": 3,
        "rms_norm_eps": 2,
        "tie_word_embeddings": 2,
        "swiglu_alpha": 12,
        "swiglu_limit": 12,
        "routed_scaling_factor": 12,
    }.items():
        assert len({text[key] for text in texts}) >= least, key
    assert {text["index_local_blocks"] for text in texts} == {0, 1, 2}
    for key in ("dtype", "form", "float32_router", "sharded"):
        assert len({case[key] for case in CASES}) == 2, key
    pairs = {pair for text in texts for pair in zip(text["attention_layer_freq"], text["moe_layer_freq"], strict=True)}
    assert pairs == {(0, 0), (0, 1), (1, 0), (1, 1)}
    for case, text in zip(CASES, texts, strict=True):
        block, topk = text["index_block_size"], text["index_topk_blocks"]
        lengths = [len(prompt) for prompt in case["prompts"]]
        assert min(lengths) > 3 * topk * block
        assert {length % block for length in lengths} == set(range(block))
        groups = (
            ("head_dim", "index_head_dim", "index_block_size", "num_local_experts"),
            ("num_key_value_heads", "num_experts_per_tok", "index_topk_blocks"),
            ("intermediate_size", "shared_intermediate_size", "dense_intermediate_size"),
        )
        for group in groups:
            assert len({text[key] for key in group}) == len(group), (case["name"], group)


def test_the_goldens_say_what_transformers_says(reference: Reference) -> None:
    if not reference.live:
        pytest.skip(f"{parity_reference.INTERPRETER} is not set")
    stored = parity_reference.read_goldens(CASES)
    for case in CASES:
        golden, live = stored[case["name"]], reference.answers[case["name"]]
        for number, (positions, values) in golden.logits.items():
            whole = live.logits[number][1]
            error = np.abs(whole[positions] - values).max() / np.abs(whole).max()
            assert error <= LOGITS_TOLERANCE / 2, (case["name"], number)
        for number in range(len(case["prompts"])):
            close = np.flatnonzero(np.minimum(golden.margins[number], live.margins[number]) <= MARGIN)
            steps = int(close[0]) if close.size else case["new_tokens"]
            assert golden.tokens[number, :steps].tolist() == live.tokens[number, :steps].tolist()
        assert golden.ablations == pytest.approx(live.ablations, rel=1e-2)


def test_a_broken_interpreter_is_an_error(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    for python in ("/no/such/python", request.config.rootpath / "README.md"):
        monkeypatch.setenv(parity_reference.INTERPRETER, str(python))
        with pytest.raises(RuntimeError, match=parity_reference.INTERPRETER):
            parity_reference.run_reference(CASES[:1], tmp_path)
