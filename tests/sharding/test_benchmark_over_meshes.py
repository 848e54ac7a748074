"""The benchmark of several GPUs runs as its docstring says, on virtual devices and a tiny model."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def test_every_measure(tmp_path: Path) -> None:
    arguments = (
        "--meshes expert=2,tensor=2 --config tiny --layers 1 --batches 3 --context 40 --prefill 32 --rows 1 --loop"
    )
    output = tmp_path / "meshes.json"
    subprocess.run(
        [sys.executable, "benchmarks/over_meshes.py", *arguments.split(), "--variants", "xla", "--output", str(output)],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "4", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"},
        check=True,
        capture_output=True,
        text=True,
    )
    (mesh,) = json.loads(output.read_text())["meshes"]
    assert (mesh["mesh"], mesh["devices"], mesh["layers"]) == ("expert=2,tensor=2", 4, 1)
    step, *sums, prefill = mesh["results"]
    assert [result["what"] for result in sums] == ["sum", "sum"]
    assert (step["what"], step["batch"], step["tokens_equal"], step["logprobs_apart"]) == ("step", 3, 1.0, 0.0)
    # Embedding, attention, MLP.
    assert step["made_by"] == prefill["made_by"] == {"default": 3}
    # Two sequences on the busier device, with one of two KV heads.
    assert step["floors"]["keys and values"] == pytest.approx(2 * 40 * 2 * 1 * 16 * 2 / 4.3e12 * 1e6)
    assert all(result["us"] > 0 for result in mesh["results"])
