"""`m3-generate` on the checkpoint that comes with the repository."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from m3_jax import M3Config
from m3_jax.cli import main
from m3_jax.mesh_option import AXES, parse_mesh
from m3_jax.sharding import MESH_AXES
from m3_jax.text import Text

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "examples" / "tiny-m3"
GOLDEN = json.loads((ROOT / "tests" / "parity" / "goldens" / "tiny_m3.json").read_text())
SHORT = GOLDEN["continuations"][0]
PROMPT = "A library keeps its books on shelves"
COMMAND = str(Path(sys.executable).with_name("m3-generate"))


def run(*arguments: str, stdin: str | bytes | None = None, checkpoint: Path = TINY) -> Result:
    """In this process, so that later runs find what earlier ones compiled."""
    return CliRunner().invoke(
        main, ["--checkpoint", str(checkpoint), "--dtype", "float32", *arguments], input=stdin, catch_exceptions=False
    )


def run_json(*arguments: str, **options: Any) -> dict[str, Any]:
    result = run("--json", *arguments, **options)
    assert result.exit_code == 0, result.stderr
    assert result.stdout.count("\n") == 1
    return json.loads(result.stdout)


def fails(result: Result, words: str) -> None:
    """One line on standard error, nothing on standard output, exit status 1."""
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.startswith("m3-generate: error: ")
    assert result.stderr.count("\n") == 1
    assert words in result.stderr


def new_tokens(count: int = GOLDEN["new_tokens"]) -> tuple[str, str]:
    return "--max-new-tokens", str(count)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A checkpoint folder to be changed."""
    return Path(shutil.copytree(TINY, tmp_path / "copy"))


@pytest.fixture
def bare(copy: Path) -> Path:
    """A checkpoint without a tokenizer."""
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (copy / name).unlink()
    return copy


@pytest.mark.parametrize(("command", "word"), [("m3-generate", "--prompt-tokens"), ("m3-convert", "export")])
def test_help_is_quick(command: str, word: str) -> None:
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        arguments = [str(Path(sys.executable).with_name(command)), "--help"]
        done = subprocess.run(arguments, capture_output=True, text=True, check=True)
        seconds.append(time.perf_counter() - start)
        assert word in done.stdout
    assert min(seconds) < 1


@pytest.mark.parametrize("module", ["m3_jax.cli", "checkpoints_convert.cli"])
def test_nothing_heavy_is_imported_at_import(module: str) -> None:
    code = f"import sys, {module}; print(*{{name.split('.')[0] for name in sys.modules}})"
    names = set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())
    assert "click" in names
    assert not names & {"jax", "jaxlib", "numpy", "flax", "orbax", "tokenizers", "jinja2", "safetensors", "rich"}


def test_text_in_text_out() -> None:
    result = run("--prompt", PROMPT, *new_tokens())
    assert (result.exit_code, result.stdout, result.stderr) == (0, SHORT["text"] + "\n", "")


def test_standard_input_is_taken_as_it_is() -> None:
    assert run("-", *new_tokens(), stdin=PROMPT).stdout == SHORT["text"] + "\n"
    text = Text.open(TINY)
    assert text is not None
    assert run_json("-", *new_tokens(1), stdin=PROMPT + "\n")["prompt_tokens"] == len(text.encode(PROMPT + "\n"))


def test_tokens_in_text_out(tmp_path: Path) -> None:
    file = tmp_path / "ids.txt"
    file.write_text(json.dumps(SHORT["prompt"]))
    assert run("--prompt-tokens", str(file), *new_tokens()).stdout == SHORT["text"] + "\n"


def test_json() -> None:
    result = run_json("--prompt", PROMPT, *new_tokens())
    logprobs = result.pop("logprobs")
    assert result == {
        "prompt_tokens": len(SHORT["prompt"]),
        "tokens": SHORT["tokens"],
        "text": SHORT["text"],
        "finish_reason": "length",
    }
    assert len(logprobs) == len(SHORT["tokens"])
    assert all(-20 < value <= 0 for value in logprobs)


def test_without_a_tokenizer_ids_go_in_and_out(bare: Path, tmp_path: Path) -> None:
    ids = " ".join(map(str, SHORT["prompt"]))
    expected = " ".join(map(str, SHORT["tokens"])) + "\n"
    (tmp_path / "ids.txt").write_text(ids)
    assert run("--prompt-tokens", str(tmp_path / "ids.txt"), *new_tokens(), checkpoint=bare).stdout == expected
    assert run("-", *new_tokens(), stdin=ids, checkpoint=bare).stdout == expected
    result = run_json("-", *new_tokens(), stdin=ids, checkpoint=bare)
    assert (result["tokens"], result["text"]) == (SHORT["tokens"], None)
    fails(run("--prompt", "text", checkpoint=bare), "has no tokenizer.json")
    fails(run("--chat", "-", stdin="text", checkpoint=bare), "has no tokenizer.json")
    fails(run("-", stdin="1 two", checkpoint=bare), "standard input: 'two' is not a token id")


