"""Killed, out of disk, two at once, too little memory: DST is whole or is not there."""

import dataclasses
import fcntl
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from releases import (
    config_with_vision,
    converted,
    m3_convert,
    random_tensors,
    read_release,
    refused,
    shapes,
    start,
    write_release,
)

from m3_jax import M3Config, load
from m3_jax.checkpoint import orbax_parts
from m3_jax.checkpoint.errors import CheckpointError

TINY = config_with_vision()
# About 160 MB in 10 parts of which the layers are alike.
WIDE = dataclasses.replace(
    TINY,
    num_hidden_layers=7,
    sparse_attention_layers=(True,) * 7,
    moe_layers=(True,) * 7,
    hidden_size=256,
    moe_intermediate_size=512,
    num_experts=28,
)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_release(tmp_path / "src", TINY, random_tensors(TINY))


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_release(tmp_path_factory.mktemp("wide") / "src", WIDE, random_tensors(WIDE), shards=2)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} if folder.exists() else set()


@pytest.mark.parametrize("seed", range(2))
def test_killed_at_random_points_and_run_again(wide: Path, tmp_path: Path, seed: int) -> None:
    rng, dst, partial = random.Random(seed), tmp_path / "dst", tmp_path / "dst.partial"
    interrupted = 0
    finished: set[str] = set()
    for _ in range(3):
        process = start("convert", wide, dst)
        deadline = time.monotonic() + 60
        # From here on, data is written.
        while names(partial / "parts") <= finished and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.25))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        if not partial.exists():
            break
        assert not dst.exists()
        interrupted += 1
        with pytest.raises(CheckpointError, match="an incomplete conversion or save; run the same m3-convert command"):
            load(partial)
        kept = {name for name in names(partial / "parts") if orbax_parts.UNFINISHED not in name}
        assert finished <= kept
        finished = kept
    assert interrupted, "the conversion was over before it could be killed"
    written = {name: (partial / "parts" / name).stat().st_ino for name in finished if partial.exists()}
    if not dst.exists():
        process = start("convert", wide, dst)
        output, errors = process.communicate(timeout=120)
        assert (process.returncode, output, errors) == (0, "", "")
    assert names(tmp_path) == {"dst"}
    for name, inode in written.items():
        assert (dst / "parts" / name).stat().st_ino == inode, f"{name} was there and was written again"
    assert not list(dst.glob(f"**/*{orbax_parts.UNFINISHED}*"))
    assert m3_convert("verify", wide, dst).exit_code == 0


class Died(BaseException):
    """The process ends here: no handler of errors may run on it."""


