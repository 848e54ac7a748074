"""Static checks of arguments, shared by the operations: shapes, dtypes and plain numbers."""

import math
from typing import Any

import jax.numpy as jnp

CACHE_DTYPES = ("bfloat16", "float16", "float32")


class Shapes:
    """Binds dimension letters to sizes, argument after argument, and refuses a letter with two sizes."""

    def __init__(self) -> None:
        self._sizes: dict[str, tuple[int, str]] = {}

    def __getitem__(self, letter: str) -> int:
        return self._sizes[letter][0]

    def bind(self, name: str, array: Any, letters: str) -> None:
        """Bind the shape of argument `name` to `letters`, such as "T K I"; "B+1" is B (bound before) plus 1.

        Raises TypeError when it is no array, ValueError when the shape does not fit what was bound before.
        """
        if not hasattr(array, "shape") or not hasattr(array, "dtype"):
            raise TypeError(f"{name} must be an array of shape [{letters}], not {type(array).__name__}")
        wanted = letters.split()
        shape = tuple(array.shape)
        if len(shape) != len(wanted):
            raise ValueError(f"{name} has shape {shape}, which must have {len(wanted)} axes: [{letters}]")
        for letter, size in zip(wanted, shape, strict=True):
            if letter.endswith("+1"):
                known, owner = self._sizes[letter[:-2]]
                known += 1
            else:
                if size < 1:
                    raise ValueError(f"{name} has shape {shape}, but {letter} in [{letters}] must be at least 1")
                known, owner = self._sizes.setdefault(letter, (size, name))
            if size != known:
                raise ValueError(
                    f"{name} has shape {shape}, but {letter} in [{letters}] must be {known}, as in {owner}"
                )


def check_int32(**arrays: Any) -> None:
    """Raise TypeError unless every array is int32."""
    for name, array in arrays.items():
        if array.dtype != jnp.int32:
            raise TypeError(f"{name} has dtype {array.dtype}, which must be int32")


def check_cache_dtypes(query_name: str, query: Any, **caches: Any) -> None:
    """Raise TypeError unless every cache has one of `CACHE_DTYPES` and the query has the same one."""
    check_dtypes(**caches)
    for name, cache in caches.items():
        if query.dtype != cache.dtype:
            raise TypeError(f"{query_name} has dtype {query.dtype}, which must be {cache.dtype}, that of {name}")


def check_dtypes(**arrays: Any) -> None:
    """Raise TypeError unless every array has one of `CACHE_DTYPES`."""
    for name, array in arrays.items():
        if str(array.dtype) not in CACHE_DTYPES:
            raise TypeError(f"{name} has dtype {array.dtype}, which must be one of {', '.join(CACHE_DTYPES)}")


def check_uniform_queries(shapes: Shapes, query_name: str) -> None:
    """Raise ValueError unless the T rows of a decode call are the same number for each of B sequences."""
    if shapes["T"] % shapes["B"]:
        raise ValueError(
            f"{query_name} has T={shapes['T']} rows, which must be a multiple of B={shapes['B']} sequences"
        )


def check_heads(shapes: Shapes) -> None:
    """Raise ValueError unless the N heads of q are a multiple of the K of k."""
    if shapes["N"] % shapes["K"]:
        raise ValueError(f"q has N={shapes['N']} heads, which must be a multiple of the K={shapes['K']} of k")


def check_attention(q: Any, k: Any, v: Any, block_table: Any, seq_lens: Any) -> Shapes:
    """Bind the shapes of what any attention to a paged cache is given.

    Raises TypeError or ValueError unless these, the dtypes and the numbers of heads fit one another.
    """
    shapes = Shapes()
    shapes.bind("q", q, "T N H")
    shapes.bind("k", k, "P K S H")
    shapes.bind("v", v, "P K S H")
    shapes.bind("block_table", block_table, "B M")
    shapes.bind("seq_lens", seq_lens, "B")
    check_cache_dtypes("q", q, k=k, v=v)
    check_heads(shapes)
    check_int32(block_table=block_table, seq_lens=seq_lens)
    return shapes


def check_count(name: str, value: Any, least: int) -> None:
    """Raise TypeError unless `value` is a Python int, ValueError unless it is at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}={value!r} must be a Python int, not {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name}={value} must be at least {least}")


def check_choice(top_k: Any, init_blocks: Any, local_blocks: Any) -> None:
    """Raise TypeError or ValueError unless so many blocks can be chosen, of which some are forced."""
    check_count("top_k", top_k, 1)
    check_count("init_blocks", init_blocks, 0)
    check_count("local_blocks", local_blocks, 0)
    if init_blocks + local_blocks > top_k:
        raise ValueError(
            f"init_blocks={init_blocks} + local_blocks={local_blocks} must be at most top_k={top_k}: "
            "forced blocks count within the choice"
        )


def scale_of(scale: Any, head_dim: int) -> float:
    """The factor of the logits: `scale`, or head_dim ** -0.5 for None.

    Raises TypeError unless `scale` is a Python number or None, ValueError unless it is positive and finite.
    """
    if scale is None:
        return head_dim**-0.5
    if isinstance(scale, bool) or not isinstance(scale, int | float):
        raise TypeError(f"scale={scale!r} must be a Python float or None, not {type(scale).__name__}")
    if not (math.isfinite(scale) and scale > 0):
        raise ValueError(f"scale={scale} must be positive and finite")
    return float(scale)
