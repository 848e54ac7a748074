"""The Mosaic GPU kernels in Pallas' interpreter: right, free of races, and every barrier awaited."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
# Those of a process, of which each takes seconds to start.
CHECKS = (
    ("index_decode", "index_prefill", "index_candidates", "choose_special_scores", "index_attention_decode"),
    ("attention_decode", "paged_attention_decode", "attention_prefill", "norm_rope_cache"),
    ("attention_prefill_bounds", "skinny_matmul"),
    ("attention_prefill_in_common", "attention_prefill_in_common_bounds"),
)


@pytest.mark.parametrize("checks", CHECKS, ids=["index", "attention", "bounds", "in common"])
def test_interpreted(checks: tuple[str, ...]):
    """In a process of its own: the number of threads has to be set before jax is imported."""
    paths = os.pathsep.join([str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"NPROC": "16", "JAX_PLATFORMS": "cpu", "PYTHONPATH": paths}
    command = [sys.executable, str(HERE / "mosaic_interpreter.py"), *checks]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
