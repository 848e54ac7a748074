"""From the released layout to this project's, part by part."""

import functools
import json
from pathlib import Path

import numpy as np

from checkpoints_convert.progress import progress_bar
from m3_jax.checkpoint.dtypes import BFLOAT16, FLOAT32
from m3_jax.checkpoint.errors import CheckpointError, unreadable
from m3_jax.checkpoint.folder import CONFIG, SIDE_FILES, existing_folder, regular_file
from m3_jax.checkpoint.huggingface import HuggingFaceCheckpoint
from m3_jax.checkpoint.names import Part
from m3_jax.checkpoint.open import is_orbax
from m3_jax.checkpoint.orbax_parts import LazyArray, remove_unfinished, write_part
from m3_jax.checkpoint.partial import Partial, check_space, copy_file, partial_of, write_file
from m3_jax.checkpoint.store import MANIFEST, PARTS, OrbaxCheckpoint, manifest_of, weight_bytes

KEEP = "keep"
DTYPES = {"bfloat16": BFLOAT16, "float32": FLOAT32}
# Beside the weights: manifest, metadata of the arrays, tokenizer.
SPARE_BYTES = 64 << 20


def convert(src: Path, dst: Path, dtype: str = KEEP) -> HuggingFaceCheckpoint:
    """Converts the folder `src` into `dst`, which must not exist; run again after a stop, it goes on where it was.

    A stop may come when all is done: where `dst` is this very conversion, there is nothing left to do.

    Args:
      src: a folder in the released layout.
      dst: where the checkpoint is to be. Until it is whole, there is only dst.partial.
      dtype: "bfloat16" or "float32" for all weights but the router and the patch embedding, which a cast leaves in
        float32; "keep" for each weight's own, bfloat16 where the source is quantised.

    Returns the source. Everything that headers can tell is checked before anything is written. Raises
    `CheckpointError`.
    """
    folder = existing_folder(src)
    if is_orbax(folder):
        raise CheckpointError(f"{folder}: is converted already; a folder in the released layout is needed")
    source = HuggingFaceCheckpoint(folder)
    dtypes = _target_dtypes(source, dtype)
    origin = {"dtype": dtype, "fingerprint": source.fingerprint()}
    if _is_done(dst, origin):
        return source
    with partial_of(dst.absolute()) as partial:
        state = {"command": "convert", "source": str(folder), **origin}
        if partial.resumed is not None:
            _check_same(partial, state)
        try:
            partial.begin(state)
            _write(source, dtypes, partial, origin)
        except (CheckpointError, OSError) as error:
            if isinstance(error, OSError):
                error = unreadable(partial.path, error)
            finished = _finished(partial.path, source.parts)
            if not finished:
                partial.discard()
                raise error from None
            raise CheckpointError(
                f"{error}; {len(finished)} of {len(source.parts)} parts are kept in {partial.path}, "
                "the same command goes on from there"
            ) from error
    return source


def _is_done(dst: Path, origin: dict[str, str]) -> bool:
    try:
        return dst.is_dir() and is_orbax(dst) and OrbaxCheckpoint(dst).origin == origin
    except CheckpointError:
        return False


def _target_dtypes(source: HuggingFaceCheckpoint, dtype: str) -> dict[str, np.dtype]:
    if dtype == KEEP:
        return source.dtypes
    if dtype not in DTYPES:
        raise CheckpointError(f"dtype={dtype!r}: must be one of {', '.join([*DTYPES, KEEP])}")
    return {w.path: FLOAT32 if w.float32 else DTYPES[dtype] for part in source.parts for w in part.weights}


def _check_same(partial: Partial, state: dict[str, str]) -> None:
    old = partial.resumed
    if old == state:
        return
    assert old is not None
    if old.get("command") != state["command"]:
        raise CheckpointError(f"{partial.path}: left by m3-convert {old.get('command')}; finish that or remove it")
    same_files = old.get("source") != state["source"] or old.get("fingerprint") == state["fingerprint"]
    changed = "" if same_files else " (whose files have changed since)"
    raise CheckpointError(
        f"{partial.path}: begun from {old.get('source')}{changed} with --dtype {old.get('dtype')}, "
        f"this is {state['source']} with --dtype {state['dtype']}; finish that one or remove the folder"
    )


def _finished(path: Path, parts: list[Part]) -> list[Part]:
    """The parts that are there: Orbax names a part when it is whole."""
    return [part for part in parts if (path / PARTS / part.name).is_dir()]


def _write(
    source: HuggingFaceCheckpoint, dtypes: dict[str, np.dtype], partial: Partial, origin: dict[str, str]
) -> None:
    folder = partial.path / PARTS
    folder.mkdir(exist_ok=True)
    remove_unfinished(folder)
    sizes = {part.name: sum(weight_bytes(w, dtypes[w.path]) for w in part.weights) for part in source.parts}
    finished = {part.name for part in _finished(partial.path, source.parts)}
    done = sum(sizes[name] for name in finished)
    total = sum(sizes.values())
    check_space(partial.path, total - done + SPARE_BYTES)
    write_config(source.raw_config, partial.path, None if origin["dtype"] == KEEP else origin["dtype"])
    copy_side_files(source.folder, partial.path)
    with progress_bar("convert", total, done) as advance:
        for part in source.parts:
            if part.name not in finished:
                arrays = {
                    w.path: LazyArray(w.shape, dtypes[w.path], functools.partial(source.read, w)) for w in part.weights
                }
                write_part(folder / part.name, arrays, advance)
    write_file(partial.path / MANIFEST, manifest_of(source.parts, dtypes, origin))
    partial.commit()


def write_config(raw: dict, target: Path, dtype: str | None) -> None:
    """config.json without quantization_config, which no written weight has, and with `dtype` where it names one."""
    config = {key: value for key, value in raw.items() if key != "quantization_config"}
    if dtype is not None:
        for section in (config, config.get("text_config")):
            for key in ("dtype", "torch_dtype"):
                if isinstance(section, dict) and key in section:
                    section[key] = dtype
    write_file(target / CONFIG, (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode())


def copy_side_files(source: Path, target: Path) -> None:
    """Copies the tokenizer's and processor's files that are there."""
    for name in SIDE_FILES:
        if (source / name).exists():
            copy_file(regular_file(source, name), target / name)
