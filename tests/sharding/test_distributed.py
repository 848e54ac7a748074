"""Two processes on loopback: the tokens of one process, and an end of both where one of them dies."""

import json
import os
import re
import signal
import socket
import string
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import meshes
import models
import numpy as np
import pytest
from checkpoints.releases import converted, random_tensors, write_release

from m3_jax import Greedy, Sampler, generate, load
from m3_jax.distributed import initialize

COMMAND = str(Path(sys.executable).with_name("m3-generate"))
# Every process compiles: one layer, block-sparse with experts, has all kinds of collectives.
CONFIG = meshes.CONFIG.with_layers([(True, True)])
NEW_TOKENS = 6
PROMPTS = [models.random_tokens(CONFIG, length, seed=length).tolist() for length in (40, 3, 17)]
# Less time to compile, of which these tests mostly consist.
ENVIRONMENT = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
Process = subprocess.Popen[str]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A converted checkpoint; its release is beside it."""
    root = tmp_path_factory.mktemp("distributed")
    src = write_release(root / "src", CONFIG, random_tensors(CONFIG, np.float32))
    (src / "tokenizer.json").unlink()  # Of another model: token ids go in and out.
    return converted(src, root / "dst")


@pytest.fixture
def started() -> Iterator[list[Process]]:
    """Processes of a test, ended with it."""
    processes: list[Process] = []
    yield processes
    for process in processes:
        process.kill()
        process.communicate()


def start(started: list[Process], *command: str) -> Process:
    process = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    started.append(process)
    return process


WORKER = """
import json, sys
import jax
from m3_jax import Greedy, Sampler, generate, load, make_mesh
from m3_jax.distributed import initialize

process, port, prompts, new_tokens, cases = json.loads(sys.argv[1])
initialize(f"127.0.0.1:{port}", 2, process)
assert (jax.process_count(), len(jax.devices()), len(jax.local_devices())) == (2, 4, 2)
try:
    load(cases[0][0], mesh=make_mesh(tensor=2))
    refused = ""
except ValueError as error:
    refused = str(error)
tokens = []
for folder, sizes, options in cases:
    model = load(folder, mesh=make_mesh(**sizes))
    held = {shard.device.process_index for leaf in jax.tree.leaves(model) for shard in leaf.addressable_shards}
    assert held == {process}
    sampler = Sampler(**options) if options else Greedy()
    seeds = list(range(len(prompts)))
    tokens.append(generate(model, prompts, max_new_tokens=new_tokens, sampler=sampler, seed=seeds).tokens)
