"""Number types by the name that safetensors gives them, and casts between them."""

import ml_dtypes
import numpy as np

# Bytes of an element: every type whose elements are whole bytes, so that a header can be checked whatever it holds.
ITEMSIZE = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0"), 1),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 2),
    **dict.fromkeys(("I32", "U32", "F32"), 4),
    **dict.fromkeys(("I64", "U64", "F64"), 8),
}
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
FLOAT16 = np.dtype(np.float16)
FLOAT32 = np.dtype(np.float32)
# The types a weight may have in either layout.
WEIGHT_DTYPES = {"BF16": BFLOAT16, "F16": FLOAT16, "F32": FLOAT32}
SAFETENSORS_NAMES = {dtype.name: name for name, dtype in WEIGHT_DTYPES.items()}


def cast(values: np.ndarray, out: np.ndarray) -> None:
    """Writes `values` into `out` of the same shape in out's dtype, to nearest even; too large becomes infinite."""
    with np.errstate(over="ignore", invalid="ignore"):
        out[...] = values
