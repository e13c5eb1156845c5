"""Which rungs of the evidence ladder a test run climbed, and why not the others: its last lines say it."""

from __future__ import annotations

from collections import Counter, defaultdict

import pytest

RUNGS = {
    "reference": "plain torch and CPU kernels against float64",
    "triton": "Triton kernels interpreted, and compiled ahead of time",
    "emulator": "CUDA kernels executed on the CPU",
    "compiler": "registers, accesses and symbols from the compilers' output",
    "gpu": "kernels on a GPU",
}


class Ladder:
    """Counts outcomes per rung; a pytest plugin."""

    def __init__(self) -> None:
        self.outcomes: dict[str, Counter[str]] = defaultdict(Counter)
        self.reasons: dict[str, Counter[str]] = defaultdict(Counter)

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_makereport(self, item, call):
        report = (yield).get_result()
        mark = item.get_closest_marker("rung")
        if mark:
            report.user_properties.append(("rung", mark.args[0]))

    def pytest_runtest_logreport(self, report) -> None:
        rung = dict(report.user_properties).get("rung")
        if rung is None or (report.when != "call" and report.passed):
            return
        self.outcomes[rung][report.outcome] += 1
        if report.skipped:
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
            self.reasons[rung][reason.removeprefix("Skipped: ")] += 1

    def lines(self) -> list[str]:
        found = []
        for rung, what in RUNGS.items():
            counts = self.outcomes[rung]
            ran = counts["passed"] + counts["failed"]
            if not counts:
                verdict = "not selected"
            elif not ran:
                verdict = "SKIPPED"
            elif counts["failed"]:
                verdict = f"{counts['failed']} of {ran} FAILED"
            else:
                verdict = f"{ran} passed"
            found.append(f"{rung:<10} {verdict:<16} {what}")
            found += [
                f"{'':<10} {times} skipped: {reason}" for reason, times in self.reasons[rung].most_common()
            ]
        return found

    @pytest.hookimpl(trylast=True)
    def pytest_terminal_summary(self, terminalreporter) -> None:
        if not any(self.outcomes.values()):
            return
        terminalreporter.section("evidence ladder")
        for line in self.lines():
            terminalreporter.write_line(line)
