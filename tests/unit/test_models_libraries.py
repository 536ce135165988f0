"""Loading the large libraries ahead of the first task."""

from __future__ import annotations

import gc

import pytest

from shoal.models import libraries
from shoal.models.libraries import load_libraries


def test_what_is_loaded_is_not_collected_again_and_one_model_was_loaded_without_a_word(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    loads: list[None] = []
    load = libraries._load_first_model

    def counted() -> None:
        loads.append(load())

    monkeypatch.setattr(libraries, "_load_first_model", counted)
    gc.unfreeze()
    try:
        load_libraries(1)
        frozen = gc.get_freeze_count()
        assert frozen > 100_000
        # Once is enough: what a process makes later must stay collectable.
        load_libraries(1)
        assert gc.get_freeze_count() <= frozen
        assert len(loads) == 1
    finally:
        gc.unfreeze()
    assert capfd.readouterr() == ("", "")
