"""Ask a judge for responses: with a progress bar, kept as they come, and stoppable."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import queue
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from typing import Any

from tqdm import tqdm

from jlrm.evaluation.games import Backend, Game, Response
from jlrm.evaluation.journal import Journal
from jlrm.runtime import commands, hosts

BLOCKS = 4  # that a host takes at least, where there are so many games
SHOWN = 3  # reasons why games have no response
POLL_SECONDS = 0.2
_numbers = itertools.count()  # of shared lists of games, in the same order on all hosts


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
            done = kept.done
            num_done = num_games - sum(game.id not in done for game in left)
            raise commands.Interrupted(
                stopped[-1] if stopped else signal.SIGINT,
                f"Stopped: {num_done} of {num_games} games of {name} are judged. "
                "The same command goes on.",
            ) from None


def in_blocks(judge: Backend, size: int, largest: int = 0) -> Backend:
    """Return a judge that each host has for itself, of blocks of `size` games.

    A host takes the next block when it is done with its last, so a slow one does not hold the
    others. Of many games blocks are larger, up to `largest` (0: `size`), so that each host takes
    several. Process 0 records what all of them judge, as it comes: `size` responses at a time.
    """

    def shared(games: Sequence[Game], record: Callable[[Response], None]) -> None:
        # Prompts of a block are padded to one length, and the longest take longest: first.
        ordered = sorted(games, key=lambda game: game.num_characters, reverse=True)
        own = max(size, min(largest, len(games) // (BLOCKS * hosts.count())))
        blocks = [ordered[start : start + own] for start in range(0, len(ordered), own)]
        name, left = f"games-{next(_numbers)}", len(blocks)

        def collect() -> int:
            """Record what has come, and return how many blocks it ends."""
            arrived = hosts.received(name)
            for responses, _ in arrived:
                for response in responses:
                    record(response)
            return sum(is_end for _, is_end in arrived)

        def take(number: int) -> None:
            waiting: list[Response] = []
            parts = itertools.count(number * (own + 1))

            def send(is_end: bool) -> None:
                nonlocal left
                hosts.send(name, next(parts), ([*waiting], is_end))
                waiting.clear()
                left -= collect() if hosts.is_main() else 0

            def keep(response: Response) -> None:
                waiting.append(response)
                if len(waiting) == size:
                    send(False)

            judge(blocks[number], keep)
            send(True)

        for number in hosts.taken(name, len(blocks)):
            take(number)
        while hosts.is_main() and left:
            time.sleep(POLL_SECONDS)
            left -= collect()
        hosts.gather("the end of the games", None)

    return shared if hosts.count() > 1 else judge


def drive(
    work: Callable[[Callable[[Response], None]], Coroutine[Any, Any, None]],
    record: Callable[[Response], None],
) -> None:
    """Run asynchronous work in a thread; what it records is recorded in this one.

    Signals raise in the main thread, wherever it is, and would tear an event loop there.

    Raises:
      KeyboardInterrupt: what was under way is dropped; what was recorded is complete.
    """
    responses: queue.SimpleQueue[Response | None] = queue.SimpleQueue()
    loop = asyncio.new_event_loop()
    task = loop.create_task(work(responses.put))

    def run() -> None:
        try:
            loop.run_until_complete(asyncio.wait([task]))
            loop.run_until_complete(loop.shutdown_asyncgens())
        finally:
            loop.close()
            responses.put(None)

    thread = threading.Thread(target=run, name="requests", daemon=True)
    thread.start()
    try:
        _record(responses, record)
    except BaseException as error:
        with contextlib.suppress(RuntimeError):  # the loop is closed: it was done just now
            loop.call_soon_threadsafe(task.cancel)
        thread.join()
        if isinstance(error, KeyboardInterrupt):
            responses.put(None)  # the first one may have been taken out
            _record(responses, record)
        raise
    thread.join()
    task.result()


def _record(
    responses: queue.SimpleQueue[Response | None], record: Callable[[Response], None]
) -> None:
    while (response := responses.get()) is not None:
        record(response)


def remarks(
    name: str, games: Sequence[Game], responses: Mapping[str, Response], are_refused_counted: bool
) -> Iterator[str]:
    """Yield what must be said of a benchmark's responses: those refused, missing, and cut off."""
    own = [response for game in games if (response := responses.get(game.id))]
    if refused := [each.refused for each in own if each.refused is not None]:
        meaning = (
            "They count as games without a verdict, by error_credit."
            if are_refused_counted
            else "They do not count; --policy refused=error_credit counts them by error_credit."
        )
        yield f"{name}: {_times(len(refused), games)} REFUSED: {_frequent(refused)}. {meaning}"
    if errors := [each.error for each in own if each.error is not None]:
        yield f"{name}: {_times(len(errors), games)} not judged: {_frequent(errors)}."
    if num_cut := sum("length" in (each.endings or ()) for each in own):
        yield (
            f"{name}: {_times(num_cut, games)} cut off at the limit of tokens. A larger "
            "--max-new-tokens, with another --out, lets them end."
        )


def _times(number: int, games: Sequence[Game]) -> str:
    return f"{number} of {len(games)} games {'was' if number == 1 else 'were'}"


def _frequent(reasons: Sequence[str]) -> str:
    counts = Counter(reason.rstrip(".") for reason in reasons).most_common()
    shown = "; ".join(f"{number} x {reason}" for reason, number in counts[:SHOWN])
    return shown + (f"; and {len(counts) - SHOWN} other reasons" if len(counts) > SHOWN else "")


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
