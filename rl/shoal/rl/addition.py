"""Addition of two numbers of equal length: "47+38=" is completed by "85"."""

from __future__ import annotations

import zlib
from array import array
from functools import lru_cache

from shoal.protocol.canonical import digest_of
from shoal.protocol.ids import Digest
from shoal.protocol.job import EnvSpec
from shoal.rl.environments import (
    Split,
    bad_argument,
    check_index,
    unknown_argument,
)

_VERSION = 1
_HELD_OUT_ONE_IN = 10
_MAX_DIGITS = 3
"""810,000 pairs: the largest table that is quick to build and small to hold (4 MB)."""


class Addition:
    """All pairs of ``digits``-digit numbers; one pair in ten, by CRC-32, is held out.

    A completion scores 1 when, surrounding blanks apart, it is the sum in decimal.
    """

    id = "addition"

    def __init__(self, digits: int) -> None:
        self.digits = digits
        self._low = 0 if digits == 1 else 10 ** (digits - 1)
        self._span = 10**digits - self._low

    @classmethod
    def load(cls, spec: EnvSpec) -> Addition:
        """The environment with the spec's arguments.

        Raises:
            InvalidRequest: an argument is unknown or ``digits`` is not 1, 2 or 3.
        """
        for name in spec.args:
            if name != "digits":
                raise unknown_argument(cls.id, name, ["digits"])
        digits = spec.args.get("digits", 2)
        if isinstance(digits, bool) or not isinstance(digits, int):
            raise bad_argument(cls.id, "digits", digits, f"a whole number from 1 to {_MAX_DIGITS}")
        if not 1 <= digits <= _MAX_DIGITS:
            raise bad_argument(cls.id, "digits", digits, f"a whole number from 1 to {_MAX_DIGITS}")
        return cls(digits)

    def digest(self) -> Digest:
        """Digest of the name, the rule's version and the number of digits."""
        return digest_of({"environment": self.id, "version": _VERSION, "digits": self.digits})

    def num_tasks(self, split: Split) -> int:
        """How many pairs ``split`` has."""
        return len(_pairs(self._low, self._span, split))

    def prompt(self, split: Split, index: int) -> str:
        """``a+b=`` for pair ``index``."""
        a, b = self._pair(split, index)
        return f"{a}+{b}="

    def answer(self, split: Split, index: int) -> str:
        """The sum, in decimal."""
        return str(sum(self._pair(split, index)))

    def score(self, split: Split, index: int, completion: str) -> float:
        """1 for the sum exactly, else 0."""
        return float(completion.strip() == self.answer(split, index))

    def _pair(self, split: Split, index: int) -> tuple[int, int]:
        check_index(self, split, index)
        a, b = divmod(_pairs(self._low, self._span, split)[index], self._span)
        return a + self._low, b + self._low


@lru_cache(maxsize=2 * _MAX_DIGITS)
def _pairs(low: int, span: int, split: Split) -> array[int]:
    held_out = split is Split.EVAL
    return array(
        "I",
        (
            code
            for code in range(span * span)
            if is_held_out(low + code // span, low + code % span) is held_out
        ),
    )


def is_held_out(a: int, b: int) -> bool:
    """Whether the pair belongs to the evaluation split."""
    return zlib.crc32(f"{a}+{b}".encode()) % _HELD_OUT_ONE_IN == 0
