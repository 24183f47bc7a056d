"""The picture of the layers is what the imports are: no arrow too many, none missing, and none that closes a circle."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import networkx as nx  # torch requires it

ROOT = Path(__file__).resolve().parents[2]
PICTURE = ROOT / "docs" / "assets" / "architecture.svg"
NUMBERS = {"theory", "estimators", "smoothing", "reading"}
# What any file may import, as it imports nothing itself: argument checks, torch's private names, two plain records.
LEAVES = {
    "grgauge._validation",
    "grgauge._torch_compat",
    "grgauge_kernels.backends",
    "grgauge_kernels.backends.addresses",
}


def modules():
    """Dotted name -> file, of both packages but for the two faces, which import everything."""
    for package, folder in (("grgauge", ROOT / "python" / "grgauge"), ("grgauge_kernels", ROOT / "grgauge_kernels")):
        for file in folder.rglob("*.py"):
            parts = file.relative_to(folder).with_suffix("").parts
            name = ".".join((package, *parts)).removesuffix(".__init__")
            if name != package:
                yield name, file


FILES = dict(modules())


def imported(name):
    """The modules that this one imports when it runs, at its top or in a function; types alone do not count."""
    package = name if FILES[name].name == "__init__.py" else name.rpartition(".")[0]
    tree = ast.parse(FILES[name].read_text("utf-8"))
    tree.body = [
        node for node in tree.body if not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test))
    ]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in FILES or alias.name == "grgauge_kernels")
        elif isinstance(node, ast.ImportFrom):
            above = ".".join(package.split(".")[: len(package.split(".")) - node.level + 1]) if node.level else ""
            origin = ".".join(filter(None, (above, node.module)))
            for alias in node.names:
                found = f"{origin}.{alias.name}"
                if found in FILES:
                    yield found
                elif origin in FILES or origin == "grgauge_kernels":
                    yield origin


IMPORTS = nx.DiGraph((name, other) for name in FILES for other in imported(name))


def box(name):
    """The picture's box that a module is in."""
    package, _, rest = name.partition(".")
    part = rest.split(".")[0]
    if package == "grgauge_kernels":
        return rest.split(".")[-1] if part != "backends" or rest.endswith(".native") else "backends"
    return "numbers" if part in NUMBERS else part


def test_no_imports_go_round_in_a_circle():
    faces = {name for name, file in FILES.items() if file.name == "__init__.py"}
    inner = IMPORTS.subgraph(set(IMPORTS) - faces)
    assert list(nx.simple_cycles(inner)) == []


def test_leaves_import_nothing():
    assert {name: set(IMPORTS.successors(name)) for name in LEAVES if name in IMPORTS} == {
        name: set() for name in LEAVES
    }


def test_the_arrows_are_the_imports():
    """But for those that follow from others: an arrow says that a box knows all that its neighbour knows."""
    boxes = nx.DiGraph()
    for name, other in IMPORTS.edges:
        if name in LEAVES or other in LEAVES:
            continue
        ends = box(name), "grgauge_kernels" if other == "grgauge_kernels" else box(other)
        if ends[0] != ends[1]:
            boxes.add_edge(*ends)
    boxes.add_edge("native", "csrc")
    drawn = {tuple(edge.split()) for edge in re.findall(r'data-edge="([^"]+)"', PICTURE.read_text("utf-8"))}
    assert nx.is_directed_acyclic_graph(boxes)
    assert set(nx.transitive_reduction(boxes).edges) == drawn
