"""What Nsight Compute prints, as a table; the standard library is all that it needs."""

from __future__ import annotations

import csv
import re

# ncu's names, and the columns of profile.md.
METRICS = {
    "gpu__time_duration.sum": "us",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "DRAM %",
    "smsp__issue_active.avg.pct_of_peak_sustained_active": "issue slots %",
    "sm__inst_executed_pipe_alu.avg.pct_of_peak_sustained_active": "ALU %",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "occupancy %",
    "launch__registers_per_thread": "registers",
    "launch__grid_size": "blocks",
}
SCALES = {"nsecond": 1e-3, "ns": 1e-3, "usecond": 1.0, "us": 1.0, "msecond": 1e3, "ms": 1e3}


def table(log: str) -> list[str]:
    """ncu's raw page as a Markdown table, in the order of the launches."""
    rows = [line for line in log.splitlines() if line.startswith('"')]
    units: dict[str, str] = {}
    lines = []
    for row in csv.DictReader(rows):
        if not row.get("ID"):
            units = row
            continue
        cells = [re.sub(r"\(.*", "", row["Kernel Name"]).removeprefix("void ").replace("modeprobe::", "")]
        for name in METRICS:
            value = float((row.get(name) or "nan").replace(",", ""))
            cells.append(f"{value * SCALES.get(units.get(name, ''), 1.0):.4g}")
        lines.append("| " + " | ".join(cells) + " |")
    header = ["kernel", *METRICS.values()]
    return ["| " + " | ".join(header) + " |", "|---" * len(header) + "|", *lines] if lines else []
