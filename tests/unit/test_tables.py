import io
import os
import pty
import re
import subprocess
import sys
import termios
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mser_dist import tables
from mser_dist.tables import Table, show

ROOT = Path(__file__).resolve().parents[2]
TABLE = Table(
    ["corpus", "language", "n", "UA"],
    [
        [["a-corpus", "de", "1,234", "0.815"], ["a corpus of many long words", "ελ", "5", "0.5"]],
        [["mean", "", "", "1"]],
    ],
    align="llrr",
)
PLAIN = [
    "corpus                       language      n     UA",
    "───────────────────────────────────────────────────",
    "a-corpus                     de        1,234  0.815",
    "a corpus of many long words  ελ            5    0.5",
    "───────────────────────────────────────────────────",
    "mean                                              1",
]


def written(*parts: Table | str, encoding: str = "utf-8") -> list[str]:
    """The lines of a file that `show` has written to."""
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    show(*parts, file=file)
    file.seek(0)
    return file.read().splitlines()


def on_a_terminal(columns: int, encoding: str = "utf-8") -> str:
    """What a real terminal of so many columns gets of `TABLE`."""
    master, slave = pty.openpty()
    termios.tcsetwinsize(slave, (24, columns))
    code = f"from mser_dist.tables import Table, show; show({TABLE!r}, 'said → after')"
    env = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "NO_COLOR")}
    env |= {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": encoding, "TERM": "xterm"}
    command = [sys.executable, "-c", code]
    with os.fdopen(master, "rb", 0) as screen:
        done = subprocess.Popen(command, stdin=slave, stdout=slave, stderr=subprocess.PIPE, env=env, text=True)
        os.close(slave)
        seen = b""
        while True:
            try:
                part = screen.read(4096)
            except OSError:  # how Linux says that nobody writes to a terminal any more
                break
            if not part:
                break
            seen += part
        _, error = done.communicate(timeout=60)
    assert done.returncode == 0, error
    return seen.decode(encoding).replace("\r\n", "\n")


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_plain_text_is_the_same_whatever_standard_output_is(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding=encoding))
    assert str(TABLE).splitlines() == PLAIN
    assert TABLE.width == len(PLAIN[1])


def test_what_is_piped_is_neither_folded_nor_coloured(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"COLUMNS": "20", "FORCE_COLOR": "1", "TTY_COMPATIBLE": "1", "TERM": "xterm"}.items():
        monkeypatch.setenv(name, value)
    assert written(TABLE, "and a text", TABLE) == [*PLAIN, "", "and a text", "", *PLAIN]
    wide = "w" * 5000
    assert written(Table(["name", "n"], [[[wide, "1"]]]))[-1] == f"{wide}  1"


def test_names_from_data_are_only_text() -> None:
    names = ["[red]x[/red]", ":smile:", "\x1b[31mred", "two\nlines", "\udcff.wav", "中文"]
    lines = written(Table(["name", "n"], [[[name, "1"] for name in names]]))[2:]
    shown = [re.sub(r"\s+1$", "", line) for line in lines]
    assert shown == ["[red]x[/red]", ":smile:", " [31mred", "two lines", "?.wav", "中文"]
    assert {len(line) for line in lines[:-1]} == {len(lines[-1]) + 2}, "an ideograph is two columns of a terminal wide"


def test_rows_printed_one_by_one_stand_under_each_other() -> None:
    rows = [written(Table((), [[[name, "found"], ["", "-> mend"]]], align="ll", widths=[9])) for name in ("a", "bcd")]
    assert rows == [["a          found", "           -> mend"], ["bcd        found", "           -> mend"]]


@pytest.mark.parametrize("encoding", ["latin-1", "ascii", "koi8-r"])
def test_an_encoding_that_lacks_letters_ends_nothing(encoding: str) -> None:
    lines = written(TABLE, "✓ → done", encoding=encoding)
    assert [set(line) for line in (lines[1], lines[4])] == [{"-"}, {"-"}]
    assert lines[0] == PLAIN[0] and lines[3] == PLAIN[3].replace("ελ", "??") and lines[-1] == "? ? done"


@given(st.lists(st.lists(st.text(), min_size=3, max_size=3), min_size=1, max_size=5))
def test_nothing_that_a_cell_holds_stops_the_output(rows: list[list[str]]) -> None:
    table = Table(["a", "b", "c"], [rows])
    lines = str(table).split("\n")
    assert len(lines) == 2 + len(rows)
    for encoding in ("utf-8", "latin-1"):
        written(table, encoding=encoding)
    str(table).encode("utf-8")


def test_a_terminal_gets_a_box_of_its_width() -> None:
    for columns in (120, 40):
        screen = on_a_terminal(columns)
        assert "\x1b[1m" in screen
        lines = re.sub(r"\x1b\[[\d;]*m", "", screen).splitlines()
        assert max(map(len, lines)) <= columns
        words = " ".join(lines).split()
        assert {"a-corpus", "many", "words", "ελ", "1,234", "0.815"} <= set(words) and "…" not in screen
        assert lines[-1] == "said → after"
    assert sum("0.5" in line for line in lines) == 1


def test_a_terminal_too_narrow_for_the_numbers_cuts_none() -> None:
    screen = re.sub(r"\x1b\[[\d;]*m", "", on_a_terminal(12))
    assert "1,234  0.815" in screen and "…" not in screen
    assert "".join(re.findall(r"[a-z]+", screen)).count("corpus") == 3


def test_a_terminal_that_is_not_utf_8() -> None:
    screen = re.sub(r"\x1b\[[\d;]*m", "", on_a_terminal(80, "latin-1"))
    assert screen.startswith("+---") and "0.815" in screen and screen.splitlines()[-1] == "said ? after"


def test_counts_are_singular_or_plural() -> None:
    assert [tables.count(number, "clip") for number in (0, 1, 2)] == ["0 clips", "1 clip", "2 clips"]


def test_print_writes_what_can_be_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    log = io.TextIOWrapper(io.BytesIO(), encoding="latin-1", write_through=True)
    monkeypatch.setattr(sys, "stdout", log)
    with pytest.raises(UnicodeEncodeError):
        print("2 × 3 → 6")
    tables.show_what_can_be()
    print("2 × 3 → 6")
    log.seek(0)
    assert log.read() == "2 × 3 ? 6\n"
    chosen = io.TextIOWrapper(io.BytesIO(), encoding="latin-1", errors="xmlcharrefreplace")
    monkeypatch.setattr(sys, "stdout", chosen)
    tables.show_what_can_be()
    assert chosen.errors == "xmlcharrefreplace", "what somebody asked for stays"
