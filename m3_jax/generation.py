"""Generation: chunked prefill, then decode in one compiled loop, or step by step where tokens are streamed.

Every array shape comes from a bucket, so that calls with other lengths in the same buckets compile nothing.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from m3_jax.cache import Cache
from m3_jax.config import M3Config
from m3_jax.model import M3ForCausalLM, Structure, split
from m3_jax.sampling import Greedy, TokenSampler

PREFILL_CHUNK = 2048
MIN_CHUNK = 16

Stream = Callable[[int, int, float], None]


@dataclasses.dataclass(frozen=True)
class GenerateOutput:
    """What was generated, a list entry for each prompt.

    Attributes:
      tokens: the new token ids, a stop token included.
      logprobs: the natural logarithm of each new token's probability under the model itself: softmax of the logits
        before temperature and filters.
      finish_reasons: "stop" where a stop token ended the sequence, else "length".
    """

    tokens: list[list[int]]
    logprobs: list[list[float]]
    finish_reasons: list[str]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["cache", "token", "logprob", "num_new", "finished", "keys", "tokens", "logprobs"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """The loop's carry.

    Attributes:
      cache: holds all tokens but the newest.
      token, logprob: the newest of each sequence.
      num_new: tokens generated so far, `token` included.
      finished: a stop token came, or the row is no prompt.
      keys: one for each sequence; the n-th token is drawn with fold_in(key, n).
      tokens, logprobs: everything generated; what lies behind num_new means nothing.
    """

    cache: Cache
    token: Int[Array, " B"]
    logprob: Float[Array, " B"]
    num_new: Int[Array, " B"]
    finished: Bool[Array, " B"]
    keys: Key[Array, " B"]
    tokens: Int[Array, "B L"]
    logprobs: Float[Array, "B L"]


def generate(
    model: M3ForCausalLM,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampler: TokenSampler = Greedy(),  # noqa: B008
    seed: int | Sequence[int] = 0,
    stop_token_ids: Sequence[int] = (),
    prefill_chunk: int = PREFILL_CHUNK,
    stream: Stream | None = None,
) -> GenerateOutput:
    """Continues prompts of token ids.

    A prompt with a seed gives the same tokens alone, in any batch and at any place in it: a sequence's random numbers
    depend on its seed and on how many tokens it has generated, and on nothing else. Prompts that share a seed share
    those numbers, so to draw several continuations of one prompt, give each its own seed.

    Args:
      model: the model; its dtype is the cache's.
      prompts: token ids, a list for each prompt, of any lengths.
      max_new_tokens: tokens to generate for each prompt, at most.
      sampler: `Greedy()` or a `Sampler`.
      seed: one for all prompts or one for each.
      stop_token_ids: a sequence ends with the first of these that it generates. None are implied: pass
        `model.config.eos_token_ids` to stop where the model ends its turn.
      prefill_chunk: prompt tokens a pass takes of each sequence; bounds the memory of prefill. A power of two.
      stream: called as stream(prompt index, token id, logprob) for each new token as it comes. Generation then steps
        in Python, which gives the same tokens more slowly.

    Raises:
      ValueError: a prompt is empty, an id lies outside the vocabulary, prompt and new tokens exceed the model's
        positions, or an argument is out of its range. Raised before anything is computed.
    """
    config = model.config
    prompt_ids = _check(config, prompts, max_new_tokens, seed, stop_token_ids, prefill_chunk)
    if not prompt_ids:
        return GenerateOutput([], [], [])
    structure, weights = split(model)
    num_prompts = len(prompt_ids)
    batch = _power_of_two(num_prompts)
    seeds = np.zeros(batch, np.uint32)
    seeds[:num_prompts] = np.asarray(seed)
    keys = jax.vmap(jax.random.key)(seeds)

    lengths = np.zeros(batch, np.int32)
    lengths[:num_prompts] = [len(ids) for ids in prompt_ids]
    longest = int(lengths.max())
    pages = _length_bucket(-(-(longest + max_new_tokens) // config.sparse_attention.block_size))
    cache = _allocate(config, batch, pages * config.sparse_attention.block_size, model.dtype)

    hidden = jnp.zeros((batch, config.hidden_size), model.dtype)
    for start, size in _chunks(longest, prefill_chunk):
        tokens = np.zeros((batch, size), np.int32)
        for row, ids in enumerate(prompt_ids):
            part = ids[start : start + size]
            tokens[row, : len(part)] = part
        query_lens = np.clip(lengths - start, 0, size)
        cache, hidden = _prefill(structure, weights, cache, hidden, tokens, query_lens)

    # A stop id that no token has fills the bucket.
    stops = np.full(_power_of_two(max(1, len(stop_token_ids))), -1, np.int32)
    stops[: len(stop_token_ids)] = list(stop_token_ids)
    capacity = _power_of_two(max_new_tokens)
    state = _first_token(structure, weights, cache, hidden, keys, lengths > 0, sampler, stops, capacity)
    if stream is None:
        state = _decode_loop(structure, weights, state, sampler, stops, np.int32(max_new_tokens))
    else:
        _emit(stream, state, np.zeros(num_prompts, np.int32))
        for _ in range(max_new_tokens - 1):
            if bool(jnp.all(state.finished)):
                break
            before = np.asarray(state.num_new)[:num_prompts]
            state = _decode_step(structure, weights, state, sampler, stops)
            _emit(stream, state, before)
    return _output(state, num_prompts)


def _check(
    config: M3Config,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    seed: int | Sequence[int],
    stop_token_ids: Sequence[int],
    prefill_chunk: int,
) -> list[np.ndarray]:
    """The prompts as arrays, once everything about them is known to be legal."""
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens}: must be at least 1")
    if prefill_chunk < 1 or prefill_chunk & (prefill_chunk - 1):
        raise ValueError(f"prefill_chunk={prefill_chunk}: must be a power of two")
    seeds = [seed] if isinstance(seed, int | np.integer) else list(seed)
    if (len(seeds) != 1 and len(seeds) != len(prompts)) or (not isinstance(seed, int | np.integer) and not seeds):
        raise ValueError(
            f"seed has {len(seeds)} entries: must be one integer or one for each of {len(prompts)} prompts"
        )
    for value in seeds:
        if not 0 <= value < 2**32:
            raise ValueError(f"seed={value}: must be between 0 and 2**32 - 1")
    for token in stop_token_ids:
        if not 0 <= token < config.vocab_size:
            raise ValueError(f"stop_token_ids holds {token}: ids go from 0 to {config.vocab_size - 1}")
    arrays = []
    for index, prompt in enumerate(prompts):
        ids = np.asarray(prompt)
        if ids.ndim != 1 or (ids.size and not np.issubdtype(ids.dtype, np.integer)):
            raise ValueError(f"prompts[{index}] is not a list of token ids, which are integers")
        if not ids.size:
            raise ValueError(f"prompts[{index}] is empty: a prompt has at least one token")
        if ids.min() < 0 or ids.max() >= config.vocab_size:
            wrong = int(ids[(ids < 0) | (ids >= config.vocab_size)][0])
            raise ValueError(f"prompts[{index}] holds token id {wrong}: ids go from 0 to {config.vocab_size - 1}")
        if ids.size + max_new_tokens > config.max_position_embeddings:
            raise ValueError(
                f"prompts[{index}] has {ids.size} tokens, with max_new_tokens={max_new_tokens} that is more than the "
                f"model's max_position_embeddings={config.max_position_embeddings}"
            )
        arrays.append(ids.astype(np.int32))
    return arrays


def _power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length()


def _length_bucket(n: int) -> int:
    """n rounded up to one of four sizes an octave: memory for a long context grows by a quarter at most."""
    step = max(1, _power_of_two(n) // 8)
    return -(-n // step) * step


def _chunks(length: int, size: int) -> list[tuple[int, int]]:
    """(start, rows) of the passes over a prompt: full chunks, and the rest in the smallest power of two it fits."""
    full, rest = divmod(length, size)
    chunks = [(i * size, size) for i in range(full)]
    if rest:
        chunks.append((full * size, min(size, max(MIN_CHUNK, _power_of_two(rest)))))
    return chunks


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _allocate(config: M3Config, batch: int, max_length: int, dtype: jnp.dtype) -> Cache:
    # The bucket may reach past the last position; what was asked for does not.
    padded = dataclasses.replace(config, max_position_embeddings=max(max_length, config.max_position_embeddings))
    return Cache.allocate(padded, batch, max_length, dtype=dtype)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=(2, 3))
def _prefill(
    structure: Structure,
    weights: nnx.State,
    cache: Cache,
    hidden: Float[Array, "B D"],
    tokens: Int[Array, "B T"],
    query_lens: Int[Array, " B"],
) -> tuple[Cache, Float[Array, "B D"]]:
    """One chunk of every prompt; `hidden` keeps the last row of the sequences that this chunk does not reach."""
    output = structure.model(weights).forward(tokens, cache, query_lens)
    last = jnp.maximum(query_lens - 1, 0)[:, None, None]
    last_hidden = jnp.take_along_axis(output.last_hidden, last, axis=1)[:, 0]
    return output.cache, jnp.where(query_lens[:, None] > 0, last_hidden, hidden)


def _draw(
    model: M3ForCausalLM,
    hidden: Float[Array, "B D"],
    keys: Key[Array, " B"],
    num_new: Int[Array, " B"],
    sampler: TokenSampler,
) -> tuple[Int[Array, " B"], Float[Array, " B"]]:
    logits = model.logits(hidden)
    token = sampler(logits, jax.vmap(jax.random.fold_in)(keys, num_new))
    logprob = jnp.take_along_axis(jax.nn.log_softmax(logits, axis=-1), token[:, None], axis=-1)[:, 0]
    return token, logprob


@functools.partial(jax.jit, static_argnums=(0, 8), donate_argnums=2)
def _first_token(
    structure: Structure,
    weights: nnx.State,
    cache: Cache,
    hidden: Float[Array, "B D"],
    keys: Key[Array, " B"],
    is_prompt: Bool[Array, " B"],
    sampler: TokenSampler,
    stops: Int[Array, " E"],
    capacity: int,
) -> DecodeState:
    num_new = jnp.zeros(is_prompt.shape, jnp.int32)
    token, logprob = _draw(structure.model(weights), hidden, keys, num_new, sampler)
    state = DecodeState(
        cache=cache,
        token=token,
        logprob=logprob,
        num_new=num_new,
        finished=~is_prompt,
        keys=keys,
        tokens=jnp.zeros((*is_prompt.shape, capacity), jnp.int32),
        logprobs=jnp.zeros((*is_prompt.shape, capacity), jnp.float32),
    )
    return _append(state, token, logprob, stops)


def _append(
    state: DecodeState, token: Int[Array, " B"], logprob: Float[Array, " B"], stops: Int[Array, " E"]
) -> DecodeState:
    """The state with one more token for every sequence that has not finished."""
    rows = jnp.arange(token.shape[0])
    column = jnp.where(state.finished, state.tokens.shape[1], state.num_new)
    return dataclasses.replace(
        state,
        token=jnp.where(state.finished, state.token, token),
        logprob=jnp.where(state.finished, state.logprob, logprob),
        num_new=state.num_new + ~state.finished,
        finished=state.finished | jnp.isin(token, stops),
        tokens=state.tokens.at[rows, column].set(token, mode="drop"),
        logprobs=state.logprobs.at[rows, column].set(logprob, mode="drop"),
    )


def _step(
    structure: Structure,
    weights: nnx.State,
    state: DecodeState,
    sampler: TokenSampler,
    stops: Int[Array, " E"],
) -> DecodeState:
    """One token for every sequence that has not finished; the others write nothing and stay as they are."""
    model = structure.model(weights)
    query_lens = jnp.where(state.finished, 0, 1).astype(jnp.int32)
    output = model.forward(state.token[:, None], state.cache, query_lens, decode=True)
    token, logprob = _draw(model, output.last_hidden[:, 0], state.keys, state.num_new, sampler)
    return _append(dataclasses.replace(state, cache=output.cache), token, logprob, stops)


_decode_step = jax.jit(_step, static_argnums=0, donate_argnums=2)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _decode_loop(
    structure: Structure,
    weights: nnx.State,
    state: DecodeState,
    sampler: TokenSampler,
    stops: Int[Array, " E"],
    max_new_tokens: Int[Array, ""],
) -> DecodeState:
    def unfinished(state: DecodeState) -> Bool[Array, ""]:
        return jnp.any(~state.finished & (state.num_new < max_new_tokens))

    return jax.lax.while_loop(unfinished, lambda s: _step(structure, weights, s, sampler, stops), state)


def _emit(stream: Stream, state: DecodeState, before: np.ndarray) -> None:
    """Hands over the newest token of every sequence that has one more than before."""
    num_new, token, logprob = jax.device_get((state.num_new, state.token, state.logprob))
    for index, count in enumerate(before):
        if num_new[index] > count:
            stream(index, int(token[index]), float(logprob[index]))


def _output(state: DecodeState, num_prompts: int) -> GenerateOutput:
    num_new, finished, tokens, logprobs = jax.device_get((state.num_new, state.finished, state.tokens, state.logprobs))
    return GenerateOutput(
        tokens=[tokens[i, : num_new[i]].tolist() for i in range(num_prompts)],
        logprobs=[logprobs[i, : num_new[i]].tolist() for i in range(num_prompts)],
        finish_reasons=["stop" if finished[i] else "length" for i in range(num_prompts)],
    )
