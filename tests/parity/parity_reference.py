"""What transformers says of the parity cases: computed on the spot, or read from the stored goldens."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import parity_checkpoint

HERE = Path(__file__).parent
GOLDENS = HERE / "goldens" / "parity.npz"
INTERPRETER = "M3_TRANSFORMERS_PYTHON"
GOLDEN_ROWS = 16


@dataclasses.dataclass(frozen=True)
class Answer:
    """transformers' answer to one case.

    Attributes:
      logits: of each prompt that the case lists in `logits_of`: positions [R] and float32 logits [R, V] there.
      tokens: int32 [prompts, new tokens], greedy continuations.
      margins: float32 [prompts, new tokens], largest logit less the second largest at each step.
      ablations: how far the logits move, as a fraction of the largest, without a part of the model.
    """

    logits: dict[int, tuple[np.ndarray, np.ndarray]]
    tokens: np.ndarray
    margins: np.ndarray
    ablations: dict[str, float]


@dataclasses.dataclass(frozen=True)
class Reference:
    """transformers' answers and the checkpoints that they were computed from."""

    folder: Path
    answers: dict[str, Answer]
    live: bool

    def checkpoint(self, case: dict[str, Any]) -> Path:
        """Hugging Face folder of a case: transformers' own, or drawn again from the same stream."""
        folder = self.folder / case["name"] / "checkpoint"
        if not folder.exists():
            assert not self.live
            parity_checkpoint.write_checkpoint(folder, case)
        return folder


def interpreter() -> str | None:
    """The interpreter with torch and transformers, if the environment names one."""
    return os.environ.get(INTERPRETER) or None


def run_reference(cases: list[dict[str, Any]], out: Path) -> dict[str, Answer]:
    """Runs transformers on `cases`; checkpoints that `save_pretrained` wrote are left in out/NAME/checkpoint.

    Raises RuntimeError with the end of its output when the interpreter that the environment names does not work.
    """
    python = interpreter()
    assert python is not None
    out.mkdir(parents=True, exist_ok=True)
    (out / "cases.json").write_text(json.dumps(cases))
    run_script(python, HERE / "transformers_reference.py", str(out / "cases.json"), str(out))
    return {case["name"]: _read_answer(out / case["name"] / "result.npz") for case in cases}


def run_script(python: str, script: Path, *arguments: str) -> str:
    """Runs a script in another interpreter and gives its standard output; RuntimeError where it fails."""
    try:
        done = subprocess.run(
            [python, str(script), *arguments], capture_output=True, text=True, check=False, timeout=500
        )
    except OSError as error:
        raise RuntimeError(f"{INTERPRETER}={python!r} cannot be run: {error}") from error
    if done.returncode:
        raise RuntimeError(f"{INTERPRETER}={python!r}: {script.name} failed:\n{done.stderr[-4000:]}")
    return done.stdout


def _read_answer(path: Path) -> Answer:
    with np.load(path) as arrays:
        whole = {int(key[7:]): arrays[key] for key in arrays if key.startswith("logits_")}
        return Answer(
            logits={number: (np.arange(len(values)), values) for number, values in whole.items()},
            tokens=arrays["tokens"],
            margins=arrays["margins"],
            ablations={key[9:]: float(arrays[key]) for key in arrays if key.startswith("ablation_")},
        )


def golden_positions(case: dict[str, Any], number: int) -> np.ndarray:
    """The sorted positions of a prompt whose logits are stored: its end, and a draw from the rest."""
    length = len(case["prompts"][number])
    drawn = np.random.RandomState(case["seed"] + number).permutation(length - 1)[: GOLDEN_ROWS - 1]
    return np.sort(np.append(drawn, length - 1))


def digest(cases: list[dict[str, Any]]) -> str:
    """A fingerprint of the cases, so that goldens of other cases are not taken for theirs."""
    return hashlib.sha256(json.dumps(cases, sort_keys=True).encode()).hexdigest()


def write_goldens(cases: list[dict[str, Any]], answers: dict[str, Answer]) -> None:
    """Stores a sample of the answers."""
    arrays: dict[str, Any] = {"digest": np.array(digest(cases))}
    for case in cases:
        name, answer = case["name"], answers[case["name"]]
        for number, (_, values) in answer.logits.items():
            arrays[f"{name}/logits_{number}"] = values[golden_positions(case, number)]
        arrays[f"{name}/tokens"] = answer.tokens.astype(np.int16)
        arrays[f"{name}/margins"] = answer.margins
        for key, moved in answer.ablations.items():
            arrays[f"{name}/ablation_{key}"] = np.float32(moved)
    GOLDENS.parent.mkdir(exist_ok=True)
    np.savez_compressed(GOLDENS, **arrays)


def read_goldens(cases: list[dict[str, Any]]) -> dict[str, Answer]:
    """The stored answers; RuntimeError where they belong to other cases."""
    with np.load(GOLDENS) as arrays:
        if str(arrays["digest"]) != digest(cases):
            raise RuntimeError(f"{GOLDENS} belongs to other cases: run tests/parity/make_goldens.py")
        return {
            case["name"]: Answer(
                logits={
                    number: (golden_positions(case, number), arrays[f"{case['name']}/logits_{number}"])
                    for number in case["logits_of"]
                },
                tokens=arrays[f"{case['name']}/tokens"].astype(np.int32),
                margins=arrays[f"{case['name']}/margins"],
                ablations={
                    key.rpartition("ablation_")[2]: float(arrays[key])
                    for key in arrays
                    if key.startswith(f"{case['name']}/ablation_")
                },
            )
            for case in cases
        }
