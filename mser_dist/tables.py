"""Tables: rich's box, bold and folding on a terminal; in a file or a pipe plain text, as wide as its cells are.

Output must not end a command after hours of work: what a stream's encoding cannot show becomes "?", a line "-".
"""

import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import StringIO, TextIOWrapper
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table as RichTable

_WIDE = 10**6  # characters: no line reaches it, so none is folded
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]+")  # a name from data moves no cursor and breaks no line


def count(number: int, noun: str) -> str:
    """A number and what it counts: 0 clips, 1 clip, 2 clips."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


@dataclass(frozen=True)
class Table:
    """Rows of cells, none of which is ever cut; `str` of it is the plain text, the same on every machine.

    head: the columns' names, or empty. sections: rows by section, with a line between two. align: a letter a column,
    l for words and r for numbers; by default only the first has words. widths: the least widths of the first columns,
    for what is printed a row at a time.
    """

    head: Sequence[str]
    sections: Sequence[Sequence[Sequence[str]]]
    align: str = ""
    widths: Sequence[int] = ()

    def __str__(self) -> str:
        return self._plain(ascii_only=False)

    @property
    def width(self) -> int:
        """Of the plain text's lines at most, in characters of a terminal."""
        from rich.cells import cell_len

        columns = [max(cell_len(_clean(cell)) for cell in column) for column in self._columns()]
        return sum(columns) + 2 * (len(columns) - 1)

    def _columns(self) -> list[tuple[str, ...]]:
        """Each with its name, if there are any, at the top."""
        rows = [row for section in self.sections for row in section]
        return [*zip(*([self.head] if self.head else []), *rows, strict=True)]

    def _plain(self, ascii_only: bool) -> str:
        """Columns two spaces apart, without a box."""
        from rich.box import Box

        line = " -- \n" if ascii_only else " ── \n"
        # Rich's eight lines of a box, of which only those below the head and between two sections are drawn.
        box = Box("    \n    \n" + line + "    \n" + line + line + "    \n    \n", ascii=ascii_only)
        console = _console(terminal=None)
        with console.capture() as captured:
            console.print(self._rich(box, (0, 1, 0, 0), edge=False))
        return "\n".join(line.rstrip() for line in captured.get().rstrip("\n").split("\n"))

    def _boxed(self, terminal: TextIO) -> str:
        """As wide as the terminal, words folded; but wider than a terminal that is too narrow for the numbers."""
        from rich.box import HORIZONTALS

        table, console = self._rich(HORIZONTALS, (0, 1, 0, 0), edge=True), _console(terminal)
        console.width = max(console.width, _console(terminal=None).measure(table).minimum)
        with console.capture() as captured:
            console.print(table)
        return captured.get().rstrip("\n")

    def _rich(self, box: Any, padding: tuple[int, int, int, int], edge: bool) -> "RichTable":
        from rich.cells import cell_len
        from rich.table import Table as RichTable
        from rich.text import Text

        if not self.head:
            box, padding, edge = None, (0, 2, 0, 0), False
        table = RichTable(box=box, padding=padding, show_edge=edge, pad_edge=edge, show_header=bool(self.head))
        columns = [[*map(_clean, column)] for column in self._columns()]
        for i, cells in enumerate(columns):
            name = Text(cells[0] if self.head else "")  # as Text: names from data are no markup
            if (self.align or "l".ljust(len(columns), "r"))[i] == "r":
                # Digits on two lines would be another number.
                table.add_column(name, justify="right", no_wrap=True, min_width=max(map(cell_len, cells)))
            else:
                least = self.widths[i] if i < len(self.widths) else None
                table.add_column(name, overflow="fold", min_width=least)
        for section in self.sections:
            for row in section:
                table.add_row(*(Text(_clean(cell)) for cell in row))
            table.add_section()
        return table


def _console(terminal: TextIO | None) -> "Console":
    """Rich's console of a terminal; None: one that folds and colours nothing."""
    from rich.console import Console

    if terminal is None:
        # Into a text, and so of whatever letters: standard output's encoding has no say in it.
        return Console(file=StringIO(), width=_WIDE, color_system=None, force_terminal=False, force_jupyter=False)
    return Console(file=terminal, force_terminal=True, force_jupyter=False)


def _clean(cell: str) -> str:
    return _CONTROL.sub(" ", cell).encode("utf-8", "replace").decode("utf-8")  # a file's name may be no Unicode


def show(*parts: Table | str, file: TextIO | None = None) -> None:
    """Print tables and texts to `file` (standard output), an empty line between two."""
    file = file or sys.stdout
    texts = []
    for part in parts:
        if isinstance(part, str):
            texts.append(part)
        elif file.isatty():
            texts.append(part._boxed(file))
        else:
            texts.append(part._plain(ascii_only=not is_unicode(file)))
    encoding = file.encoding or "utf-8"
    file.write("\n\n".join(texts).encode(encoding, "replace").decode(encoding) + "\n")
    file.flush()


def is_unicode(file: TextIO) -> bool:
    """Whether a stream takes every letter; a StringIO, which encodes nothing, does."""
    return (file.encoding or "utf-8").lower().startswith("utf")


def show_what_can_be() -> None:
    """Let `print` write "?" for what the encoding of standard output has no letter for, where it would raise."""
    if isinstance(sys.stdout, TextIOWrapper) and sys.stdout.errors in ("strict", "surrogateescape"):
        sys.stdout.reconfigure(errors="replace")


@contextmanager
def showing_what_can_be() -> Iterator[None]:
    """`show_what_can_be` for the block; behind it standard output is as it was before."""
    output = sys.stdout
    before = output.errors if isinstance(output, TextIOWrapper) else None
    show_what_can_be()
    try:
        yield
    finally:
        if isinstance(output, TextIOWrapper) and not output.closed:
            output.reconfigure(errors=before)
