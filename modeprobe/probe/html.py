"""A report as one self-contained page: the sites, and the module tree coloured by what each part does."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from modeprobe.probe.report import Part, Report
from modeprobe.probe.text import HEADINGS, chance, facts, rows

# Role: what the legend says.
ROLES = {
    "module_dropout": "dropout module",
    "functional_dropout": "functional dropout",
    "attention_dropout": "dropout in attention",
    "stochastic_depth": "stochastic depth",
    "random_noise": "random noise",
    "batch_statistics": "batch statistics",
    "branch": "code behind the flag",
    "opaque": "could not be seen",
    "ungated": "random in eval mode too",
    "idle": "idle dropout",
    "reads": "reads its mode, no effect",
    "norm": "normalisation, no effect",
}
_EFFECT = frozenset(list(ROLES)[:9])


@dataclass
class Node:
    """A module in the tree. inside: effects below it; same: how many equal siblings it stands for."""

    part: Part
    name: str
    below: list[Node] = field(default_factory=list)
    inside: list[str] = field(default_factory=list)
    same: int = 1

    @property
    def shape(self) -> tuple:
        return (self.part.kind, self.part.role, self.part.training, tuple(node.shape for node in self.below))


def tree(parts: list[Part]) -> Node | None:
    """The module tree; runs of equal siblings (repeated layers) are folded into one."""
    nodes: dict[str, Node] = {}
    for part in parts:
        parent, _, name = part.path.rpartition(".")
        node = nodes[part.path] = Node(part, name)
        if part.path:
            nodes[parent].below.append(node)
    if "" not in nodes:
        return None
    _fold(nodes[""])
    return nodes[""]


def _fold(node: Node) -> None:
    for child in node.below:
        _fold(child)
    folded: list[Node] = []
    for child in node.below:
        if folded and folded[-1].shape == child.shape:
            folded[-1].same += 1
            if child.name.isdigit():
                folded[-1].name = f"{folded[-1].name.split(' to ')[0]} to {child.name}"
            else:
                folded[-1].name += f", {child.name}"
        else:
            folded.append(child)
    node.below = folded
    roles = [role for child in folded for role in (child.part.role, *child.inside) if role in _EFFECT]
    node.inside = list(dict.fromkeys(roles))


@functools.lru_cache(maxsize=1)
def _environment() -> Any:
    import jinja2

    folder = Path(__file__).parent / "templates"
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )


def _values(report: Report, page: bool) -> dict[str, Any]:
    roles = {part.role for part in report.parts}
    return {
        "report": report,
        "page": page,
        "headings": HEADINGS,
        "rows": rows(report),
        "facts": facts(report),
        "chance": chance(report),
        "root": tree(report.parts),
        "legend": {role: words for role, words in ROLES.items() if role in roles},
        "roles": ROLES,
        "tone": ("calm", "differs", "alarm", "alarm")[report.exit_code],
    }


def to_html(report: Report) -> str:
    return _environment().get_template("report.html").render(**_values(report, True))


def to_fragment(report: Report) -> str:
    """For notebooks: the same content without the page around it, the module tree closed."""
    return _environment().get_template("fragment.html").render(**_values(report, False))
