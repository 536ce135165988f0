"""Fails when a module or a function is too long to be read in one sitting.

Usage: ``python tools/check_sizes.py FOLDER…``
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

MAX_MODULE_LINES = 600
MAX_FUNCTION_LINES = 60
# A migration is generated once and read beside the tables it makes.
_SKIPPED = {"node_modules", "__pycache__", "versions"}


def complaints(path: Path) -> Iterator[str]:
    """What is too long in the module at ``path``, one sentence each."""
    text = path.read_text(encoding="utf-8")
    num_lines = text.count("\n")
    if num_lines > MAX_MODULE_LINES:
        yield f"{path}: {num_lines} lines; split it (at most {MAX_MODULE_LINES})."
    for node in ast.walk(ast.parse(text, str(path))):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > MAX_FUNCTION_LINES:
                yield (
                    f"{path}:{node.lineno}: {node.name} has {length} lines; "
                    f"split it (at most {MAX_FUNCTION_LINES})."
                )


def main(folders: list[str]) -> int:
    """Prints every complaint about the modules under ``folders``; 1 if there is one."""
    modules = [
        path
        for folder in folders
        for path in sorted(Path(folder).rglob("*.py"))
        if not _SKIPPED & set(path.parts)
    ]
    found = [complaint for path in modules for complaint in complaints(path)]
    print(*found, sep="\n", end="\n" if found else "")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