def test_chat_uses_the_template() -> None:
    text = Text.open(TINY)
    assert text is not None
    ids = text.encode_chat([{"role": "user", "content": PROMPT}])
    assert len(ids) > len(SHORT["prompt"])
    chatted = run_json("--chat", "--prompt", PROMPT, *new_tokens(8))
    assert chatted["prompt_tokens"] == len(ids)
    assert chatted == run_json("--chat", "-", *new_tokens(8), stdin=PROMPT)
    assert chatted["tokens"] != SHORT["tokens"][:8]


def test_chat_without_a_template(copy: Path) -> None:
    (copy / "chat_template.jinja").unlink()
    fails(run("--chat", "--prompt", "x", checkpoint=copy), "no chat template")


def test_it_stops_at_the_end_of_text(copy: Path) -> None:
    stop = SHORT["tokens"][5]
    first = SHORT["tokens"].index(stop)
    (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": [stop, 0]}))
    result = run_json("--prompt", PROMPT, *new_tokens(), checkpoint=copy)
    assert result["tokens"] == SHORT["tokens"][: first + 1]
    assert result["finish_reason"] == "stop"
    # Without generation_config.json the config's own end-of-text token counts.
    (copy / "generation_config.json").unlink()
    config = json.loads((copy / "config.json").read_text())
    config["text_config"]["eos_token_id"] = stop
    (copy / "config.json").write_text(json.dumps(config))
    assert run_json("--prompt", PROMPT, *new_tokens(), checkpoint=copy) == result


def test_sampling_follows_its_seed() -> None:
    arguments = ("--prompt", PROMPT, *new_tokens(16), "--temperature", "1.5", "--top-k", "40", "--top-p", "0.9")
    first = run_json(*arguments, "--seed", "7")
    assert run_json(*arguments, "--seed", "7") == first
    assert run_json(*arguments, "--seed", "8")["tokens"] != first["tokens"]
    streamed = run(*arguments, "--seed", "7")
    assert streamed.stdout == first["text"] + "\n"
    # One token is all that a top-k of 1 leaves, whatever the temperature.
    cold = run_json("--prompt", PROMPT, *new_tokens(16), "--temperature", "1.5", "--top-k", "1")
    assert cold["tokens"] == SHORT["tokens"][:16]
    assert run_json("--prompt", PROMPT, *new_tokens(16), "--temperature", "9", "--min-p", "1") == cold


def run_random(*arguments: str, stdin: str = "5 6 7 8", config: str = "tiny") -> Result:
    """With random weights, from token ids on standard input."""
    arguments = ("--random-weights", config, *arguments, *new_tokens(6), "-")
    return CliRunner().invoke(main, arguments, input=stdin, catch_exceptions=False)


def test_random_weights(tmp_path: Path) -> None:
    expected = run_random()
    assert (expected.exit_code, expected.stderr) == (0, "")
    assert 1 <= len(expected.stdout.split()) <= 6
    assert run_random("--weights-seed", "0", "--dtype", "bfloat16").stdout == expected.stdout
    assert run_random("--weights-seed", "1").stdout != expected.stdout
    (tmp_path / "ids").write_text("5 6 7 8")
    arguments = ["--random-weights", "tiny", "--prompt-tokens", str(tmp_path / "ids"), *new_tokens(6), "--json"]
    result = json.loads(CliRunner().invoke(main, arguments, catch_exceptions=False).stdout)
    assert " ".join(map(str, result["tokens"])) + "\n" == expected.stdout
    (tmp_path / "small.json").write_text(json.dumps(M3Config.tiny().to_hf()))
    assert run_random(config=str(tmp_path / "small.json")).stdout == expected.stdout
    fails(run_random(config="m4"), "config 'm4': must be m3, tiny or the path of a config.json")
    (tmp_path / "small.json").write_text("{}")
    fails(run_random(config=str(tmp_path / "small.json")), "small.json: ")


def test_a_mesh() -> None:
    expected = run_json("--prompt", PROMPT, *new_tokens())
    result = run_json("--prompt", PROMPT, *new_tokens(), "--mesh", "expert=1, tensor=2")
    assert result["tokens"] == expected["tokens"]
    assert result["logprobs"] == pytest.approx(expected["logprobs"], abs=1e-4)
    fails(run("--prompt", PROMPT, "--mesh", "tensor=4,data=64"), "needs 256 devices, there are")
    fails(run("--prompt", PROMPT, "--mesh", "tensor=7"), "over the 7 devices of mesh axis 'tensor'")


def test_the_axes_of_a_mesh() -> None:
    assert parse_mesh("tensor=4,data=2") == {"data": 2, "expert": 1, "tensor": 4}
    assert parse_mesh(" data = 2 , tensor=4") == parse_mesh("tensor=4,data=2,expert=1")
    assert tuple(parse_mesh("expert=8")) == AXES == MESH_AXES


@pytest.mark.parametrize(
    ("mesh", "words"),
    [
        ("tensor", "entry 'tensor': must be one of data, expert, tensor, an equals sign and a number of devices"),
        ("tensors=2", "entry 'tensors=2': must be one of data, expert, tensor"),
        ("tensor=2,tensor=4", "entry 'tensor=4': tensor is there twice"),
        ("tensor=0", "entry 'tensor=0': the number of devices must be an integer of at least 1"),
        ("tensor=2,data=x", "entry 'data=x': the number"),
        ("tensor=2,", "mesh 'tensor=2,': entry '': must be one of"),
    ],
)
def test_meshes_that_are_none(mesh: str, words: str) -> None:
    result = run("--prompt", "x", "--mesh", mesh)
    assert result.exit_code == 2
    assert words in " ".join(result.stderr.split())


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("--prompt", "x", "-"),
        ("--prompt", "x", "--prompt-tokens", "f"),
        ("--chat", "--prompt-tokens", "f"),
        ("--prompt", "x", "--top-k", "5"),
        ("--prompt", "x", "--temperature", "-1"),
        ("--prompt", "x", "--temperature", "1", "--top-p", "0"),
        ("--prompt", "x", "--max-new-tokens", "0"),
        ("--prompt", "x", "--seed", "-1"),
        ("--prompt", "x", "--dtype", "int8"),
        ("elsewhere",),
        ("--random-weights", "tiny", "-"),
        ("--prompt", "x", "--weights-seed", "1"),
        ("--prompt", "x", "--num-processes", "2", "--process-id", "0"),
        ("--prompt", "x", "--coordinator", "host:1", "--num-processes", "2"),
        ("--prompt", "x", "--coordinator", "auto", "--num-processes", "2", "--process-id", "0"),
    ],
)
def test_usage_errors(arguments: tuple[str, ...]) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "Error: " in result.stderr


