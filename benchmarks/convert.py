"""Rates of convert and load beside a plain copy of the same bytes, on a synthetic checkpoint made on the spot.

    python benchmarks/convert.py [--size-gb 4.3] [--rounds 4] [--folder DIR] [--output FILE.json]

A round copies every file (`shutil.copyfile`, then fsync), converts, loads what was converted, and loads the released
layout directly, one after the other, so that all four meet the same machine; the table has the medians. Everything
reads from the page cache, where the copy is fastest. Convert's time ends when its data is on disk, as the copy's does.
The two loads take turns at being the first: memory that a virtual machine has to get from its host is slow, and the
second one has what the first one gave back.
"""

import argparse
import dataclasses
import datetime
import importlib.metadata
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np
import psutil

from checkpoints_convert.convert import convert
from checkpoints_convert.export import Entry, Shard
from m3_jax.checkpoint.dtypes import BFLOAT16, FLOAT32
from m3_jax.checkpoint.names import Weight, parts
from m3_jax.config import M3Config
from m3_jax.loading import load

REQUIRED = 0.6
SHARD_BYTES = 1_000_000_000
PACKAGES = ("jax", "flax", "orbax-checkpoint", "tensorstore", "numpy", "ml-dtypes")


def synthetic_config(size_gb: float) -> M3Config:
    """As many MoE layers as the size asks for, each of 0.93 GB with experts of 50 MB."""
    layers = max(1, round((size_gb - 0.5) / 0.93)) + 1
    freq = (False,) + (True,) * (layers - 1)
    return dataclasses.replace(
        M3Config.m3(),
        vocab_size=16_384,
        hidden_size=4096,
        num_hidden_layers=layers,
        num_attention_heads=32,
        dense_intermediate_size=8192,
        moe_intermediate_size=2048,
        shared_intermediate_size=2048,
        num_experts=16,
        sparse_attention_layers=freq,
        moe_layers=freq,
        vision=None,
    )


def write_release(config: M3Config, folder: Path) -> int:
    """A checkpoint in the released layout with random mantissas; gives its bytes."""
    folder.mkdir()
    noise = np.random.default_rng(0).integers(0, 1 << 16, (SHARD_BYTES // 4,), np.uint16) & 0xBFFF  # no infinities
    groups: list[list[Entry]] = [[]]
    for weight in (weight for part in parts(config) for weight in part.weights):
        dtype = FLOAT32 if weight.float32 else BFLOAT16
        for entry in _entries(weight, dtype):
            if groups[-1] and sum(e.nbytes for e in groups[-1]) + entry.nbytes > SHARD_BYTES:
                groups.append([])
            groups[-1].append(entry)
    weight_map = {}
    for number, group in enumerate(groups, 1):
        shard = Shard(f"model-{number:05d}-of-{len(groups):05d}.safetensors", group)
        with open(folder / shard.name, "wb") as file:
            file.write(shard.header)
            for entry in shard.entries:
                file.write(noise.view(np.uint8)[: entry.nbytes].tobytes())
                weight_map[entry.name] = shard.name
            file.flush()
            os.fsync(file.fileno())
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(config.to_hf()))
    return sum(path.stat().st_size for path in folder.iterdir())


def _entries(weight: Weight, dtype: np.dtype) -> list[Entry]:
    return [
        Entry(piece.name, dtype, piece.shape, int(np.prod(piece.shape)) * dtype.itemsize) for piece in weight.slices()
    ]


def copy(source: Path, target: Path) -> None:
    """The yardstick: every file, and all of it on disk at the end."""
    target.mkdir()
    for path in source.iterdir():
        shutil.copyfile(path, target / path.name)
        fd = os.open(target / path.name, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _load(folder: Path) -> None:
    jax.block_until_ready(jax.tree.leaves(load(folder)))


def measure(size_gb: float, rounds: int, folder: Path) -> dict[str, Any]:
    """The figures of all rounds."""
    source = folder / "release"
    nbytes = write_release(synthetic_config(size_gb), source)
    seconds: dict[str, list[float]] = {name: [] for name in ("copy", "convert", "load", "load_hugging_face")}
    for number in range(rounds):
        seconds["copy"].append(_seconds(lambda: copy(source, folder / "copy")))
        shutil.rmtree(folder / "copy")
        seconds["convert"].append(_seconds(lambda: convert(source, folder / "converted")))
        loads = [("load", folder / "converted"), ("load_hugging_face", source)]
        for name, path in loads if number % 2 == 0 else loads[::-1]:
            seconds[name].append(_seconds(lambda path=path: _load(path)))
        shutil.rmtree(folder / "converted")
    rates = {name: nbytes / statistics.median(values) / 1e9 for name, values in seconds.items()}
    return {
        "bytes": nbytes,
        "seconds": seconds,
        "median_gb_per_s": rates,
        "fraction_of_copy": {name: rate / rates["copy"] for name, rate in rates.items()},
        "required_fraction": REQUIRED,
    }


def peak_memory_of_conversion(size_gb: float, folder: Path) -> dict[str, int]:
    """Largest resident memory of `m3-convert convert`, in a process of its own, beside the largest layer."""
    source = folder / "release"
    config = synthetic_config(size_gb)
    layer = max(
        sum(entry.nbytes for w in part.weights for entry in _entries(w, FLOAT32 if w.float32 else BFLOAT16))
        for part in parts(config)
    )
    program = (
        "from checkpoints_convert.cli import main\n"
        "main(standalone_mode=False)\n"
        # Not ru_maxrss: a child inherits its parent's.
        "print(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))"
    )
    command = [sys.executable, "-c", program, "convert", str(source), str(folder / "memory")]
    peak = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout) * 1024
    return {"largest_layer_bytes": layer, "peak_resident_bytes": peak, "allowed_bytes": 2 * layer + (1 << 30)}


def machine() -> dict[str, Any]:
    """What it ran on."""
    return {
        "platform": f"{platform.system()} {platform.machine()}",
        "processor": next(
            (line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")), ""
        ),
        "cores": os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "python": platform.python_version(),
        **{package: importlib.metadata.version(package) for package in PACKAGES},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size-gb", type=float, default=4.3)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--folder", type=Path, default=None, help="where the files are made; a temporary folder")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "convert.json")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        result = measure(arguments.size_gb, arguments.rounds, Path(folder))
        memory = peak_memory_of_conversion(arguments.size_gb, Path(folder))
    record = {
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["python", "benchmarks/convert.py", *sys.argv[1:]]),
        "machine": machine(),
        **result,
        "memory": memory,
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(record, indent=2) + "\n")
    print(f"{result['bytes'] / 1e9:.2f} GB, medians of {arguments.rounds} rounds")
    print(f"{'':20}{'GB/s':>8}{'of copy':>10}   seconds")
    for name, rate in result["median_gb_per_s"].items():
        seconds = ", ".join(f"{value:.2f}" for value in result["seconds"][name])
        print(f"{name:20}{rate:8.2f}{result['fraction_of_copy'][name]:10.0%}   {seconds}")
    print(
        f"conversion's peak memory {memory['peak_resident_bytes'] / 1e9:.2f} GB, "
        f"largest layer {memory['largest_layer_bytes'] / 1e9:.2f} GB"
    )


if __name__ == "__main__":
    main()
