"""A record's digest is that of its values, however often and on whichever copy it is asked."""

from __future__ import annotations

from shoal.protocol.canonical import digest_of
from shoal.protocol.learning import LossSpec
from shoal.protocol.task import PromptRef


def test_a_digest_is_of_the_record_as_it_is() -> None:
    first = PromptRef(environment=0, index=1)
    assert first.digest() == first.digest() == digest_of({"environment": 0, "index": 1})


def test_a_changed_copy_has_a_digest_of_its_own() -> None:
    first = PromptRef(environment=0, index=1)
    first.digest()
    changed = first.model_copy(update={"index": 2})
    assert changed.digest() == PromptRef(environment=0, index=2).digest() != first.digest()


def test_having_been_asked_for_its_digest_does_not_show() -> None:
    asked, fresh = LossSpec(), LossSpec()
    asked.digest()
    assert asked == fresh
    assert hash(asked) == hash(fresh)
    assert asked.encode() == fresh.encode()
    assert LossSpec.decode(asked.encode()) == asked
