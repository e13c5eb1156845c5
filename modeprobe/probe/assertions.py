"""Assertions on the mode for test suites; each message is the probe's report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from modeprobe.probe.api import probe
from modeprobe.probe.instrument import flag_of
from modeprobe.probe.report import Report


def assert_mode_invariant(model: nn.Module, *args: Any, **kwargs: Any) -> Report:
    """train() and eval() give the same outputs. Arguments are those of `modeprobe.probe`.

    Raises:
        AssertionError: they do not, or the model could not be run.
    """
    report = probe(model, *args, **{"progress": False, **kwargs})
    if report.effect != "none" or report.generation_same is False:
        raise AssertionError(f"the model depends on its mode\n{report}")
    return report


def assert_eval_deterministic(model: nn.Module, *args: Any, **kwargs: Any) -> Report:
    """Outputs in eval mode do not depend on random numbers. Arguments are those of `modeprobe.probe`.

    Raises:
        AssertionError: they do, or the model does not run in eval mode.
    """
    report = probe(model, *args, **{"progress": False, **kwargs})
    if report.eval_is_random or any(failure.mode == "eval" for failure in report.failures):
        raise AssertionError(f"the model is not deterministic in eval mode\n{report}")
    return report


def assert_modes(model: nn.Module, training: bool, except_for: Mapping[str, bool] | None = None) -> None:
    """Every module is in the given mode, with exceptions by module path (which include what is below them).

    Args:
        training: the mode expected of every module.
        except_for: expected mode by path, such as `{"backbone.bn1": False}` for a frozen layer. The longest
            matching path counts.

    Raises:
        AssertionError: lists the modules in another mode.
        ValueError: a path in `except_for` names no module.
    """
    exceptions = dict(except_for or {})
    modules = dict(model.named_modules())
    unknown = [path for path in exceptions if path not in modules]
    if unknown:
        raise ValueError(f"except_for: no module {unknown[0]!r} in this model")

    def expected(name: str) -> bool:
        above = [path for path in exceptions if name == path or name.startswith(path + ".") or not path]
        return exceptions[max(above, key=len)] if above else training

    wrong = [name for name, module in modules.items() if flag_of(module) is not expected(name)]
    if wrong:
        word = {True: "train", False: "eval"}
        listed = "\n".join(f"  {name or '(root)'}: in {word[not expected(name)]} mode" for name in wrong[:20])
        more = f"\n  ... and {len(wrong) - 20} more" if len(wrong) > 20 else ""
        raise AssertionError(f"{len(wrong)} modules are not in the expected mode\n{listed}{more}")