@pytest.mark.parametrize("step", range(13))
def test_death_between_any_two_steps(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Steps that change what is on disk: every part and every small file, the state, the manifest and the renaming."""
    from checkpoints_convert import convert
    from m3_jax.checkpoint import partial

    dst = tmp_path / "dst"
    count = 0

    def dies(function):
        def wrapper(*arguments, **keywords):
            nonlocal count
            count += 1
            if count > step:
                raise Died
            return function(*arguments, **keywords)

        return wrapper

    with monkeypatch.context() as patch:
        for module, name in (
            (convert, "write_part"),
            (convert, "write_file"),
            (convert, "copy_side_files"),
            (partial.Partial, "begin"),
            (partial, "sync_tree"),
            (partial.os, "rename"),
        ):
            patch.setattr(module, name, dies(getattr(module, name)))
        with pytest.raises(Died):
            convert.convert(source, dst)
    assert not dst.exists()
    converted(source, dst)
    assert m3_convert("verify", source, dst).exit_code == 0


def test_another_source_or_dtype_does_not_resume(source: Path, tmp_path: Path) -> None:
    partial = half_done(source, tmp_path)
    message = refused(m3_convert("convert", source, tmp_path / "dst", "--dtype", "float32"))
    assert f"begun from {source} with --dtype keep, this is {source} with --dtype float32" in message
    other = Path(shutil.copytree(source, tmp_path / "other"))
    message = refused(m3_convert("convert", other, tmp_path / "dst"))
    assert f"begun from {source} with --dtype keep, this is {other} with --dtype keep" in message
    os.utime(source / "model.safetensors", (1, 1))
    message = refused(m3_convert("convert", source, tmp_path / "dst"))
    assert f"begun from {source} (whose files have changed since)" in message
    assert names(partial / "parts") == {"embed", "layers.00000"}
    message = refused(m3_convert("export", converted(source, tmp_path / "whole"), tmp_path / "dst"))
    assert "left by m3-convert convert" in message


def half_done(source: Path, folder: Path) -> Path:
    """A conversion to folder/dst that stopped after two parts."""
    from checkpoints_convert import convert

    real, calls = convert.write_part, []

    def stops(*arguments):
        if len(calls) == 2:
            raise Died
        calls.append(arguments)
        real(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(convert, "write_part", stops)
        with pytest.raises(Died):
            convert.convert(source, folder / "dst")
    return folder / "dst.partial"


def test_two_at_once(source: Path, tmp_path: Path) -> None:
    (tmp_path / "dst.partial").mkdir()
    lock = os.open(tmp_path / "dst.partial", os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    assert "another process is writing to it" in refused(m3_convert("convert", source, tmp_path / "dst"))
    os.close(lock)
    converted(source, tmp_path / "dst")


def limited(limit: int, *arguments: object) -> tuple[int, str, str]:
    """Runs the command where no file can have more than `limit` bytes: the kernel refuses the write."""
    program = (
        f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))\n"
        "from checkpoints_convert.cli import main; main()"
    )
    command = [sys.executable, "-c", program, *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    return result.returncode, result.stdout, result.stderr


def test_the_disk_refuses_a_write(wide: Path, tmp_path: Path) -> None:
    code, output, errors = limited(1 << 20, "convert", wide, tmp_path / "dst")
    assert (code, output) == (1, "")
    assert errors.startswith("error: ")
    assert errors.count("\n") == 1
    assert "layers.00000: cannot write: File too large" in errors
    assert "1 of 10 parts are kept in" in errors
    assert names(tmp_path) == {"dst.partial"}
    assert names(tmp_path / "dst.partial" / "parts") == {"embed"}
    converted(wide, tmp_path / "dst")
    code, output, errors = limited(1 << 20, "export", tmp_path / "dst", tmp_path / "out")
    assert (code, output) == (1, "")
    assert errors.count("\n") == 1
    assert "File too large" in errors
    assert names(tmp_path) == {"dst"}


def test_nothing_is_left_where_no_part_was_finished(source: Path, tmp_path: Path) -> None:
    code, _, errors = limited(1 << 14, "convert", source, tmp_path / "dst")
    assert code == 1
    assert "embed: cannot write: File too large" in errors
    assert "are kept" not in errors
    assert names(tmp_path) == {"src"}


def test_a_full_disk(tmp_path: Path) -> None:
    """A file system of 4 MB, where one can be mounted."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", disk], capture_output=True)
    if mounted.returncode:
        pytest.skip("a tmpfs cannot be mounted here")
    try:
        config = dataclasses.replace(TINY, vocab_size=30_000)
        src = write_release(tmp_path / "src", config, random_tensors(config))
        assert "GB needed, 0.0 GB free on its disk" in refused(m3_convert("convert", src, disk / "dst"))
        assert names(disk) == set()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("checkpoints_convert.convert.check_space", lambda *_: None)
            message = refused(m3_convert("convert", src, disk / "dst"))
            assert "head: cannot write: No space left on device; 5 of 7 parts are kept" in message
        assert names(disk) == {"dst.partial"}
        assert not list(disk.glob(f"**/*{orbax_parts.UNFINISHED}*"))
        # With room made, the same command ends it.
        subprocess.run(["mount", "-o", "remount,size=200m", disk], check=True)
        converted(src, disk / "dst")
        assert m3_convert("verify", src, disk / "dst").exit_code == 0
    finally:
        subprocess.run(["umount", disk], check=True)


