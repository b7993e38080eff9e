"""Pairs typed into a terminal: a pseudo-terminal, and what must not reach it."""

from __future__ import annotations

import contextlib
import io
import os
import pathlib
import pty
import re
import select
import signal
import subprocess
import sys
import time

import pytest
from conftest import COMPILE_FASTEST, slowness
from judges.test_local import write_model

from jlrm import judge
from jlrm.evaluation.games import Game, Item
from jlrm.runtime import commands
from jlrm.server.service import Piece
from jlrm.server.terminal import Progress, Screen
from jlrm.serving.results import JudgedGame

ROOT = pathlib.Path(__file__).parent.parent.parent
LONGER = ("--backend", "heuristic", "--model", "longer")


class Terminal:
    """A command whose three streams are a terminal."""

    def __init__(self, *flags: str, **environment: str) -> None:
        self.ours, theirs = pty.openpty()
        kept = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "TERM")}
        kept |= {"TERM": "xterm", "XLA_FLAGS": COMPILE_FASTEST, **environment}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "jlrm.judge", *flags],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env=kept,
            cwd=ROOT,
            start_new_session=True,
        )
        os.close(theirs)
        self.text = ""

    def wait_for(self, form: str, seconds: float = 120.0) -> str:
        """Read until a form has come, and return what came before its end."""
        until = time.monotonic() + seconds * slowness()
        while not (hit := re.search(form, self.text)):
            assert time.monotonic() < until, self.text
            if select.select([self.ours], [], [], 0.5)[0]:
                try:
                    self.text += os.read(self.ours, 4096).decode()
                except OSError:  # the other end is closed
                    assert re.search(form, self.text), self.text
        before, self.text = self.text[: hit.end()], self.text[hit.end() :]
        return before

    def type(self, text: str) -> None:
        os.write(self.ours, text.encode())

    def end(self) -> int:
        """Type Ctrl-D, and return the exit code."""
        self.type("\x04")
        return self.code()

    def code(self) -> int:
        """Return the exit code, reading on: a terminal is left when all is read that it shows."""
        until = time.monotonic() + 60 * slowness()
        while self.process.poll() is None:
            assert time.monotonic() < until, self.text
            if select.select([self.ours], [], [], 0.1)[0]:
                with contextlib.suppress(OSError):  # the other end is closed
                    self.text += os.read(self.ours, 4096).decode()
        return self.process.returncode

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        os.close(self.ours)


@pytest.mark.slow
@pytest.mark.parametrize("environment", [{}, {"NO_COLOR": "1"}, {"TERM": "dumb"}])
def test_pairs_are_typed_and_judged_until_the_end(environment):
    with Terminal(*LONGER, **environment) as terminal:
        terminal.wait_for("Ctrl-D ends it all")
        terminal.wait_for("Question: ")
        terminal.type("\n")  # nothing yet
        terminal.wait_for("a text, or Ctrl-D")
        terminal.type("How many\nlegs?\n\n")
        terminal.wait_for("Answer 1: ")
        terminal.type("Eight, in four pairs.\n.\n")
        terminal.wait_for("Answer 2: ")
        terminal.type("Six.\n\n")
        said = terminal.wait_for("Verdict: answer 1.*\n")
        assert "both orders agree" in said and said.index("Shown 1, 2") < said.index("Shown 2, 1")
        assert ("\033[1;32m" in said) == (not environment)
        terminal.wait_for("Question: ")
        assert terminal.end() == 0


@pytest.mark.slow
def test_a_model_of_ours_writes_as_it_goes(tmp_path):
    write_model(tmp_path / "model")
    sizes = ["--max-prompt-tokens", "256", "--max-new-tokens", "40", "--compute-dtype", "float32"]
    with Terminal("--prompt", "toy", *sizes) as terminal:
        terminal.wait_for("Judge .*: ")
        terminal.type(f"{tmp_path / 'model'}\n")
        for question in ("Name tools.", "Name fruits."):
            terminal.wait_for("Question: ")
            terminal.type(f"{question}\n\nsaw hammer\n\ndrill\n\n")
            said = terminal.wait_for("Verdict: .*\n")
            shown = re.findall(r"\033\[1mShown (\d, \d):\033\[0m", said)
            assert shown == ["1, 2", "2, 1"]
            # Forty tokens came in blocks of eight, each shown when it was there.
            first = said.split("Shown 2, 1:")[0]
            assert first.count("\033[2m") >= 3, first
        terminal.wait_for("Question: ")  # before it, Ctrl-D would be a character
        assert terminal.end() == 0


@pytest.mark.slow
def test_ctrl_c_ends_it_with_one_line():
    with Terminal(*LONGER) as terminal:
        terminal.wait_for("Question: ")
        time.sleep(0.5)  # until it waits for a key: Python hears no signal just before
        os.killpg(terminal.process.pid, signal.SIGINT)
        assert terminal.code() == 130
        with pytest.raises(AssertionError):
            terminal.wait_for("Traceback", seconds=1)


def game(first: int) -> Game:
    return Game(Item("0", "q", ("a", "b")), first, 1 - first)


def test_two_orders_that_grow_at_once_are_shown_one_after_the_other(capsys):
    progress = Progress(Screen(False))
    progress.add(game(0), Piece(0, 0, "I th", 1, ""))
    progress.add(game(1), Piece(1, 0, "Well", 1, ""))
    progress.add(game(1), Piece(1, 1, "another vote", 1, ""))
    assert capsys.readouterr().out == "Shown 1, 2:\nI th"
    progress.add(game(1), Piece(1, 0, "Well, two<|im_end|>", 3, "stop"))
    progress.add(game(0), Piece(0, 0, "I think.\x1b[2J", 2, "stop"))
    shown = capsys.readouterr().out
    assert shown == "ink.\ufffd[2J\nShown 2, 1:\nWell, two"  # no escape reaches the terminal
    progress.finish(JudgedGame((1, 2), 1, None, "ok", ("I think.",), 2))
    assert capsys.readouterr().out == ""


def test_a_judge_that_answers_whole_is_shown_at_the_end(capsys):
    progress = Progress(Screen(True))
    progress.finish(JudgedGame((1, 2), 1, None, "ok", ("One.",), 2))
    progress.finish(JudgedGame((2, 1), None, None, "unjudged", (), None, "timeout"))
    plain = re.sub(r"\033\[[\d;]*m", "", capsys.readouterr().out)
    assert plain == "Shown 1, 2:\nOne.\nShown 2, 1:\n"


@pytest.mark.parametrize(
    ("flags", "is_typed", "says"),
    [
        ([], False, "Name a file of pairs, or - to read them from stdin"),
        (["--out", "x"], True, "--out has no effect on pairs that are typed"),
        (["--num-beams", "4"], True, "--num-beams has no effect"),
        ([*LONGER[:3], "longest"], True, "no heuristic"),
    ],
)
def test_mistakes_end_with_2(flags, is_typed, says, monkeypatch, capsys):
    stdin = io.StringIO()
    monkeypatch.setattr(stdin, "isatty", lambda: is_typed, raising=False)
    monkeypatch.setattr(sys, "stdin", stdin)
    assert commands.run(lambda: judge.main(flags)) == 2
    assert says in capsys.readouterr().err
