"""Which implementation of an operation runs, and why not the others.

An implementation of an operation is an attribute, named like the operation, of some module. It is an
`Implementation`: two functions of the operation's own signature (without `impl`), `supported`, which
returns None or the reason why not, and `run`. Both see tracers, so `supported` judges by shapes, dtypes,
options and devices, never by values.
"""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Implementation:
    """One way to compute an operation.

    supported: called with the operation's arguments, returns None, or the reason why it cannot serve them.
    run: called with the same arguments, returns the result.
    """

    supported: Callable[..., str | None]
    run: Callable[..., Any]


@dataclass(frozen=True)
class Operation:
    """A public operation and the implementations that may serve it.

    name: the public function's name, and the attribute looked up in an implementation's module.
    modules: implementation name -> module, in order of preference. A module is imported on first use.
    """

    name: str
    modules: Mapping[str, str]

    def why_not(self, impl: str, *args: Any, **kwargs: Any) -> str | None:
        """Return None when the implementation called `impl` can serve these arguments, else the reason.

        Raises ValueError for an unknown name.
        """
        found = self._find(impl)
        return found if isinstance(found, str) else found.supported(*args, **kwargs)

    def __call__(self, *args: Any, impl: str | None = None, **kwargs: Any) -> Any:
        """Run the implementation called `impl`; None takes the first that is supported, in declared order.

        Raises ValueError for an unknown name, NotImplementedError, with the reason, for a named
        implementation that cannot serve the arguments, and with every reason when none of them can.
        """
        if impl is not None:
            reason = self.why_not(impl, *args, **kwargs)
            if reason is not None:
                raise NotImplementedError(f"{self.name}: impl={impl!r} is not supported here: {reason}")
            return self._run(impl, *args, **kwargs)
        reasons = {}
        for name in self.modules:
            reasons[name] = self.why_not(name, *args, **kwargs)
            if reasons[name] is None:
                return self._run(name, *args, **kwargs)
        listing = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
        raise NotImplementedError(f"{self.name}: no implementation is supported here ({listing})")

    def _run(self, impl: str, *args: Any, **kwargs: Any) -> Any:
        found = self._find(impl)
        assert isinstance(found, Implementation)
        return found.run(*args, **kwargs)

    def _find(self, impl: str) -> Implementation | str:
        """The implementation, or the reason why its module cannot be imported."""
        if impl not in self.modules:
            raise ValueError(f"{self.name}: impl={impl!r} must be None or one of {', '.join(self.modules)}")
        try:
            module = importlib.import_module(self.modules[impl])
        except ModuleNotFoundError as error:
            # A module of our own that is missing is a mistake, not an optional dependency.
            missing = error.name or ""
            if not missing or missing.split(".")[0] == __package__:
                raise
            return f"it needs the package {missing!r}, which is not installed"
        return getattr(module, self.name)
