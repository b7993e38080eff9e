"""Ask a judge for responses: with a progress bar, kept as they come, and stoppable."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from tqdm import tqdm

from jlrm.evaluation.games import Backend, Game, Response
from jlrm.evaluation.journal import Journal
from jlrm.runtime import commands, hosts


def judge(backend: Backend, left: Sequence[Game], kept: Journal, name: str, num_games: int) -> None:
    """Ask for the games that are left of a benchmark's `num_games`, and keep the responses.

    Raises:
      Interrupted: Ctrl-C or SIGTERM; the responses so far are kept.
    """
    bar = tqdm(
        total=num_games,
        initial=num_games - len(left),
        desc=name,
        unit=" games",
        file=sys.stderr,
        disable=not hosts.is_main(),
        dynamic_ncols=True,
        mininterval=0.1 if sys.stderr.isatty() else 10.0,
    )
    spent = getattr(backend, "spent", None)  # of a backend that costs money

    def record(response: Response) -> None:
        kept.record(response)
        if spent is not None:
            bar.set_postfix_str(str(spent), refresh=False)
        bar.update()

    with _stoppable() as stopped, kept.opened(), bar:
        try:
            backend(left, record)
        except KeyboardInterrupt:
            num_done = num_games - sum(game.id not in kept.done for game in left)
            raise commands.Interrupted(
                stopped[-1] if stopped else signal.SIGINT,
                f"Stopped: {num_done} of {num_games} games of {name} are judged. "
                "The same command goes on.",
            ) from None


@contextlib.contextmanager
def _stoppable() -> Iterator[list[int]]:
    """Make SIGTERM stop like Ctrl-C; the list gets the number of the signal."""
    received: list[int] = []

    def stop(signum: int, frame: Any) -> None:
        received.append(signum)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield received
    finally:
        signal.signal(signal.SIGTERM, before)
