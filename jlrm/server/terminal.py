"""Judge what is typed into a terminal, pair after pair, until Ctrl-D.

A model of ours is decoded by the engine of `jlrm judge serve`, so its reasoning is shown as it is
written: the first order's at once, the second's when the first has ended, from where it is by then.
Other judges answer whole. What is shown is text: control characters, which could steer a terminal,
are replaced.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import re
import sys
from collections.abc import Callable, Iterator
from typing import NamedTuple

from jlrm.evaluation.games import Game
from jlrm.evaluation.reading import reader
from jlrm.judgement.spelling import without_end_tokens
from jlrm.judges import options
from jlrm.server import command
from jlrm.server.bodies import Drawing
from jlrm.server.service import Piece
from jlrm.serving import calibration
from jlrm.serving.asked import Pair, pair_of
from jlrm.serving.judge import Judge
from jlrm.serving.results import NAMES, JudgedGame, JudgedPair

CONTROL = re.compile(r"[^\n\t\x20-\x7e\xa0-\ud7ff\ue000-\U0010ffff]")
BOLD, DIM, GREEN, YELLOW = "1", "2", "32", "33"
HOW = (
    "Type a question and two answers. An empty line, or a line with a dot alone, ends each text; "
    "Ctrl-D ends it all."
)
ASKED = ("Question", "Answer 1", "Answer 2")
# Judges a pair; the function hears of what has been written so far, where that is known.
Ask = Callable[[Pair, Callable[[Game, Piece], None]], JudgedPair]


class Screen(NamedTuple):
    """A terminal, or what stands in its place, which is given no colours."""

    is_coloured: bool

    @classmethod
    def here(cls) -> Screen:
        """Return the screen of this process. https://no-color.org"""
        is_wanted = not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
        return cls(sys.stdout.isatty() and is_wanted)

    def say(self, text: str, *styles: str, end: str = "\n") -> None:
        """Print a text at once, in a style where the screen has some."""
        text = CONTROL.sub("\ufffd", text)
        if self.is_coloured and styles:
            text = f"\033[{';'.join(styles)}m{text}\033[0m"
        print(text, end=end, flush=True)


class Progress:
    """Shows the games of a pair one after the other, each as far as it is written."""

    def __init__(self, screen: Screen) -> None:
        self._screen, self._texts = screen, dict[tuple[int, int], str]()
        self._ended: set[tuple[int, int]] = set()
        self._shown: list[tuple[int, int]] = []  # the last one is on the screen
        self._length = 0

    def add(self, game: Game, piece: Piece) -> None:
        """Take in a piece; of several votes the first is shown, the others count."""
        order = game.first + 1, game.second + 1
        if piece.completion:
            return
        self._texts[order] = without_end_tokens(piece.text) if piece.ending else piece.text
        if piece.ending:
            self._ended.add(order)
        self._show()

    def finish(self, game: JudgedGame) -> None:
        """Show what is left of a game, or all of it where nothing was heard before."""
        if game.order not in self._ended:
            self._texts[game.order] = without_end_tokens(next(iter(game.texts), ""))
            self._ended.add(game.order)
        self._show()

    def _show(self) -> None:
        while True:
            if not self._shown or self._shown[-1] in self._ended:
                self._write_rest()
                left = [order for order in self._texts if order not in self._shown]
                if not left:
                    return
                if self._shown:
                    self._screen.say("")
                self._shown.append(min(left))
                self._length = 0
                self._screen.say("Shown {}, {}:".format(*self._shown[-1]), BOLD)
            self._write_rest()
            if self._shown[-1] not in self._ended:
                return

    def _write_rest(self) -> None:
        if self._shown:
            text = self._texts[self._shown[-1]]
            self._screen.say(text[self._length :], DIM, end="")
            self._length = len(text)


def run(args: argparse.Namespace) -> None:
    """Ask for pairs and judge them, until Ctrl-D.

    Raises:
      UsageError: no such model, or anything else the user can mend.
    """
    screen = Screen.here()
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # lines can be edited
    try:
        while not args.model:
            args.model = input("Judge (a run, a directory or a hub id): ").strip()
        with _opened(args) as ask:
            screen.say(HOW)
            while True:
                _judge(screen, ask, pair_of([*map(_typed, ASKED)]))
    except EOFError:
        screen.say("")


def _typed(name: str) -> str:
    """Return a text of one or more lines, which an empty line or a dot ends."""
    lines: list[str] = []
    prompt = f"{name}: "
    while True:
        line = input(prompt)
        if line.strip() not in ("", "."):
            lines.append(line)
        elif lines:
            return "\n".join(lines)
        prompt = "  " if lines else f"{name} (a text, or Ctrl-D): "


def _judge(screen: Screen, ask: Ask, pair: Pair) -> None:
    progress = Progress(screen)
    judged = ask(pair, progress.add)
    for game in judged.games:
        progress.finish(game)
    screen.say("\n")
    for game in judged.games:
        why = "" if game.winner is not None else f" ({game.error or game.status})"
        scores = " {:g} : {:g}".format(*game.scores) if game.scores else ""
        screen.say("Shown {}, {}: ".format(*game.order) + f"{NAMES[game.winner]}{scores}{why}")
    style = GREEN if judged.is_consistent is not False and judged.winner is not None else YELLOW
    screen.say(f"Verdict: {repr(judged)[1:-1]}\n", BOLD, style)


@contextlib.contextmanager
def _opened(args: argparse.Namespace) -> Iterator[Ask]:
    """Open the judge that the flags name.

    Raises:
      UsageError: anything the user can mend.
    """
    options.refuse_pairs(args.backend, args.model)
    if args.backend != options.JLRM:
        chosen = options.options(args)
        made = options.make(args.backend, args.model, chosen, args.seed, None)
        low, high = chosen.get("scale") or (1, 10)
        read = reader(args.parser, (low, high), args.tie_margin)
        calibrated = calibration.find(args.calibration, args.model)
        judge = Judge(made, read, args.model, args.seed, calibrated)
        yield lambda pair, _: judge.compare_all([pair], args.orders)[0]
        return
    args.name, args.slots, args.block, args.max_waiting = "", 2 * (args.votes or 1), 8, 512
    service = command.open_service(args)
    print("Reading the weights; the first pair also waits for the compiler.", file=sys.stderr)
    service.engine.start()
    defaults = service.defaults
    drawing = Drawing(
        defaults.votes, defaults.temperature, defaults.max_new_tokens, defaults.seed, True
    )

    def ask(pair: Pair, tell: Callable[[Game, Piece], None]) -> JudgedPair:
        return asyncio.run(service.judge([pair], args.orders, drawing, tell))[0]

    try:
        yield ask
    finally:
        service.engine.close()
