"""Errors and log lines: names in them come from files and from the network."""

import io
import logging
import re

import pytest

from poco_vla.errors import NEAREST, CheckpointError, PolicyError, UnknownAdapterError, UnknownNameError, printable
from poco_vla.progress import Display
from poco_vla.terminal import SafeConsole, SafeFormatter

TITLE = "\x1b]0;pwned\x07"
"""Changes the title of a terminal's window."""
CODES = [TITLE, "\x1b[2J", "\r", "\x08", "\x9b31m", "\u202e", "\x00", "\ud800", "\x7f"]


def unsafe(text):
    return [c for c in text if c not in "\n\t" and not c.isprintable()]


@pytest.mark.parametrize("code", CODES, ids=ascii)
def test_no_error_text_holds_control_characters(code):
    for error in (PolicyError(f"a{code}b"), CheckpointError(f"a{code}b"), UnknownAdapterError(f"a{code}b", ["pi05"])):
        assert not unsafe(str(error))
        assert not unsafe(f"{error}")


def test_an_escaped_character_is_told_by_its_number():
    assert str(PolicyError("\x1b[2J")) == "\\x1b[2J"


def test_other_scripts_and_line_feeds_stay_as_they_are():
    text = "ramasse le cube é\n  für 日本語 \U0001f916"
    assert str(PolicyError(text)) == printable(text) == text


def test_an_unknown_name_is_one_line():
    assert "\n" not in str(UnknownAdapterError("pi05\nPocoError: fine", ["pi05"]))


def test_of_a_long_list_the_nearest_names_are_shown_with_the_command_that_lists_all():
    """Without such a command the message itself is the list."""
    known = [f"cube-{i:03d}" for i in range(100)]
    short, whole = (str(UnknownNameError("task", "cube-0421", known, listing)) for listing in ("python -m tasks", ""))
    assert "Nearest of 100: cube-042, " in short
    assert short.count("cube-0") == 1 + NEAREST + 1, "the unknown name, the nearest, and the guess"
    assert short.endswith('List all: python -m tasks. Did you mean "cube-042"?')
    assert all(name in whole for name in known)


def test_lines_and_bar_show_one_clock(monkeypatch):
    """The time since the start as h:mm:ss, 3,723 s after it."""
    display = Display()
    display._started -= 3723
    written = io.StringIO()
    monkeypatch.setattr(display, "console", SafeConsole(file=written, force_terminal=True, width=120))
    with display.stage("SFT", 10, 3):
        display.say("a line")
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", written.getvalue())
    assert re.search(r"1:02:0[34]  a line", shown)
    assert re.search(r"SFT .* 3/10 +1:02:0[34]", shown)


@pytest.mark.parametrize("code", CODES, ids=ascii)
def test_a_log_line_shows_control_characters_and_obeys_none(code):
    record = logging.LogRecord("poco_vla", logging.WARNING, "f.py", 1, "task %s", (f"a{code}b",), None)
    assert not unsafe(SafeFormatter("%(message)s").format(record))


@pytest.mark.parametrize("code", CODES, ids=ascii)
def test_the_console_shows_control_characters_and_obeys_none(code):
    written = io.StringIO()
    SafeConsole(file=written).print(f"a{code}b")
    assert not unsafe(written.getvalue())


def test_a_name_in_brackets_is_no_markup():
    written = io.StringIO()
    SafeConsole(file=written, force_terminal=True).print("task [bold red]x[/bold red]")
    assert "task [bold red]x[/bold red]" in written.getvalue()


def test_a_progress_line_is_no_markup(capsys):
    display = Display()
    display.say("task [bold]x[/bold] [/nothing]")
    with display.stage("download [red]y", 1):
        pass
    shown = capsys.readouterr().out
    assert "[bold]x[/bold] [/nothing]" in shown
    assert "[red]y" in shown
