"""The size limits are what they say."""

from __future__ import annotations

from pathlib import Path

import pytest
from check_sizes import MAX_FUNCTION_LINES, MAX_MODULE_LINES, complaints


@pytest.mark.parametrize(
    ("num_lines", "num_complaints"), [(MAX_MODULE_LINES, 0), (MAX_MODULE_LINES + 1, 1)]
)
def test_module_limit(tmp_path: Path, num_lines: int, num_complaints: int) -> None:
    path = tmp_path / "module.py"
    path.write_text("x = 1\n" * num_lines)
    assert len(list(complaints(path))) == num_complaints


@pytest.mark.parametrize(
    ("num_lines", "num_complaints"), [(MAX_FUNCTION_LINES, 0), (MAX_FUNCTION_LINES + 1, 1)]
)
def test_function_limit(tmp_path: Path, num_lines: int, num_complaints: int) -> None:
    path = tmp_path / "module.py"
    path.write_text("async def f() -> None:\n" + "    pass\n" * (num_lines - 1))
    assert len(list(complaints(path))) == num_complaints
