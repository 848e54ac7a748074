"""The Triton kernels in Triton's interpreter, where jax-triton is installed: no GPU is needed."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
CHECKS = ("index_decode", "index_prefill", "index_prefill_in_groups", "attention_decode", "attention_prefill")


@pytest.mark.skipif(importlib.util.find_spec("jax_triton") is None, reason="jax-triton is not installed")
@pytest.mark.parametrize("check", CHECKS)
def test_interpreted(check: str):
    """In a process of its own: triton decides when it is imported."""
    paths = os.pathsep.join([str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"TRITON_INTERPRET": "1", "JAX_PLATFORMS": "cpu", "PYTHONPATH": paths}
    command = [sys.executable, str(HERE / "triton_interpreter.py"), check]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
