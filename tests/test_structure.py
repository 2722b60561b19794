"""The structure: imports point downwards, without cycles, type-checking imports included; private attributes stay at home."""

from __future__ import annotations

import ast
from pathlib import Path

import networkx as nx
import pytest

SOURCE = Path(__file__).parents[1] / "src" / "dgnet"

LAYERS = (
    ("errors", "_extras", "compat", "memory", "_lazy", "_registration", "_version", "_streams"),
    ("_guard",),
    ("files", "paths", "documents", "typed", "options", "presets", "devices", "code", "_extension"),
    ("graph",),
    ("models",),
    ("_work", "data"),
    ("_cost",),
    ("_cost_tables", "checkpoint", "_describe"),
    ("inference",),
    ("evaluation",),
    ("training",),
    ("detection",),
    ("_entries",),
    ("analysis", "bench", "publishing", "_doctor"),
    ("comparison", "experiments"),
    ("cli",),
    ("__main__",),
)
"""Packages and modules of dgnet; each imports those of earlier lines and of its own."""


def read_imports() -> dict[str, set[str]]:
    """For each module the modules of dgnet that it imports, wherever in the file: "graph._walk" -> {"graph._nodes", …}."""
    names = {".".join(path.relative_to(SOURCE).with_suffix("").parts) for path in SOURCE.rglob("*.py")}
    imports: dict[str, set[str]] = {}
    for path in SOURCE.rglob("*.py"):
        module = ".".join(path.relative_to(SOURCE).with_suffix("").parts)
        found = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "dgnet":
                base = ".".join((node.module or "").split(".")[1:])
                for alias in node.names:
                    whole = f"{base}.{alias.name}".strip(".")
                    found.add(next((n for n in (whole, f"{whole}.__init__", base, f"{base}.__init__") if n in names), ""))
            elif isinstance(node, ast.Import):
                for alias in node.names:
                    if alias.name.startswith("dgnet."):
                        base = alias.name.removeprefix("dgnet.")
                        found.add(next((n for n in (base, f"{base}.__init__") if n in names), ""))
        imports[module] = found - {"", "__init__"}
    return imports


def test_modules_import_each_other_without_cycles():
    # A package's __init__ only gathers names: what matters are the modules behind it.
    graph = nx.DiGraph()
    for module, imported in read_imports().items():
        if module.endswith("__init__"):
            continue
        graph.add_edges_from((module, other) for other in imported if not other.endswith("__init__"))
    assert list(nx.simple_cycles(graph)) == []


def test_imports_point_downwards():
    level = {name: number for number, names in enumerate(LAYERS) for name in names}
    wrong = []
    for module, imported in read_imports().items():
        package = module.split(".")[0]
        if module == "__init__":
            continue
        for other in imported:
            if level[other.split(".")[0]] > level[package]:
                wrong.append(f"{module} imports {other}")
    assert wrong == []


@pytest.mark.parametrize(
    "package", ["models", "inference", "evaluation", "training", "detection", "analysis", "bench", "comparison", "cli"]
)
def test_only_the_graph_touches_private_attributes_of_a_stage(package):
    private = {"_load_from_state_dict", "_senders", "_receivers", "_masks"}
    for path in (SOURCE / "graph").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if (
                isinstance(node, ast.Attribute)
                and isinstance(node.value, ast.Name)
                and node.value.id == "self"
                and node.attr.startswith("_")
            ):
                private.add(node.attr)
    for path in (SOURCE / package).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and node.attr in private:
                is_own = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
                assert is_own, f"{path.name}:{node.lineno} touches {node.attr}"


def test_packages_take_only_public_names_of_each_other():
    for path in SOURCE.rglob("*.py"):
        package = path.relative_to(SOURCE).parts[0]
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("dgnet."):
                other, _, module = str(node.module).removeprefix("dgnet.").partition(".")
                is_private = module.startswith("_") and other != package
                assert not is_private, f"{path.relative_to(SOURCE)} imports {node.module}; take it from dgnet.{other}"


ASKS = {"exists", "is_file", "is_dir", "isfile", "isdir", "is_fifo", "is_mount", "lexists"}
"""What asks the file system about a path. `dgnet.paths` does, and answers in one line where that fails."""


def test_only_paths_asks_what_a_path_is():
    wrong = []
    for path in SOURCE.rglob("*.py"):
        if path.name == "paths.py":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and node.attr in ASKS and ast.unparse(node.value) != "entry":  # of os.scandir
                wrong.append(f"{path.relative_to(SOURCE)}:{node.lineno} {node.attr}")
    assert wrong == []


def test_documents_are_read_strictly_everywhere():
    """JSON and YAML are read by `dgnet.documents`, which refuses what a lenient reader would guess."""
    wrong = []
    for path in SOURCE.rglob("*.py"):
        if path.name in ("documents.py", "files.py"):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                used = f"{node.value.id}.{node.attr}"
                if used in ("json.load", "json.loads", "yaml.load", "yaml.safe_load", "yaml.full_load"):
                    wrong.append(f"{path.relative_to(SOURCE)}:{node.lineno} {used}")
    assert wrong == []