def test_too_little_space_is_seen_before(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dst = converted(source, tmp_path / "dst")
    usage = namedtuple("usage", "total used free")(10**9, 10**9 - 10**6, 10**6)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    assert "0.0 GB free on its disk" in refused(m3_convert("convert", source, tmp_path / "other"))
    assert "0.0 GB free on its disk" in refused(m3_convert("export", dst, tmp_path / "other"))
    assert names(tmp_path) == {"src", "dst"}


def test_a_source_that_shrinks_while_it_is_read(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error and not the signal of a memory map."""
    from checkpoints_convert import convert

    real = convert.check_space

    def shrinks(*arguments):
        os.truncate(source / "model.safetensors", 40_000)
        real(*arguments)

    monkeypatch.setattr(convert, "check_space", shrinks)
    message = refused(m3_convert("convert", source, tmp_path / "dst"))
    assert "model.safetensors: ends at byte 40000, inside tensor" in message


def test_a_failed_export_leaves_nothing_and_can_be_repeated(source: Path, tmp_path: Path) -> None:
    dst = converted(source, tmp_path / "dst")
    partial = tmp_path / "out.partial"
    partial.mkdir()
    (partial / "m3_partial.json").write_text(json.dumps({"command": "export", "source": "elsewhere"}))
    (partial / "model-00001-of-00099.safetensors").write_bytes(b"half")
    assert m3_convert("export", dst, tmp_path / "out").exit_code == 0
    assert names(tmp_path) == {"src", "dst", "out"}
    assert read_release(tmp_path / "out") == read_release(source)
    chunk = next((dst / "parts" / "layers.00001").glob("*q_proj*/c/*/*/*"))
    os.truncate(chunk, chunk.stat().st_size - 1)
    assert "layers.00001" in refused(m3_convert("export", dst, tmp_path / "again"))
    assert names(tmp_path) == {"src", "dst", "out"}


def peak_memory(program: str, *arguments: object) -> tuple[int, int]:
    """Largest resident memory of a Python program, and that before its last line, in bytes."""
    high_water = "next(int(l.split()[1]) << 10 for l in open('/proc/self/status') if l.startswith('VmHWM'))"
    *setup, work = program.strip().splitlines()
    lines = ["import sys", *setup, f"before = {high_water}", work, f"print(before, {high_water})"]
    command = [sys.executable, "-c", "\n".join(lines), *map(str, arguments)]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    before, peak = map(int, result.stdout.split())
    return peak, before


def test_memory(tmp_path: Path) -> None:
    """Converting takes the chunks in flight and no layer; loading takes the model and less than a layer beside it."""
    config = dataclasses.replace(
        M3Config.tiny(),
        hidden_size=512,
        num_hidden_layers=3,
        sparse_attention_layers=(True,) * 3,
        moe_layers=(False, True, True),
        moe_intermediate_size=1024,
        num_experts=160,
    )
    # Zeros, so that a sparse file does: 1 GB in layers of 503 MB.
    src = tmp_path / "src"
    empty = {
        name: np.zeros((0,), ml_dtypes.bfloat16 if "gate.weight" not in name else np.float32) for name in shapes(config)
    }
    write_release(src, config, empty)
    header, position = {}, 0
    for name, shape in shapes(config).items():
        end = position + 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header).encode()
    (src / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(src / "model.safetensors", 8 + len(text) + position)
    layer = 2 * 160 * 3 * 1024 * 512
    assert position > 2 * layer > 10**9

    peak, before = peak_memory(
        "from pathlib import Path\n"
        "from checkpoints_convert.convert import convert\n"
        "convert(Path(sys.argv[1]), Path(sys.argv[2]))",
        src,
        tmp_path / "dst",
    )
    assert peak - before < orbax_parts.IN_FLIGHT_BYTES + (150 << 20) < layer

    peak, before = peak_memory(
        "import jax\nfrom m3_jax.loading import load\nmodel = load(sys.argv[1])", tmp_path / "dst"
    )
    assert peak - before < position + layer
