"""Who may import whom: one direction of dependencies, from the kernels to the command line."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# A module may import only modules of a lower floor or its own part. Names are below `modeprobe.`.
FLOORS = [
    ["_version"],
    ["_extension"],
    ["mask"],
    ["reference", "triton_kernels"],
    ["ops"],
    ["functional"],
    ["nn"],
    ["swap", "statistics", "info"],
    ["probe"],
    ["benchmarks"],
    ["tour"],
    ["cli"],
    ["__main__"],
]
FLOOR = {name: floor for floor, names in enumerate(FLOORS) for name in names}

# Too heavy, or not always installed: imported inside the functions that need them.
HEAVY = {"transformers", "sklearn", "matplotlib", "rich", "typer", "jinja2", "triton", "numpy", "pytest"}
HEAVY_ALLOWED = (
    "cli",
    "tour",
    "probe.cli",
    "probe.pytest_plugin",
    "__main__",
    "triton_kernels",
    "benchmarks",
)


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    if parts[0] == "modeprobe":
        parts = parts[1:]
    return ".".join(part for part in parts if part != "__init__")


def python_files(*folders):
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def imports(path: Path):
    """(dotted name, whether the import runs when the module is imported) for every import of a file."""
    tree = ast.parse(path.read_text())
    inside_function = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            inside_function.update(id(child) for child in ast.walk(node))
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            inside_function.update(id(child) for child in node.body for child in ast.walk(child))
    package = path.relative_to(ROOT).parent.parts
    for node in ast.walk(tree):
        top = id(node) not in inside_function
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, top
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            source = ".".join(filter(None, [base, node.module or ""]))
            if source in ("modeprobe", *package[:1]) or node.module is None:
                for alias in node.names:
                    yield f"{source}.{alias.name}", top
            else:
                yield source, top


def floor_of(dotted: str) -> int | None:
    head = dotted.split(".")[0]
    return FLOOR.get(head)


@pytest.mark.parametrize("path", python_files("modeprobe", "triton_kernels", "benchmarks"), ids=module_name)
def test_imports_point_down(path):
    name = module_name(path)
    if not name:
        return  # modeprobe/__init__.py re-exports every floor, lazily
    own = floor_of(name)
    assert own is not None, f"{name} stands on no floor; give it one in FLOORS"
    for imported, _ in imports(path):
        if imported.split(".")[0] in ("modeprobe", "triton_kernels", "benchmarks"):
            target = imported.removeprefix("modeprobe.")
            floor = floor_of(target)
            if floor is None:
                continue  # a name of modeprobe/__init__.py
            same_part = target.split(".")[0] == name.split(".")[0]
            assert floor < own or same_part, f"{name} imports {imported}, which stands above it"


@pytest.mark.parametrize("path", python_files("triton_kernels"), ids=module_name)
def test_triton_kernels_know_nothing_of_modeprobe(path):
    for imported, _ in imports(path):
        head = imported.split(".")[0]
        assert head in {"torch", "triton", "triton_kernels", "math", "functools", "typing", "__future__",
                        "collections", "dataclasses", "struct"}, f"imports {imported}"  # fmt: skip


@pytest.mark.parametrize("path", python_files("modeprobe"), ids=module_name)
def test_heavy_imports_wait_until_used(path):
    if module_name(path).startswith(HEAVY_ALLOWED):
        return
    found = {imported for imported, top in imports(path) if top and imported.split(".")[0] in HEAVY}
    assert not found, f"imported with the module: {sorted(found)}"


def includes(path: Path) -> list[str]:
    return re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', path.read_text(), re.MULTILINE)


@pytest.mark.parametrize("path", sorted((ROOT / "csrc/include").rglob("*.cuh")), ids=lambda path: path.name)
def test_headers_know_nothing_of_torch(path):
    for include in includes(path):
        assert not re.match(r"torch/|ATen/|c10/|Python\.h|pybind11/", include), include


@pytest.mark.parametrize(("folder", "other"), [("cpu", "cuda"), ("cuda", "cpu")])
def test_backends_do_not_know_each_other(folder, other):
    for path in sorted((ROOT / "csrc" / folder).iterdir()):
        assert not any(f"{other}/" in include for include in includes(path)), path.name


def test_the_walls_would_fall(tmp_path, monkeypatch):
    """The readers above see what they are meant to see."""
    package = tmp_path / "modeprobe" / "ops"
    package.mkdir(parents=True)
    source = package / "bad.py"
    source.write_text("from modeprobe import swap\nfrom ..nn import dropout\ndef f():\n    import rich\n")
    monkeypatch.setattr(f"{__name__}.ROOT", tmp_path)
    assert list(imports(source)) == [("modeprobe.swap", True), ("modeprobe.nn", True), ("rich", False)]
