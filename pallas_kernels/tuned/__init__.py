"""Configurations of the kernels as measured on a device: where they are kept, and how a kernel finds its own.

This folder has one JSON file for each kind of device, which `python -m pallas_kernels.tuning` writes. A kernel asks
with its static sizes. Sizes that round up to the same powers of two are one bucket, and what was measured for it
serves all of it; where nothing was, the kernel's own heuristic does.
"""

import contextlib
import dataclasses
import functools
import json
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from pallas_kernels import hopper

FOLDER = Path(__file__).parent
COMMAND = "python -m pallas_kernels.tuning"
FORMAT = 1

# Sizes of a bucket, sorted by name.
Bucket = tuple[tuple[str, int], ...]
# Called with a kernel's name, its bucket and its heuristic; returns the configuration to use.
Choice = Callable[[str, Bucket, Any], Any]

_choice: ContextVar[Choice | None] = ContextVar("choice", default=None)


@dataclasses.dataclass(frozen=True)
class Measured:
    """What was measured for a kernel and a bucket: the fields of its configuration, and the operation's time.

    us, heuristic_us: microseconds of the operation with this configuration, and with the heuristic's.
    """

    kernel: str
    bucket: Bucket
    config: Mapping[str, int]
    us: float
    heuristic_us: float


def config[T](kernel: str, heuristic: T, **sizes: int) -> T:
    """The configuration of `kernel` for these static sizes on the default device.

    heuristic: a frozen dataclass, returned where nothing was measured; what was measured replaces its fields.
    sizes: whatever the best configuration depends on, at least 1.
    A GPU without a file is warned of once in a process. Raises ValueError for a file that is none of ours, or
    whose fields or values the dataclass refuses.
    """
    bucket = bucket_of(sizes)
    choice = _choice.get()
    if choice is not None:
        return choice(kernel, bucket, heuristic)
    device: Any = hopper.default_device()
    if device.platform != "gpu":
        return heuristic
    found = of_device(device.device_kind).get((kernel, bucket))
    if found is None:
        return heuristic
    try:
        return dataclasses.replace(heuristic, **found.config)  # pyright: ignore[reportArgumentType]
    except (TypeError, ValueError) as error:
        where = path_of(device.device_kind)
        raise ValueError(f"{where}: {kernel} for {dict(bucket)} refuses what was measured: {error}") from error


def bucket_of(sizes: Mapping[str, int]) -> Bucket:
    """The bucket of static sizes: each rounded up to a power of two. Raises ValueError for one below 1."""
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name}={size} must be at least 1")
    return tuple(sorted((name, 1 << (size - 1).bit_length()) for name, size in sizes.items()))


@contextlib.contextmanager
def choosing(choice: Choice) -> Iterator[None]:
    """Within the context, and this thread, `choice` gives every configuration. What was traced before keeps its own."""
    token = _choice.set(choice)
    try:
        yield
    finally:
        _choice.reset(token)


def path_of(device_kind: str) -> Path:
    """The file of a kind of device, such as "NVIDIA H200"."""
    return FOLDER / f"{re.sub('[^a-z0-9]+', '_', device_kind.lower())}.json"


@functools.cache
def of_device(device_kind: str) -> Mapping[tuple[str, Bucket], Measured]:
    """What was measured on a kind of device, by kernel and bucket; nothing, with a warning, where there is no file."""
    path = path_of(device_kind)
    if not path.exists():
        message = f"no kernel was tuned for {device_kind}: heuristics serve; `{COMMAND}` measures and writes {path}"
        warnings.warn(message, stacklevel=3)
        return {}
    return {(each.kernel, each.bucket): each for each in load(path, device_kind)}


def load(path: Path, device_kind: str) -> list[Measured]:
    """Reads a file. Raises ValueError, with the reason, unless it is what `save` writes for this kind of device."""

    def refuse(reason: str) -> ValueError:
        return ValueError(f"{path} {reason}; `{COMMAND}` writes a new one")

    try:
        record = json.loads(path.read_text())
    except ValueError as error:
        raise refuse(f"is not JSON: {error}") from error
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise refuse(f"is not a file of tuned kernels in format {FORMAT}")
    if record.get("device") != device_kind:
        raise refuse(f"was measured on {record.get('device')!r}, not on {device_kind!r}")
    try:
        return [
            Measured(
                kernel=str(entry["kernel"]),
                bucket=bucket_of(entry["sizes"]),
                config={str(name): int(value) for name, value in entry["config"].items()},
                us=float(entry["us"]),
                heuristic_us=float(entry["heuristic_us"]),
            )
            for entry in record["kernels"]
        ]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise refuse(f"has an entry that cannot be read: {error!r}") from error


def save(path: Path, device_kind: str, measured: list[Measured], **about: Any) -> None:
    """Writes a file, one line for each measurement. `about`: what else is worth knowing, such as versions."""
    head = json.dumps({"format": FORMAT, "device": device_kind, **about}, indent=1)
    lines = []
    for each in sorted(measured, key=lambda each: (each.kernel, each.bucket)):
        times = {"us": round(each.us, 2), "heuristic_us": round(each.heuristic_us, 2)}
        entry = {"kernel": each.kernel, "sizes": dict(each.bucket), "config": dict(each.config), **times}
        lines.append("  " + json.dumps(entry))
    path.parent.mkdir(parents=True, exist_ok=True)
    # Under another name first: nobody reads half a file.
    partial = path.with_suffix(".partial")
    partial.write_text(head.removesuffix("\n}") + ',\n "kernels": [\n' + ",\n".join(lines) + "\n ]\n}\n")
    partial.replace(path)
    of_device.cache_clear()
