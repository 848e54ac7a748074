"""Samplers: from one row of logits to one token.

A sampler is a frozen pytree of numbers: another temperature compiles nothing, another set of filters does.
"""

import dataclasses
import functools
from typing import Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key


class TokenSampler(Protocol):
    """What `generate` asks of a sampler."""

    def __call__(self, logits: Float[Array, "B V"], keys: Key[Array, " B"]) -> Int[Array, " B"]:
        """One token for each row, drawn with the row's own key."""
        ...


@functools.partial(jax.tree_util.register_dataclass, data_fields=[], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Greedy:
    """The token with the largest logit, the lowest id among equals."""

    def __call__(self, logits: Float[Array, "B V"], keys: Key[Array, " B"]) -> Int[Array, " B"]:
        del keys
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["temperature", "top_k", "top_p", "min_p"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class Sampler:
    """Draws from softmax(logits / temperature), narrowed by the filters that are given, in this order.

    Attributes:
      temperature: at least 0; 0 is greedy.
      top_k: keep the k most likely tokens.
      top_p: of those, renormalised, keep the fewest whose probabilities sum to at least p (nucleus sampling, Holtzman
        et al. 2019).
      min_p: keep tokens at least min_p times as likely as the most likely one (Nguyen et al. 2024).

    Raises `ValueError` for a value outside its range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None

    def __post_init__(self) -> None:
        for name, valid, requirement in (
            ("temperature", lambda t: 0 <= t < float("inf"), "must be finite and at least 0"),
            ("top_k", lambda k: isinstance(k, int) and k >= 1, "must be an integer of at least 1"),
            ("top_p", lambda p: 0 < p <= 1, "must be above 0 and at most 1"),
            ("min_p", lambda p: 0 <= p <= 1, "must be between 0 and 1"),
        ):
            value = getattr(self, name)
            # jax rebuilds the dataclass around tracers and abstract values, which have no value to check.
            if isinstance(value, int | float) and not valid(value):
                raise ValueError(f"{name}={value}: {requirement}")

    def __call__(self, logits: Float[Array, "B V"], keys: Key[Array, " B"]) -> Int[Array, " B"]:
        # Noise belongs to a token id, not to its rank: rounding that swaps two equal logits then changes nothing.
        noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[1:], jnp.float32))(keys)
        greedy = jnp.asarray(self.temperature) == 0
        scaled = logits / jnp.where(greedy, 1.0, self.temperature)
        drawn = jnp.argmax(self._filter(scaled) + noise, axis=-1)
        return jnp.where(greedy, jnp.argmax(logits, axis=-1), drawn).astype(jnp.int32)

    def _filter(self, logits: Float[Array, "B V"]) -> Float[Array, "B V"]:
        """The logits with -inf for the tokens that the filters drop."""
        if self.top_k is not None or self.top_p is not None:
            ranked = jnp.sort(logits, axis=-1, descending=True)
            if self.top_k is not None:
                rank = jnp.minimum(self.top_k, logits.shape[-1])
                ranked = jnp.where(jnp.arange(logits.shape[-1]) < rank, ranked, -jnp.inf)
            if self.top_p is not None:
                probabilities = jax.nn.softmax(ranked, axis=-1)
                more_likely = jnp.cumsum(probabilities, axis=-1) - probabilities
                ranked = jnp.where(more_likely < self.top_p, ranked, -jnp.inf)
            lowest = jnp.min(jnp.where(jnp.isfinite(ranked), ranked, jnp.inf), axis=-1, keepdims=True)
            logits = jnp.where(logits >= lowest, logits, -jnp.inf)
        if self.min_p is not None:
            top = jnp.max(logits, axis=-1, keepdims=True)
            logits = jnp.where(logits - top >= jnp.log(self.min_p), logits, -jnp.inf)
        return logits
