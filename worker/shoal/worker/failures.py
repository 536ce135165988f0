"""Why a task could not be done, in the word the orchestrator acts on."""

from __future__ import annotations

from typing import Final

from shoal.protocol.errors import Clock, Expired, ShoalError, Unavailable
from shoal.protocol.node import FailureCause

_OF_CODE: Final = {
    "out_of_memory": FailureCause.OUT_OF_MEMORY,
    "row_too_large": FailureCause.OUT_OF_MEMORY,
    "not_finite": FailureCause.NOT_FINITE,
    "context_exceeded": FailureCause.PROMPT_TOO_LONG,
    "grader_failed": FailureCause.ENVIRONMENT,
    "unknown_environment": FailureCause.ENVIRONMENT,
    "refused_environment": FailureCause.ENVIRONMENT,
    "invalid_environment_argument": FailureCause.ENVIRONMENT,
    "invalid_prompt": FailureCause.ENVIRONMENT,
    "empty_prompt": FailureCause.ENVIRONMENT,
    "invalid_prompt_index": FailureCause.ENVIRONMENT,
    "wrong_base": FailureCause.WRONG_BASE,
    "wrong_policy": FailureCause.WRONG_BASE,
    "wrong_adapter": FailureCause.WRONG_BASE,
    "unloadable_model": FailureCause.WRONG_BASE,
}
_MEMORY_WORDS: Final = ("out of memory", "defaultcpuallocator", "can't allocate memory")


def cause_of(error: BaseException, *, fetching: bool) -> FailureCause:
    """What stands in the way, as far as ``error`` tells.

    Args:
        error: What fetching or computing the task raised.
        fetching: Whether the task's bytes were still being fetched.
    """
    if isinstance(error, ShoalError):
        known = _OF_CODE.get(error.code)
        if known is not None:
            return known
        if isinstance(error, Expired) and error.clock is Clock.DEADLINE:
            return FailureCause.TOO_SLOW
        if isinstance(error, Unavailable | Expired):
            return FailureCause.NOT_FETCHED if fetching else FailureCause.NODE
        return FailureCause.TASK
    if is_out_of_memory(error):
        return FailureCause.OUT_OF_MEMORY
    return FailureCause.NODE if isinstance(error, OSError) else FailureCause.TASK


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out: Python's, the CPU allocator's, or an accelerator's.

    By its words where it must be: torch raises a plain ``RuntimeError`` on the CPU, and this
    process does not import torch to ask.
    """
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError | OSError) and any(word in text for word in _MEMORY_WORDS)
