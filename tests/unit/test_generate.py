"""generate(): tokens, keys, stopping, streaming, compilation, and what it refuses."""

import re
from collections.abc import Sequence
from typing import Any

import jax
import models
import numpy as np
import pytest
from compilations import compilations

from m3_jax import Greedy, M3Config, M3ForCausalLM, Sampler, generate
from m3_jax.generation import _chunks, _length_bucket

# Two layers, for both kinds of attention and of MLP.
TINY = M3Config.tiny().with_layers([(False, False), (True, True)])
PROMPTS = [models.random_tokens(TINY, n, seed=n).tolist() for n in (83, 20, 1, 100)]
SAMPLER = Sampler(temperature=1.2, top_k=60, top_p=0.97, min_p=0.01)


@pytest.fixture(scope="module")
def tiny() -> M3ForCausalLM:
    return models.random_model(TINY)


def recomputed(model: M3ForCausalLM, prompt: Sequence[int], new: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Greedy choices and log-probabilities of `new` from one pass without a cache."""
    tokens = np.asarray([*prompt, *new])
    padded = np.zeros((1, 128), np.int32)
    padded[0, : len(tokens)] = tokens
    logits = np.asarray(model(padded))[0, len(prompt) - 1 : len(tokens) - 1]
    logprobs = np.asarray(jax.nn.log_softmax(logits, axis=-1))
    return logits.argmax(-1), logprobs[np.arange(len(new)), new]


@pytest.mark.parametrize("chunk", [16, 64, 2048])
def test_greedy_equals_the_full_pass(tiny: M3ForCausalLM, chunk: int) -> None:
    out = generate(tiny, PROMPTS, max_new_tokens=12, prefill_chunk=chunk)
    assert out.finish_reasons == ["length"] * 4
    for prompt, new, logprobs in zip(PROMPTS, out.tokens, out.logprobs, strict=True):
        assert len(new) == 12
        choices, expected = recomputed(tiny, prompt, new)
        assert choices.tolist() == new
        np.testing.assert_allclose(logprobs, expected, atol=1e-4)


def test_logprobs_are_the_models_own_whatever_the_sampler(tiny: M3ForCausalLM) -> None:
    out = generate(tiny, PROMPTS[:2], max_new_tokens=12, sampler=SAMPLER, seed=3)
    for prompt, new, logprobs in zip(PROMPTS, out.tokens, out.logprobs, strict=False):
        np.testing.assert_allclose(logprobs, recomputed(tiny, prompt, new)[1], atol=1e-4)


def test_a_prompt_with_a_seed_gives_the_same_tokens_anywhere(tiny: M3ForCausalLM) -> None:
    seeds = [11, 12, 13, 11]
    batch = generate(tiny, PROMPTS, max_new_tokens=16, sampler=SAMPLER, seed=seeds).tokens
    backwards = generate(tiny, PROMPTS[::-1], max_new_tokens=16, sampler=SAMPLER, seed=seeds[::-1]).tokens
    assert backwards == batch[::-1]
    for i in (1, 3):
        alone = generate(tiny, [PROMPTS[i]], max_new_tokens=16, sampler=SAMPLER, seed=seeds[i]).tokens
        assert alone == [batch[i]]
    other = generate(tiny, PROMPTS, max_new_tokens=16, sampler=SAMPLER, seed=14).tokens
    assert all(a != b for a, b in zip(other, batch, strict=True))


def test_copies_of_a_prompt_differ_by_seed_alone(tiny: M3ForCausalLM) -> None:
    out = generate(tiny, [PROMPTS[1]] * 3, max_new_tokens=16, sampler=SAMPLER, seed=[1, 2, 1]).tokens
    assert out[0] == out[2] != out[1]


@pytest.mark.parametrize("sampler", [Greedy(), SAMPLER], ids=["greedy", "sampled"])
def test_streaming_gives_the_same(tiny: M3ForCausalLM, sampler: Greedy | Sampler) -> None:
    whole = generate(tiny, PROMPTS, max_new_tokens=9, sampler=sampler, stop_token_ids=range(0, 320, 9))
    events: list[tuple[int, int, float]] = []
    streamed = generate(
        tiny,
        PROMPTS,
        max_new_tokens=9,
        sampler=sampler,
        stop_token_ids=range(0, 320, 9),
        stream=lambda *event: events.append(event),
    )
    assert (streamed.tokens, streamed.finish_reasons) == (whole.tokens, whole.finish_reasons)
    for index, tokens in enumerate(whole.tokens):
        assert [token for i, token, _ in events if i == index] == tokens
        np.testing.assert_allclose([p for i, _, p in events if i == index], whole.logprobs[index], atol=1e-5)


def test_stop_tokens_end_a_sequence_and_are_kept(tiny: M3ForCausalLM) -> None:
    free = generate(tiny, PROMPTS, max_new_tokens=12).tokens
    stops = [free[0][4], free[3][0]]
    out = generate(tiny, PROMPTS, max_new_tokens=12, stop_token_ids=stops)
    for tokens, reason, unstopped in zip(out.tokens, out.finish_reasons, free, strict=True):
        first = next((i for i, token in enumerate(unstopped) if token in stops), None)
        assert tokens == unstopped[: None if first is None else first + 1]
        assert reason == ("length" if first is None else "stop")
    assert {"stop"} <= set(out.finish_reasons)
    assert out.tokens[3] == free[3][:1]


def test_one_new_token_and_no_prompts(tiny: M3ForCausalLM) -> None:
    assert generate(tiny, PROMPTS, max_new_tokens=1).tokens == [
        t[:1] for t in generate(tiny, PROMPTS, max_new_tokens=3).tokens
    ]
    assert generate(tiny, [], max_new_tokens=3).tokens == []


def test_other_lengths_in_the_same_buckets_compile_nothing(tiny: M3ForCausalLM) -> None:
    def run(lengths: list[int], new: int, temperature: float, stops: list[int]) -> None:
        prompts = [models.random_tokens(TINY, n, seed=n).tolist() for n in lengths]
        sampler = Sampler(temperature, top_k=int(10 * temperature) + 1)
        generate(tiny, prompts, max_new_tokens=new, sampler=sampler, stop_token_ids=stops, prefill_chunk=32)

    run([70, 40, 33], 13, 0.5, [1, 2])
    with compilations() as compiled:
        run([66, 70, 1, 9], 15, 0.9, [5, 9])
        run([69, 2, 40], 16, 1.9, [3, 4])
    assert compiled == []
    # The listener works: a bucket that is new does compile.
    with compilations() as compiled:
        run([300], 13, 0.5, [1, 2])
    assert compiled


def test_bfloat16(tiny: M3ForCausalLM) -> None:
    model = models.random_model(TINY, dtype="bfloat16")
    out = generate(model, PROMPTS[:2], max_new_tokens=5)
    assert [len(tokens) for tokens in out.tokens] == [5, 5]
    assert np.isfinite(out.logprobs).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompts": [[1, 2], []]}, "prompts[1] is empty"),
        ({"prompts": [[1, 320]]}, "prompts[0] holds token id 320: ids go from 0 to 319"),
        ({"prompts": [[1, -1]]}, "prompts[0] holds token id -1"),
        ({"prompts": [[0.5]]}, "prompts[0] is not a list of token ids"),
        ({"prompts": ["text"]}, "prompts[0] is not a list of token ids"),
        ({"prompts": [[1] * 65_530], "max_new_tokens": 7}, "max_position_embeddings=65536"),
        ({"max_new_tokens": 0}, "max_new_tokens=0: must be at least 1"),
        ({"seed": [1, 2]}, "seed has 2 entries"),
        ({"seed": []}, "seed has 0 entries"),
        ({"seed": -1}, "seed=-1: must be between 0"),
        ({"stop_token_ids": [400]}, "stop_token_ids holds 400"),
        ({"prefill_chunk": 48}, "prefill_chunk=48: must be a power of two"),
    ],
)
def test_arguments_are_checked_before_anything_runs(
    tiny: M3ForCausalLM, arguments: dict[str, Any], message: str
) -> None:
    defaults: dict[str, Any] = {"prompts": [[1, 2, 3]], "max_new_tokens": 4}
    with compilations() as compiled, pytest.raises(ValueError, match=re.escape(message)):
        generate(tiny, **{**defaults, **arguments})
    assert compiled == []


def test_buckets() -> None:
    assert [_length_bucket(n) for n in (1, 3, 8, 9, 17, 33, 100, 129, 8191)] == [1, 3, 8, 10, 20, 40, 112, 160, 8192]
    for n in range(1, 5000):
        assert n <= _length_bucket(n) <= max(n + 1, 1.25 * n)
    for length in range(1, 200):
        chunks = _chunks(length, 64)
        assert [start for start, _ in chunks] == list(range(0, length, 64))
        assert sum(size for _, size in chunks) >= length
        assert {size for _, size in chunks} <= {16, 32, 64}
