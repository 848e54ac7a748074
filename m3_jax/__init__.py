"""MiniMax-M3 for JAX: the text model, its cache, jitted generation and checkpoint loading.

    from m3_jax import Greedy, M3Config, Sampler, generate, load

The names load on first use, so that importing the package (a command's `--help`, say) costs nothing.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from m3_jax.cache import Cache as Cache
    from m3_jax.cache import LayerCache as LayerCache
    from m3_jax.config import M3Config as M3Config
    from m3_jax.generation import GenerateOutput as GenerateOutput
    from m3_jax.generation import generate as generate
    from m3_jax.loading import load as load
    from m3_jax.model import M3ForCausalLM as M3ForCausalLM
    from m3_jax.random_weights import random_model as random_model
    from m3_jax.sampling import Greedy as Greedy
    from m3_jax.sampling import Sampler as Sampler
    from m3_jax.saving import save as save
    from m3_jax.sharding import make_mesh as make_mesh

_HOME = {
    "Cache": "cache",
    "GenerateOutput": "generation",
    "Greedy": "sampling",
    "LayerCache": "cache",
    "M3Config": "config",
    "M3ForCausalLM": "model",
    "Sampler": "sampling",
    "generate": "generation",
    "load": "loading",
    "make_mesh": "sharding",
    "random_model": "random_weights",
    "save": "saving",
}
__all__ = [
    "Cache",
    "GenerateOutput",
    "Greedy",
    "LayerCache",
    "M3Config",
    "M3ForCausalLM",
    "Sampler",
    "generate",
    "load",
    "make_mesh",
    "random_model",
    "save",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
