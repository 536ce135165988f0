"""Messages no honest node sends, made from messages that one does.

The same seed makes the same messages, so a failure that names its seed and number replays.
"""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable, Iterator, Sequence
from typing import Any

_MAX_BYTES = 1 << 16
_DEPTHS = (1, 40, 500, 20_000)
_INTEGERS = (-1, 2**31, 2**53, 2**63 - 1, 2**63, 2**64, 10**400, -(10**400))
_WORDS = (
    "",
    "\x00",
    "../../etc/passwd",
    "a" * 5000,
    "\u202e\u200d\U0001f600",
    "0x" + "0" * 64,
    "nan",
    "-0",
    "9" * 400,
    "%s%n{0}",
    "\ud800",
)
_RAW_NUMBERS = (b"NaN", b"Infinity", b"-Infinity", b"1e999", b"-0", b"1E400", b"0x10", b"01")
_VALUES: tuple[Any, ...] = (None, True, False, [], {}, 0, 0.5, -1e300, *_INTEGERS, *_WORDS)


class Malformer:
    """Makes malformed messages out of `valid` ones, without end.

    Args:
        valid: Messages of one protocol as honest nodes write them.
        seed: Chooses the messages made.
    """

    def __init__(self, valid: Sequence[bytes], seed: int) -> None:
        self._valid = valid
        self._parsed = [_as_json(message) for message in valid]
        self._draw = random.Random(seed)
        self._plain: tuple[Callable[[bytes], bytes], ...] = (
            self._noise,
            self._truncated,
            self._flipped,
            self._trailed,
            self._spliced,
            self._stretched,
            self._lengths,
        )
        self._structured: tuple[Callable[[Any], bytes], ...] = (
            self._replaced,
            self._removed,
            self._added,
            self._doubled_key,
            self._raw_number,
            self._repeated,
            self._nested,
        )

    def __iter__(self) -> Iterator[bytes]:
        """The messages, one after another."""
        while True:
            yield self.message()

    def message(self) -> bytes:
        """One more message."""
        which = self._draw.randrange(len(self._valid))
        parsed = self._parsed[which]
        if parsed is not None and self._draw.random() < 0.6:
            return self._draw.choice(self._structured)(parsed)[:_MAX_BYTES]
        return self._draw.choice(self._plain)(self._valid[which])[:_MAX_BYTES]

    def _noise(self, valid: bytes) -> bytes:
        return self._draw.randbytes(self._draw.choice((0, 1, 9, 44, len(valid), 3000)))

    def _truncated(self, valid: bytes) -> bytes:
        return valid[: self._draw.randrange(len(valid) + 1)]

    def _flipped(self, valid: bytes) -> bytes:
        changed = bytearray(valid or b"\0")
        for _ in range(self._draw.randint(1, 8)):
            changed[self._draw.randrange(len(changed))] ^= 1 << self._draw.randrange(8)
        return bytes(changed)

    def _trailed(self, valid: bytes) -> bytes:
        return valid + self._draw.choice((b"\0", b" ", b"}", valid, self._draw.randbytes(64)))

    def _spliced(self, valid: bytes) -> bytes:
        other = self._draw.choice(self._valid)
        return self._truncated(valid) + other[self._draw.randrange(len(other) + 1) :]

    def _stretched(self, valid: bytes) -> bytes:
        at = self._draw.randrange(len(valid) + 1)
        return valid[:at] + valid[at : at + 8] * self._draw.randint(2, 2000) + valid[at:]

    def _lengths(self, valid: bytes) -> bytes:
        """A length that a reader might believe, written over any eight bytes."""
        length = self._draw.choice((2**63, 2**64 - 1, 2**32, 2**31 - 1, 2**53))
        at = self._draw.randrange(len(valid) + 1)
        return valid[:at] + struct.pack(">Q", length) + valid[at + 8 :]

    def _replaced(self, parsed: Any) -> bytes:
        return _written(self._changed(parsed, lambda _old: self._draw.choice(_VALUES)))

    def _removed(self, parsed: Any) -> bytes:
        return _written(self._changed(parsed, lambda _old: _GONE))

    def _added(self, parsed: Any) -> bytes:
        def more(old: Any) -> Any:
            if isinstance(old, dict):
                return {**old, self._draw.choice(_WORDS): self._draw.choice(_VALUES)}
            if isinstance(old, list):
                return [*old, self._draw.choice(_VALUES)]
            return [old]

        return _written(self._changed(parsed, more))

    def _doubled_key(self, parsed: Any) -> bytes:
        text = _written(parsed)
        if not isinstance(parsed, dict) or not parsed:
            return text + text
        key = self._draw.choice(sorted(parsed))
        again = _written({key: self._draw.choice(_VALUES)})
        return text[:-1] + b"," + again[1:]

    def _raw_number(self, parsed: Any) -> bytes:
        mark = "@@number@@"
        text = _written(self._changed(parsed, lambda _old: mark))
        return text.replace(b'"' + mark.encode() + b'"', self._draw.choice(_RAW_NUMBERS))

    def _repeated(self, parsed: Any) -> bytes:
        times = self._draw.choice((2, 257, 1025))
        return _written(self._changed(parsed, lambda old: [old] * times))

    def _nested(self, parsed: Any) -> bytes:
        mark = "@@deep@@"
        depth = self._draw.choice(_DEPTHS)
        opened, closed = self._draw.choice(((b"[", b"]"), (b'{"a":', b"}")))
        deep = opened * depth + b"1" + closed * depth
        text = _written(self._changed(parsed, lambda _old: mark))
        return text.replace(b'"' + mark.encode() + b'"', deep)

    def _changed(self, value: Any, change: Callable[[Any], Any]) -> Any:
        """`value` with one part of it, anywhere, changed; the rest is shared."""
        stop = self._draw.random() < 0.3
        if isinstance(value, dict) and value and not stop:
            key = self._draw.choice(sorted(value))
            new = self._changed(value[key], change)
            rest = {name: kept for name, kept in value.items() if name != key}
            return rest if new is _GONE else {**rest, key: new}
        if isinstance(value, list) and value and not stop:
            at = self._draw.randrange(len(value))
            new = self._changed(value[at], change)
            return [*value[:at], *([] if new is _GONE else [new]), *value[at + 1 :]]
        return change(value)


class _Gone:
    """Stands where a part was removed."""


_GONE = _Gone()


def _as_json(message: bytes) -> Any:
    try:
        return json.loads(message)
    except ValueError:
        return None


def _written(value: Any) -> bytes:
    if value is _GONE:
        return b""
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")
