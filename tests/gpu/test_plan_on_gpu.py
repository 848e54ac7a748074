"""The memory planner against the peak that JAX's allocator saw."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

MEASURE = """
import dataclasses, json, sys
import jax, numpy as np
from m3_jax import M3Config, generate, random_model
from m3_jax.plan import plan

experts, batch, context, new_tokens = map(int, sys.argv[1:])
config = M3Config.m3().with_layers([(False, False), (True, True)])
config = dataclasses.replace(config, num_experts=experts, vision=None)
sizes = {"context": context, "batch": batch}
plans = {source: dataclasses.asdict(plan(config, **sizes, source=source)) for source in ("formula", "compiled")}
device = jax.devices()[0]
model = jax.block_until_ready(random_model(config))
loaded = device.memory_stats()
prompts = np.random.RandomState(0).randint(0, config.vocab_size, (batch, context - new_tokens)).tolist()
generate(model, prompts, max_new_tokens=new_tokens)
peak = device.memory_stats()["peak_bytes_in_use"]
out = {"plans": plans, "peak": peak, "weights": loaded["bytes_in_use"], "weights_peak": loaded["peak_bytes_in_use"]}
print(json.dumps(out))
"""


# All experts of one layer, 14.5 of 20 GB; and few of them, where everything else counts.
@pytest.mark.gpu
@pytest.mark.parametrize("experts", [128, 8])
def test_the_peak(experts: int, tmp_path: Path) -> None:
    """A dense and a sparse layer of full width, 4 sequences of 8 K: both sources within 10 % of the peak."""
    # A process of its own: the allocator's peak cannot be set back. What the planner compiles, `generate` loads.
    settings = {
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, *map(str, (experts, 4, 8192, 16))],
        cwd=ROOT,
        env=os.environ | settings,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    print(json.dumps(found, indent=1))
    # Drawing the weights takes no more than the weights.
    assert found["weights_peak"] < 1.01 * found["weights"]
    for planned in found["plans"].values():
        # The allocator counts a block whole whose rest is too small to give away.
        assert planned["weights"] <= found["weights"] < 1.05 * planned["weights"]
        activations = max(planned["passes"].values())
        assert planned["weights"] + planned["cache"] + activations == pytest.approx(found["peak"], rel=0.1)