print(json.dumps([refused, tokens]))
"""


def test_the_tokens_of_one_process(checkpoint: Path, started: list[Process]) -> None:
    """tensor=4 reaches over both processes in every layer; expert=2 has one half of the experts in each."""
    port, options = free_port(), {"temperature": 1.0, "top_p": 0.9}
    cases = [
        (str(checkpoint), {"tensor": 4}, {}),
        (str(checkpoint.with_name("src")), {"expert": 2, "tensor": 2}, options),
    ]
    for process in range(2):
        arguments = [process, port, PROMPTS, NEW_TOKENS, cases]
        start(started, sys.executable, "-c", WORKER, json.dumps(arguments))
    results = [process.communicate(timeout=300) for process in started]
    assert [process.returncode for process in started] == [0, 0], results
    found = [json.loads(out.splitlines()[-1]) for out, _ in results]
    assert found[0] == found[1]
    refused, tokens = found[0]
    # make_mesh took the two devices of process 0.
    assert "has no device of process 1: it must reach all 2 processes, which have 4 devices" in refused
    model, seeds = load(checkpoint), list(range(len(PROMPTS)))
    for sampler, generated in zip((Greedy(), Sampler(temperature=1.0, top_p=0.9)), tokens, strict=True):
        expected = generate(model, PROMPTS, max_new_tokens=NEW_TOKENS, sampler=sampler, seed=seeds)
        assert generated == expected.tokens


def announces(text: str) -> bool:
    """Whether these are the lines in which JAX's CPU collectives (Gloo) announce their connections.

    Two devices' threads write theirs at once, piece by piece: a line may begin with any piece.
    """
    words = {"[Gloo]", "Rank", "is", "connected", "to", "peer", "ranks.", "Expected", "number", "of", "ranks", ":"}
    return set(re.findall(r"[^\s\d]+", text)) <= words


def first_own_character(output: IO[str], among: str) -> str:
    """What follows the announcements, one of those that are given; "" if nothing does."""
    while (character := output.read(1)) and character not in among:
        line = character if character == "\n" else character + output.readline()
        assert announces(line), line
    return character


def start_commands(started: list[Process], checkpoint: Path, tmp_path: Path, *more: str) -> None:
    (tmp_path / "ids").write_text(" ".join(map(str, PROMPTS[0])))
    port = free_port()
    for process in range(2):
        start(
            started,
            *(COMMAND, "--checkpoint", str(checkpoint), "--mesh", "tensor=4", "--prompt-tokens", str(tmp_path / "ids")),
            *("--coordinator", f"127.0.0.1:{port}", "--num-processes", "2", "--process-id", str(process), *more),
        )


def test_the_command_prints_once_and_a_death_ends_it(checkpoint: Path, started: list[Process], tmp_path: Path) -> None:
    """Process 1 is killed while both generate: process 0 says so in one line and ends."""
    start_commands(started, checkpoint, tmp_path, "--max-new-tokens", "60000")
    output = started[0].stdout
    assert output is not None
    assert first_own_character(output, string.digits)
    started[1].kill()
    killed = time.monotonic()
    _, errors = started[0].communicate(timeout=60)
    assert time.monotonic() - killed < 60
    assert started[0].returncode == 1, errors
    lines = [line for line in errors.splitlines() if line.startswith("m3-generate: error: ")]
    assert len(lines) == 1, errors
    assert "Connection closed by peer" in lines[0] or "Connection reset by peer" in lines[0]
    # Process 1 prints nothing else, no tokens either: an announcement has three numbers.
    printed = started[1].communicate()[0]
    assert announces(printed), printed
    assert len(re.findall(r"\d+", printed)) <= 3 * printed.count("[Gloo]"), printed


HANG = """
import os, signal, sys
from jax.experimental.multihost_utils import sync_global_devices
from m3_jax.distributed import initialize

process = int(sys.argv[1])
initialize(f"127.0.0.1:{sys.argv[2]}", 2, process, heartbeat_timeout_seconds=6)
sync_global_devices("both are here")
print("together", flush=True)
if process == 1:
    os.kill(os.getpid(), signal.SIGSTOP)
sync_global_devices("never")
"""


def test_a_process_that_hangs_ends_the_other(started: list[Process]) -> None:
    """Nothing on the connection tells; the missing heartbeats do."""
    port = free_port()
    for process in range(2):
        start(started, sys.executable, "-c", HANG, str(process), str(port))
    output = started[0].stdout
    assert output is not None
    assert first_own_character(output, "t")
    begin = time.monotonic()
    _, errors = started[0].communicate(timeout=60)
    assert time.monotonic() - begin < 60
    assert started[0].returncode == -signal.SIGABRT
    assert "unhealthy (stopped sending heartbeats)" in errors or "heartbeat timeout" in errors
    assert "another task died" in errors


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("host:1", None, None), "num_processes, process_id: must be given, or none of coordinator_address"),
        (("host", 2, 0), "coordinator_address='host': must be HOST:PORT"),
        (("host:99999", 2, 0), "coordinator_address='host:99999': must be HOST:PORT"),
        (("host:1", 2, 2), "process_id=2: must be between 0 and num_processes - 1 = 1"),
    ],
)
def test_arguments(arguments: tuple[str, int | None, int | None], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        initialize(*arguments)
    with pytest.raises(ValueError, match="heartbeat_timeout_seconds=0"):
        initialize("host:1", 1, 0, heartbeat_timeout_seconds=0)
