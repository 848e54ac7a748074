from __future__ import annotations

import parity_cases
import parity_reference
import pytest


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> parity_reference.Reference:
    """Live where M3_TRANSFORMERS_PYTHON names an interpreter (a broken one is an error), else the goldens."""
    folder, cases = tmp_path_factory.mktemp("parity"), parity_cases.cases()
    if parity_reference.interpreter() is None:
        return parity_reference.Reference(folder, parity_reference.read_goldens(cases), live=False)
    return parity_reference.Reference(folder, parity_reference.run_reference(cases, folder), live=True)
