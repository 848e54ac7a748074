"""Which implementation runs, and what is said of the others."""

import subprocess
import sys
import types

import pytest

from pallas_kernels.all_reduce.api import OPERATIONS as SUM
from pallas_kernels.dispatch import Implementation, Operation
from pallas_kernels.index_sparse_attention.api import OPERATIONS as BOTH
from pallas_kernels.index_topk.api import OPERATIONS as INDEX
from pallas_kernels.norm_rope_cache.api import OPERATIONS as NORM_ROPE
from pallas_kernels.paged_attention.api import OPERATIONS as PAGED
from pallas_kernels.sparse_attention.api import OPERATIONS as ATTENTION

ALL = {**SUM, **INDEX, **BOTH, **ATTENTION, **PAGED, **NORM_ROPE}


@pytest.fixture
def operation(monkeypatch) -> Operation:
    """Three implementations of "scale": the first serves no x above 2, the second none below 0."""

    def refuse_large(x, *, factor):
        return f"x={x} must be at most 2" if x > 2 else None

    def refuse_negative(x, *, factor):
        return f"x={x} must be at least 0" if x < 0 else None

    def refuse_all(x, *, factor):
        return "it needs a device"

    for name, supported in (("small", refuse_large), ("natural", refuse_negative), ("device", refuse_all)):
        module = types.ModuleType(f"fake_{name}")
        run = lambda x, *, factor, name=name: (name, x * factor)  # noqa: E731
        setattr(module, "scale", Implementation(supported, run))  # noqa: B010
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return Operation("scale", {name: f"fake_{name}" for name in ("small", "natural", "device")})


def test_the_first_that_is_supported_runs(operation: Operation):
    assert operation(1, factor=10) == ("small", 10)
    assert operation(3, factor=10) == ("natural", 30)
    assert operation(-1, factor=10) == ("small", -10)


def test_the_declared_order_decides(operation: Operation):
    turned = Operation("scale", {name: f"fake_{name}" for name in ("device", "natural", "small")})
    assert turned(1, factor=10) == ("natural", 10)


def test_a_named_one_runs(operation: Operation):
    assert operation(1, factor=10, impl="natural") == ("natural", 10)


def test_a_named_one_gives_its_reason_and_nothing_else_runs(operation: Operation):
    with pytest.raises(NotImplementedError, match=r"scale: impl='small' is not supported.*x=3 must be at most 2"):
        operation(3, factor=10, impl="small")


def test_an_unknown_name_lists_the_names(operation: Operation):
    with pytest.raises(ValueError, match=r"scale: impl='fast' must be None or one of small, natural, device"):
        operation(1, factor=10, impl="fast")
    with pytest.raises(ValueError, match=r"impl='fast'"):
        operation.why_not("fast", 1, factor=10)


def test_none_supported_gives_every_reason(operation: Operation):
    alone = Operation("scale", {"small": "fake_small", "device": "fake_device"})
    with pytest.raises(NotImplementedError, match=r"small: x=3 must be at most 2; device: it needs a device"):
        alone(3, factor=10)


def test_why_not(operation: Operation):
    reasons = {name: operation.why_not(name, 3, factor=10) for name in operation.modules}
    assert reasons == {"small": "x=3 must be at most 2", "natural": None, "device": "it needs a device"}


def test_a_missing_dependency_is_a_reason(operation: Operation, tmp_path, monkeypatch):
    (tmp_path / "fake_optional.py").write_text("import a_package_that_nobody_has.part\n")
    monkeypatch.syspath_prepend(tmp_path)
    with_optional = Operation("scale", {"optional": "fake_optional", **operation.modules})
    assert with_optional(1, factor=10) == ("small", 10)
    reason = "it needs the package 'a_package_that_nobody_has', which is not installed"
    assert with_optional.why_not("optional", 1, factor=10) == reason
    with pytest.raises(NotImplementedError, match=reason):
        with_optional(1, factor=10, impl="optional")


def test_a_module_of_our_own_that_is_missing_is_an_error(operation: Operation):
    broken = Operation("scale", {"broken": "pallas_kernels.no_such_module", **operation.modules})
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        broken(1, factor=10)


def test_an_error_while_running_falls_back_on_nothing(operation: Operation):
    with pytest.raises(TypeError, match="unsupported operand"):
        operation(1, factor=None)


@pytest.mark.parametrize("name", ALL)
def test_every_declared_implementation_is_there(name: str):
    """Where its dependencies are: `why_not` is asked of arguments, `_find` of the module alone."""
    operation = ALL[name]
    assert operation.name == name
    assert list(operation.modules)[-1] == "reference"
    for impl in operation.modules:
        assert isinstance(operation._find(impl), Implementation | str)
    assert isinstance(operation._find("reference"), Implementation)


def test_implementations_are_imported_on_first_use():
    modules = sorted({module for operation in ALL.values() for module in operation.modules.values()})
    program = f"import sys, pallas_kernels; print([m for m in {modules!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
