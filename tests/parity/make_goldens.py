"""Makes tests/parity/goldens/parity.npz. Run from the repository with M3_TRANSFORMERS_PYTHON set:

M3_TRANSFORMERS_PYTHON=/path/to/python python tests/parity/make_goldens.py
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import parity_cases
import parity_reference


def main() -> None:
    """The command line."""
    if parity_reference.interpreter() is None:
        sys.exit(f"set {parity_reference.INTERPRETER} to a python with torch and transformers 5.23")
    cases = parity_cases.cases()
    with tempfile.TemporaryDirectory() as folder:
        answers = parity_reference.run_reference(cases, Path(folder))
    parity_reference.write_goldens(cases, answers)
    print(f"{parity_reference.GOLDENS}: {parity_reference.GOLDENS.stat().st_size} bytes, {len(cases)} cases")


if __name__ == "__main__":
    main()
