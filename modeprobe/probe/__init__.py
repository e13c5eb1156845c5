"""The probe: what train() and eval() really change in a model, by measurement.

`modeprobe.probe(model, *inputs)` runs it and returns a report; see `help(modeprobe.probe.api.probe)`.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any


class _CallableModule(ModuleType):
    """The package is also the function, so `modeprobe.probe(...)` stays callable beside its modules."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        from modeprobe.probe.api import probe as run

        return run(*args, **kwargs)


sys.modules[__name__].__class__ = _CallableModule
probe = sys.modules[__name__]
