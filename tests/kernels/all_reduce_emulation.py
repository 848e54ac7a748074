"""The kernel of `all_reduce` without a GPU: every lane of every device is a Python thread.

What `_emit` would make instructions of is computed at once, on the memory that its addresses mean. Stores of 16 bytes
come word by word in any order, and lanes stop now and then between what they send and what they wait for.
"""

import bisect
import ctypes
import functools
import random
import threading
import time
import types
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from pallas_kernels.all_reduce import mosaic_gpu, workspace

# Small, so that lanes are few.
THREADS, MAX_CTAS = 2, 4
BLOCK_BYTES = THREADS * workspace.VECTOR_BYTES
_RANGES: list[tuple[int, int]] = []
_HERE = threading.local()


def own(array: np.ndarray) -> int:
    """The array's address, which the emulated devices may use from now on."""
    bisect.insort(_RANGES, (array.ctypes.data, array.ctypes.data + array.nbytes))
    return array.ctypes.data


def emulate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes grids small and instructions NumPy's, until the test ends."""
    _RANGES.clear()
    sizes = {"THREADS": THREADS, "MAX_CTAS": MAX_CTAS, "BLOCK_BYTES": BLOCK_BYTES}
    for module in (mosaic_gpu, workspace):
        for name, value in (sizes | {"COUNTER_BYTES": MAX_CTAS * THREADS * 4}).items():
            monkeypatch.setattr(module, name, value)
    arith = types.SimpleNamespace(
        CmpIPredicate=types.SimpleNamespace(eq=None),
        addi=lambda a, b: a + b,
        muli=lambda a, b: a * b,
        andi=lambda a, b: a & b,
        shli=lambda a, b: (a << b) & 0xFFFFFFFF,
        cmpi=lambda _, a, b: a == b,
        select=lambda condition, a, b: a if condition else b,
        index_cast=lambda _, a: a,
        extui=lambda _, a: a,
        addf=lambda a, b: a + b,
        bitcast=lambda kind, a: np.uint32(a).view(np.float32) if kind == "f32" else int(a.view(np.uint32)),
    )
    gpu = types.SimpleNamespace(
        block_id=lambda _: _HERE.cta, thread_id=lambda _: _HERE.thread, Dimension=types.SimpleNamespace(x=None)
    )
    f32 = types.SimpleNamespace(F32Type=types.SimpleNamespace(get=lambda: "f32"))
    replaced = {"arith": arith, "gpu": gpu, "ir": f32, "ptx": _ptx, "_wait": _wait}
    replaced |= dict.fromkeys(("i32", "i64"), lambda: "int") | dict.fromkeys(("c32", "_c64"), lambda value: value)
    for name, value in replaced.items():
        monkeypatch.setattr(mosaic_gpu, name, value)


def run(
    addresses: Sequence[Sequence[tuple[int, int, int]]], calls: Sequence[dict[str, Any]], ctas: Sequence[int]
) -> None:
    """Every device's calls, one after another; `addresses[device][call]` are those of x, table and result."""

    def device(own_addresses: Sequence[tuple[int, int, int]]) -> None:
        for arguments, options, count in zip(own_addresses, calls, ctas, strict=True):

            def lane(cta: int, thread: int, arguments: Any = arguments, options: Any = options) -> None:
                _HERE.cta, _HERE.thread = cta, thread
                mosaic_gpu._emit(*arguments, **options)

            _all(functools.partial(lane, cta, thread) for cta in range(count) for thread in range(THREADS))

    _all(functools.partial(device, each) for each in addresses)


def _all(functions: Iterable[Callable[[], None]]) -> None:
    threads = [threading.Thread(target=function, daemon=True) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive(), "a device waits for ever"


def _word(address: int) -> Any:
    start, end = _RANGES[bisect.bisect_right(_RANGES, (address, 1 << 64)) - 1]
    assert start <= address < end, f"{address:#x} is nobody's"
    assert address % 4 == 0
    return ctypes.c_uint32.from_address(address)


def _read(address: int, words: int) -> list[int]:
    assert address % (4 * words) == 0
    return [_word(address + 4 * i).value for i in range(words)]


def _ptx(_results: Any, operands: Sequence[Any], text: str, _constraints: str) -> list[Any]:
    if text.startswith("ld.global.b64"):
        low, high = _read(operands[0] + int(text.split("+")[1].split("]")[0]), 2)
        return [low | high << 32]
    if text.startswith("ld.global"):
        return _read(operands[0], 4 if ".v4" in text else 1)
    if text.startswith("st"):
        address, *words = operands
        for i in random.sample(range(len(words)), len(words)):
            _word(address + 4 * i).value = words[i] & 0xFFFFFFFF
        return []
    if text.startswith("cvt.rn"):
        dtype = ml_dtypes.bfloat16 if "bf16" in text else np.float16
        high, low = (int(np.asarray(value).astype(dtype).view(np.uint16)) for value in operands)
        return [high << 16 | low]
    assert "cvt.f32.f16" in text
    return list(np.array(operands, np.uint32).view(np.float16).astype(np.float32))


def _wait(address: int, offsets: Sequence[int]) -> list[list[int]]:
    if random.random() < 0.1:
        time.sleep(random.random() * 0.005)
    while True:
        found = [_read(address + offset, 4) for offset in offsets]
        if all(word != workspace.EMPTY for words in found for word in words):
            return found
        time.sleep(0)
