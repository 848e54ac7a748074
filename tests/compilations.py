"""What jax traces and compiles meanwhile, by its own events."""

import contextlib
from collections.abc import Iterator

import jax

TRACED = "/jax/core/compile/jaxpr_trace_duration"
COMPILED = "/jax/core/compile/backend_compile_duration"


@contextlib.contextmanager
def compilations(*kinds: str) -> Iterator[list[str]]:
    """A list that grows by every event of these kinds; by what XLA compiles, without any."""
    events: list[str] = []

    def listen(event: str, duration_secs: float, **kwargs: str | int) -> None:
        del duration_secs, kwargs
        if event in (kinds or (COMPILED,)):
            events.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield events
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
