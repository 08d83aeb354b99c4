"""How large and how tangled the package is: files, lines, importers, circles, chains, wheel, start.

``python -m benchmarks.structure`` prints one table for the working tree. With ``--commits A B``
it prints a column for each commit, from a copy of its files; ``--wheel`` builds each one's wheel,
and ``--start`` times ``fdconv --help`` (the working tree's environment runs them all).
"""

from __future__ import annotations

import argparse
import ast
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("fdconv_deploy", "export", "serve")


def modules(root: Path) -> dict[str, Path]:
    """Every module of the package, by the name it is imported by, and its file."""
    # Before November 2026, `export` and `serve` were packages of their own.
    inside = (root / "export/api.py").is_file()
    found = {}
    for folder in FOLDERS:
        for path in sorted((root / folder).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            found[f"fdconv_deploy.{name}" if inside and folder != "fdconv_deploy" else name] = path
    return found


def import_graph(root: Path, *, at_load: bool = False) -> dict[str, set[str]]:
    """Which modules each module imports.

    Args:
        root: the repository's folder.
        at_load: only what is imported when the module is loaded: neither imports inside
            functions nor those for type checkers.
    """
    known = modules(root)
    graph = {}
    for name, path in known.items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        named = {
            target
            for node in _imports(tree, at_load)
            for wanted in _wanted(node, package)
            if (target := _nearest(wanted, known))
        }
        graph[name] = named - {name}
    return graph


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of modules that import each other, directly or not (Tarjan's components)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(name: str) -> None:
        index[name] = low[name] = len(index)
        stack.append(name)
        for target in sorted(graph[name]):
            if target not in index:
                visit(target)
                low[name] = min(low[name], low[target])
            elif target in stack:
                low[name] = min(low[name], index[target])
        if low[name] == index[name]:
            group = stack[stack.index(name) :]
            del stack[stack.index(name) :]
            if len(group) > 1:
                found.append(sorted(group))

    for name in graph:
        if name not in index:
            visit(name)
    return found


def longest_chain(graph: dict[str, set[str]]) -> list[str]:
    """The longest way along imports without meeting a module twice, circles left out."""
    tangled = {name for group in circles(graph) for name in group}
    known: dict[str, list[str]] = {}

    def chain(name: str) -> list[str]:
        if name not in known:
            targets = sorted(graph[name] - tangled)
            known[name] = [name, *max((chain(target) for target in targets), key=len, default=[])]
        return known[name]

    return max((chain(name) for name in sorted(graph) if name not in tangled), key=len)


def _imports(tree: ast.Module, at_load: bool) -> Iterator[ast.Import | ast.ImportFrom]:
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        lazy = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or (
            isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        )
        if not (at_load and lazy):
            waiting.extend(ast.iter_child_nodes(node))


def _wanted(node: ast.Import | ast.ImportFrom, package: str) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    above = package.split(".")
    start = ".".join(above[: len(above) - node.level + 1]) if node.level else ""
    source = ".".join(part for part in (start, node.module or "") if part)
    return [f"{source}.{alias.name}" for alias in node.names]


def _nearest(name: str, known: dict[str, Path]) -> str:
    while name and name not in known:
        name = name.rpartition(".")[0]
    return name


def _measure(root: Path, wheel: bool, start: bool) -> dict[str, str]:
    known, graph, loading = modules(root), import_graph(root), import_graph(root, at_load=True)
    importers = dict.fromkeys(known, 0)
    for targets in graph.values():
        for target in targets:
            importers[target] += 1
    lines = sum(len(path.read_text(encoding="utf-8").splitlines()) for path in known.values())
    sphinx = sum(":param" in path.read_text(encoding="utf-8") for path in known.values())
    google = sum("Args:\n" in path.read_text(encoding="utf-8") for path in known.values())
    measured = {
        "package files": f"{len(known)}",
        "package lines": f"{lines:,}",
        "modules with one importer": f"{list(importers.values()).count(1)}",
        "import circles (at load)": f"{len(circles(graph))} ({len(circles(loading))})",
        "longest import chain": f"{len(longest_chain(graph))}",
        "docstring dialects": f"{bool(sphinx) + bool(google)}",
    }
    if wheel:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", folder]
            subprocess.run([*command, str(root)], check=True)
            (built,) = Path(folder).glob("*.whl")
            measured["wheel, MB"] = f"{built.stat().st_size / 1e6:.2f}"
    if start:
        measured["`fdconv --help`, s"] = f"{_help_seconds(root):.2f}"
    return measured


def _help_seconds(root: Path) -> float:
    taken = []
    for _ in range(7):
        began = time.perf_counter()
        command = [sys.executable, "-m", "fdconv_deploy", "--help"]
        subprocess.run(command, cwd=root, capture_output=True, check=True)
        taken.append(time.perf_counter() - began)
    return median(taken)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--commits", nargs="*", default=[], help="commits to show beside the tree")
    parser.add_argument("--wheel", action="store_true", help="build each one's wheel")
    parser.add_argument("--start", action="store_true", help="time `fdconv --help`, median of 7")
    options = parser.parse_args()
    columns = {}
    for commit in options.commits:
        with tempfile.TemporaryDirectory() as folder:
            archive = subprocess.run(["git", "archive", commit], check=True, capture_output=True)
            subprocess.run(["tar", "x", "-C", folder], input=archive.stdout, check=True)
            columns[commit] = _measure(Path(folder), options.wheel, options.start)
    columns["working tree"] = _measure(ROOT, options.wheel, options.start)
    print("| | " + " | ".join(columns) + " |")
    print("|---" * (len(columns) + 1) + "|")
    for name in columns["working tree"]:
        print(f"| {name} | " + " | ".join(column[name] for column in columns.values()) + " |")


if __name__ == "__main__":
    main()
