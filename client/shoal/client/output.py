"""What a command says, and to whom: people read a terminal, programs read JSON.

With ``--json`` standard output carries JSON documents and nothing else; what people read
goes to standard error.
"""

from __future__ import annotations

import io
import json
import re
import sys
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from shoal.protocol.errors import InvalidRequest

if TYPE_CHECKING:
    from rich.console import Console, RenderableType


class Output:
    """Standard output and error of one command.

    Args:
        json_mode: Whether standard output is for a program.
        picture_width: Columns of a picture that is drawn of what people read, for
            `save_picture`; 0 draws none.
    """

    def __init__(self, *, json_mode: bool, picture_width: int = 0) -> None:
        self.json_mode = json_mode
        self._picture_width = picture_width

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

    @cached_property
    def _sheet(self) -> Console:
        """What the picture is drawn on."""
        from rich.console import Console

        return Console(
            record=True,
            file=io.StringIO(),
            width=self._picture_width,
            force_terminal=True,
            color_system="truecolor",
            highlight=False,
        )

    def keep(self, *parts: RenderableType) -> None:
        """``parts`` are in the picture, if there is to be one."""
        if self._picture_width:
            for part in parts:
                self._sheet.print(part)

    def save_picture(self, path: Path, title: str) -> None:
        """``path`` is an SVG of what was said and kept.

        Raises:
            InvalidRequest: it cannot be written there.
        """
        svg = self._sheet.export_svg(title=title)
        # rich points to a font on a server; a picture should ask nobody for anything.
        svg = re.sub(r"@font-face \{.*?\}", "", svg, flags=re.DOTALL)
        try:
            path.write_text(svg, encoding="utf-8")
        except OSError as error:
            raise InvalidRequest(
                f"The picture cannot be written to {path}: {error.strerror}."
            ) from None

    def say(self, *lines: RenderableType, kept: bool = True) -> None:
        """Shows ``lines`` (rich markup) to a person; those not ``kept`` leave the picture out."""
        if kept:
            self.keep(*lines)
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