@pytest.mark.parametrize("arguments", [("-",), ("--random-weights", "tiny", "--prompt", "x")])
def test_usage_errors_of_random_weights(arguments: tuple[str, ...]) -> None:
    result = CliRunner().invoke(main, arguments, input="1 2", catch_exceptions=False)
    assert result.exit_code == 2
    assert "--random-weights" in result.stderr


def test_errors_are_one_line(copy: Path, tmp_path: Path) -> None:
    fails(run("--prompt", "x", checkpoint=tmp_path / "none"), "no such folder")
    fails(run("--prompt", ""), "prompts[0] is empty")
    fails(run("--prompt", "x", *new_tokens(100_000)), "max_position_embeddings")
    fails(run("--prompt-tokens", str(tmp_path / "none")), "No such file")
    fails(run("-", stdin=b"\xff\xfe"), "utf-8")
    file = tmp_path / "ids"
    file.write_text("1 2 4480")
    fails(run("--prompt-tokens", str(file)), "4480")
    (copy / "tokenizer.json").write_text("{")
    fails(run("--prompt", "x", checkpoint=copy), "tokenizer.json")


def test_a_broken_checkpoint_is_one_line(copy: Path) -> None:
    data = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(data[: len(data) // 2])
    fails(run("--prompt", "x", checkpoint=copy), "model.safetensors")
    (copy / "config.json").unlink()
    fails(run("--prompt", "x", checkpoint=copy), "config.json")


def test_the_command_streams_and_a_closed_pipe_is_quiet() -> None:
    """The installed command: text arrives before the end, and a reader that leaves is no error."""
    arguments = [COMMAND, "--checkpoint", str(TINY), "--prompt", PROMPT, "--dtype", "float32", *new_tokens(20_000)]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        start = os.read(process.stdout.fileno(), 1)
        assert start == SHORT["text"][:1].encode()
        assert process.poll() is None
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(timeout=120) == 0
