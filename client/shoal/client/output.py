"""What a command says, and to whom: people read a terminal, programs read JSON.

With ``--json`` standard output carries JSON documents and nothing else; what people read
goes to standard error.
"""

from __future__ import annotations

import json
import sys
from functools import cached_property
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from rich.console import Console, RenderableType


class Output:
    """Standard output and error of one command.

    Args:
        json_mode: Whether standard output is for a program.
    """

    def __init__(self, *, json_mode: bool) -> None:
        self.json_mode = json_mode

    @cached_property
    def console(self) -> Console:
        """Where people read."""
        # rich takes 50 ms to import, which `shoal --help` does not owe it.
        from rich.console import Console

        class PipeAwareConsole(Console):
            """A console whose closed pipe is the command's to handle."""

            def on_broken_pipe(self) -> NoReturn:
                """Leaves the exit code to the command's one place for it."""
                self.quiet = True
                raise BrokenPipeError

        return PipeAwareConsole(stderr=self.json_mode, highlight=False)

    @property
    def live(self) -> bool:
        """Whether a picture that redraws itself can be shown."""
        return self.console.is_terminal and not self.console.is_dumb_terminal

    def say(self, *lines: RenderableType) -> None:
        """Shows ``lines`` (rich markup) to a person."""
        for line in lines:
            # A path or an address cut in two by a line break cannot be copied.
            self.console.print(line, soft_wrap=isinstance(line, str))

    def warn(self, sentence: str) -> None:
        """Writes one sentence to standard error."""
        sys.stderr.write(f"shoal: {sentence}\n")

    def emit(self, data: object) -> None:
        """Writes one JSON document, on one line, to standard output."""
        sys.stdout.write(json.dumps(data, ensure_ascii=False) + "\n")
        sys.stdout.flush()
