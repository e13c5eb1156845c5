"""A report as plain text."""

from __future__ import annotations

from modeprobe.probe.report import Report


def to_text(report: Report) -> str:
    lines = [report.verdict]
    for site in report.sites:
        p = "" if site.p is None else f" p={site.p:g}"
        lines.append(f"  {site.path or '(root)'}: {site.what}{p} [{site.cause}] {site.file}:{site.line}")
    return "\n".join(lines)
