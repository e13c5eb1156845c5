"""`import modeprobe` must stay about as cheap as `import torch`."""

import re
import subprocess
import sys

import pytest

pytestmark = pytest.mark.rung("reference")

HEAVY = {
    "IPython",
    "hypothesis",
    "jinja2",
    "matplotlib",
    "pandas",
    "pytest",
    "rich",
    "scipy",
    "sklearn",
    "transformers",
    "triton",
    "typer",
}


def run(*arguments):
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done


def loaded_by(statement):
    listing = run("-c", f"{statement}\nimport sys\nprint('\\n'.join(sys.modules))").stdout
    return set(listing.split())


def test_no_heavy_module_comes_along():
    added = loaded_by("import modeprobe") - loaded_by("import torch")
    assert not {name.split(".")[0] for name in added} & HEAVY
    foreign = {name for name in added if name.split(".")[0] != "modeprobe"}
    # What torch alone does not load; a handful of the standard library's modules would be fine.
    assert len(foreign) <= 10, sorted(foreign)


def test_import_costs_at_most_a_tenth_more_than_torch():
    """Self times of one and the same process, so that the machine's load bears on both sides."""
    log = run("-X", "importtime", "-c", "import modeprobe").stderr
    rows = re.findall(r"import time:\s+(\d+) \|\s+(\d+) \| ( *)(\S+)", log)
    own, whole = {}, {}
    for self_time, cumulative, _, name in rows:
        own[name], whole[name] = int(self_time), int(cumulative)
    extra = whole["modeprobe"] - whole["torch"]
    assert extra <= 0.1 * whole["torch"], {name: time for name, time in own.items() if "modeprobe" in name}
