"""A long prompt on a small machine."""

import subprocess
import sys
from pathlib import Path

SCRIPT = """
import resource
import models
from m3_jax import M3Config, generate

config = M3Config.tiny()
prompt = models.random_tokens(config, 32_768).tolist()
output = generate(models.random_model(config), [prompt], max_new_tokens=2)
assert len(output.tokens[0]) == 2
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def test_a_prompt_of_32768_tokens_takes_less_than_4_gib() -> None:
    """In a process of its own, whose peak nobody else's memory counts into."""
    tests = Path(__file__).parents[1]
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=tests, capture_output=True, text=True, timeout=500, check=False
    )
    assert result.returncode == 0, result.stderr
    kib = int(result.stdout)
    assert 0 < kib * 1024 < 4 * 2**30
