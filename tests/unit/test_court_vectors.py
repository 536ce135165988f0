"""The contracts' test vectors are what the records of `shoal.protocol` give today."""

from __future__ import annotations

from court_vectors import PATH, vectors


def test_the_vectors_are_up_to_date() -> None:
    stale = "run `python tests/court_vectors.py`, then the forge tests"
    assert PATH.read_text(encoding="utf-8") == vectors(), stale
