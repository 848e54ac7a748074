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
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int, Key, UInt, UInt32

from m3_jax.cache import Cache, cache_specs
from m3_jax.config import M3Config
from m3_jax.model import M3ForCausalLM, Structure, split
from m3_jax.sampling import Greedy, TokenSampler
from m3_jax.sharding import BATCH, all_reduce, fetch, over_mesh, peer_table, place, sums_over_peers

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
      model: the model; its dtype is the cache's. Where its weights lie on a mesh, generation runs over that mesh and
        gives the same tokens.
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
    batch = structure.batch_parts * _power_of_two(-(-num_prompts // structure.batch_parts))
    seeds = np.zeros(batch, np.uint32)
    seeds[:num_prompts] = np.asarray(seed)

    def rows(value: np.ndarray) -> Array:
        return place(structure.mesh, ("batch", "whole")[: value.ndim], value)

    lengths = np.zeros(batch, np.int32)
    lengths[:num_prompts] = [len(ids) for ids in prompt_ids]
    longest = int(lengths.max())
    pages = _length_bucket(-(-(longest + max_new_tokens) // config.sparse_attention.block_size))
    cache, hidden = _allocate(structure, batch, pages * config.sparse_attention.block_size, model.dtype)

    for start, size in _chunks(longest, prefill_chunk):
        tokens = np.zeros((batch, size), np.int32)
        for row, ids in enumerate(prompt_ids):
            part = ids[start : start + size]
            tokens[row, : len(part)] = part
        query_lens = np.clip(lengths - start, 0, size)
        cache, hidden = _prefill(structure, weights, cache, hidden, rows(tokens), rows(query_lens))

    # A stop id that no token has fills the bucket.
    stops = np.full(_power_of_two(max(1, len(stop_token_ids))), -1, np.int32)
    stops[: len(stop_token_ids)] = list(stop_token_ids)
    capacity = _power_of_two(max_new_tokens)
    stops = place(structure.mesh, ("whole",), stops)
    state = _first_token(structure, weights, cache, hidden, rows(seeds), rows(lengths > 0), sampler, stops, capacity)
    peers = peer_table(structure.mesh)
    if stream is None:
        state = _decode_loop(structure, weights, state, sampler, stops, np.int32(max_new_tokens), peers)
    else:
        _emit(stream, state, np.zeros(num_prompts, np.int32))
        for _ in range(max_new_tokens - 1):
            before, finished = fetch((state.num_new, state.finished))
            if finished.all():
                break
            state = _decode_step(structure, weights, state, sampler, stops, peers)
            _emit(stream, state, before[:num_prompts])
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


def _cache_specs(structure: Structure) -> Cache | PartitionSpec:
    return PartitionSpec() if structure.mesh is None else cache_specs(structure.config, structure.mesh)


def _state_specs(structure: Structure) -> DecodeState:
    """How the loop's carry is cut over the mesh: every sequence with its pages on its own part."""
    fields = {field.name: structure.spec("batch") for field in dataclasses.fields(DecodeState)}
    return DecodeState(**fields | {"cache": _cache_specs(structure)})  # pyright: ignore[reportArgumentType]


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _allocate(structure: Structure, batch: int, max_length: int, dtype: jnp.dtype) -> tuple[Cache, Float[Array, "B D"]]:
    """An empty cache and hidden states of zero."""
    config = structure.config
    # The bucket may reach past the last position; what was asked for does not.
    padded = dataclasses.replace(config, max_position_embeddings=max(max_length, config.max_position_embeddings))

    def allocate() -> tuple[Cache, Float[Array, "B D"]]:
        own = batch // structure.batch_parts
        return Cache.allocate(padded, own, max_length, dtype=dtype), jnp.zeros((own, config.hidden_size), dtype)

    return over_mesh(structure.mesh, allocate, (), (_cache_specs(structure), structure.spec("batch", "embed")))()


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

    def prefill(
        model: M3ForCausalLM, cache: Cache, hidden: Array, tokens: Array, query_lens: Array
    ) -> tuple[Cache, Array]:
        output = model.forward(tokens, cache, query_lens)
        last = jnp.maximum(query_lens - 1, 0)[:, None, None]
        last_hidden = jnp.take_along_axis(output.last_hidden, last, axis=1)[:, 0]
        return output.cache, jnp.where(query_lens[:, None] > 0, last_hidden, hidden)

    rows, cache_spec = structure.spec("batch"), _cache_specs(structure)
    arguments = (cache, hidden, tokens, query_lens)
    return structure.run(prefill, weights, arguments, (cache_spec, rows, rows, rows), (cache_spec, rows))


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
    seeds: UInt[Array, " B"],
    is_prompt: Bool[Array, " B"],
    sampler: TokenSampler,
    stops: Int[Array, " E"],
    capacity: int,
) -> DecodeState:
    def first(
        model: M3ForCausalLM,
        cache: Cache,
        hidden: Array,
        seeds: Array,
        is_prompt: Array,
        sampler: TokenSampler,
        stops: Array,
    ) -> DecodeState:
        keys = jax.vmap(jax.random.key)(seeds)
        num_new = jnp.zeros(is_prompt.shape, jnp.int32)
        token, logprob = _draw(model, hidden, keys, num_new, sampler)
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

    rows, whole = structure.spec("batch"), structure.spec()
    arguments = (cache, hidden, seeds, is_prompt, sampler, stops)
    specs = (_cache_specs(structure), rows, rows, rows, whole, whole)
    return structure.run(first, weights, arguments, specs, _state_specs(structure))


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
    model: M3ForCausalLM,
    state: DecodeState,
    sampler: TokenSampler,
    stops: Int[Array, " E"],
    peers: UInt32[Array, "1 W"] | None,
) -> DecodeState:
    """One token for every sequence that has not finished; the others write nothing and stay as they are."""
    query_lens = jnp.where(state.finished, 0, 1).astype(jnp.int32)
    with sums_over_peers(peers):
        output = model.forward(state.token[:, None], state.cache, query_lens, decode=True)
    token, logprob = _draw(model, output.last_hidden[:, 0], state.keys, state.num_new, sampler)
    return _append(dataclasses.replace(state, cache=output.cache), token, logprob, stops)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _decode_step(
    structure: Structure,
    weights: nnx.State,
    state: DecodeState,
    sampler: TokenSampler,
    stops: Int[Array, " E"],
    peers: UInt32[Array, "N W"] | None = None,
) -> DecodeState:
    """One step; `peers` is the mesh's `peer_table`."""
    specs, whole = _state_specs(structure), structure.spec()
    arguments = (state, sampler, stops, peers)
    return structure.run(_step, weights, arguments, (specs, whole, whole, structure.spec("devices")), specs)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _decode_loop(
    structure: Structure,
    weights: nnx.State,
    state: DecodeState,
    sampler: TokenSampler,
    stops: Int[Array, " E"],
    max_new_tokens: Int[Array, ""],
    peers: UInt32[Array, "N W"] | None = None,
) -> DecodeState:
    """Steps until every sequence has finished; `peers` is the mesh's `peer_table`."""

    def loop(
        model: M3ForCausalLM,
        state: DecodeState,
        sampler: TokenSampler,
        stops: Array,
        max_new_tokens: Array,
        peers: Array | None,
    ) -> DecodeState:
        def unfinished(state: DecodeState) -> Bool[Array, ""]:
            # Of the sequences on all devices: a device that left the loop alone would be missed in the next reduction.
            mine = jnp.any(~state.finished & (state.num_new < max_new_tokens))
            return all_reduce(mine.astype(jnp.int32), BATCH) > 0

        def step(carry: tuple[DecodeState, Bool[Array, ""]]) -> tuple[DecodeState, Bool[Array, ""]]:
            state = _step(model, carry[0], sampler, stops, peers)
            return state, unfinished(state)

        return jax.lax.while_loop(lambda carry: carry[1], step, (state, unfinished(state)))[0]

    specs, whole = _state_specs(structure), structure.spec()
    arguments = (state, sampler, stops, max_new_tokens, peers)
    return structure.run(loop, weights, arguments, (specs, *(whole,) * 3, structure.spec("devices")), specs)


def _emit(stream: Stream, state: DecodeState, before: np.ndarray) -> None:
    """Hands over the newest token of every sequence that has one more than before."""
    num_new, token, logprob = fetch((state.num_new, state.token, state.logprob))
    for index, count in enumerate(before):
        if num_new[index] > count:
            stream(index, int(token[index]), float(logprob[index]))


def _output(state: DecodeState, num_prompts: int) -> GenerateOutput:
    num_new, finished, tokens, logprobs = fetch((state.num_new, state.finished, state.tokens, state.logprobs))
    return GenerateOutput(
        tokens=[tokens[i, : num_new[i]].tolist() for i in range(num_prompts)],
        logprobs=[logprobs[i, : num_new[i]].tolist() for i in range(num_prompts)],
        finish_reasons=["stop" if finished[i] else "length" for i in range(num_prompts)],
    )
