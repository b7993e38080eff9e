"""The thread that decodes: prompts wait, enter the slots that are free, and leave when they end.

It alone touches the devices. Between two blocks of tokens (sampling/slots.py) it takes in what has
come, lets go of what nobody waits for any more, and tells each client what was drawn. It knows ids
only: no text and no network.
"""

from __future__ import annotations

import collections
import functools
import itertools
import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Int

from jlrm.config import RunError, UsageError
from jlrm.data.batches import pad
from jlrm.model.qwen import Params
from jlrm.runtime.mesh import global_array
from jlrm.sampling import slots
from jlrm.sampling.decode import Prompts
from jlrm.sampling.policy import TextPolicy
from jlrm.sampling.slots import RUNNING, Entering, SlotSettings, Turns
from jlrm.sampling.stops import StopTables
from jlrm.sampling.writer import widths

log = logging.getLogger(__name__)

GROUPS = (1, 2, 4, 8)  # prompts that enter in one call; each is a program a width
FORGET = 0.9  # weight of what was before in the mean time of a completion


class Busy(Exception):
    """So many completions wait that no more are taken; `retry_after`: in seconds, an estimate."""

    def __init__(self, retry_after: int) -> None:
        super().__init__(f"Too many requests are waiting. Try again in {retry_after} s.")
        self.retry_after = retry_after


class Drawn(NamedTuple):
    """What a block has added to one completion of a prompt; `ending`: as in sampling/slots.py."""

    completion: int
    ids: list[int]
    ending: int


@dataclass(eq=False)
class Writing:
    """A prompt whose completions are being written.

    number: of the prompt, by which its random numbers are addressed. tell: called by the engine's
    thread with what each block has drawn, and with None if the engine has failed. num_stops: of a
    stop string, which end a completion.
    """

    prompt_ids: Sequence[int]
    max_new_tokens: int
    temperature: float
    seed: int
    number: int
    num_completions: int
    tell: Callable[[Drawn | None], None]
    num_stops: int = 2
    is_cancelled: bool = False
    began: float = 0.0  # when it entered its slots


@dataclass
class Counters:
    """What has been done since the start."""

    prompts: int = 0
    prompt_tokens: int = 0
    completions: int = 0
    tokens: int = 0
    cancelled: int = 0
    rejected: int = 0
    seconds: float = 0.0  # with something to decode


class Engine:
    """Slots of one model; `submit` and `cancel` may be called from any thread.

    ends: states of `stops` that end a completion, by its number of stop strings (`stops.ends`).
    """

    def __init__(
        self,
        policy: TextPolicy,
        weights: Callable[[], Params],
        settings: SlotSettings,
        stops: StopTables,
        ends: Int[np.ndarray, "N A"],
        most_waiting: int,
    ) -> None:
        self.settings, self.counters, self._ends = settings, Counters(), ends
        self._policy, self._weights, self._most_waiting = policy, weights, most_waiting
        layout = policy.decoding
        self._stops = StopTables._make(global_array(x, layout.replicated()) for x in stops)
        self._widths = widths(settings.max_prompt_tokens)
        self._shards = layout.num_shards("P")
        self._enter_program = jax.jit(
            functools.partial(slots.enter, policy.model, layout, settings), donate_argnums=1
        )
        self._holds: list[tuple[Writing, int] | None] = [None] * settings.num_slots
        self._waiting: collections.deque[Writing] = collections.deque()
        self._passes: collections.deque[tuple[Callable[[Params], Any], Future[Any]]] = (
            collections.deque()
        )
        self._changed = threading.Condition()
        self._is_closing, self.failure = False, ""
        self._seconds_each = 1.0  # of a completion in its slot
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._state: Any = None

    def start(self) -> None:
        """Read the weights, make room for all slots, and begin to serve."""
        layout, model = self._policy.decoding, self._policy.model
        self._weights()
        program = jax.jit(functools.partial(slots.empty, model, layout, self.settings))
        self._state = jax.block_until_ready(program(self._stops))
        self._thread.start()

    @property
    def gib(self) -> float:
        """Memory of the slots, on all devices."""
        leaves = jax.tree.leaves((self._state.prefix, self._state.caches))
        return sum(leaf.nbytes for leaf in leaves) / 2**30

    @property
    def num_waiting(self) -> int:
        """Completions that have no slot yet."""
        with self._changed:
            return sum(each.num_completions for each in self._waiting)

    @property
    def num_running(self) -> int:
        """Completions that are in a slot."""
        return sum(held is not None for held in self._holds)

    def submit(self, *writings: Writing) -> None:
        """Take in prompts together, or none of them.

        Raises:
          UsageError, Busy, RunError: as `check`.
        """
        with self._changed:
            coming = [each.num_completions for each in writings]
            self.check(sum(coming), max(coming, default=0))
            self._waiting.extend(writings)
            self._changed.notify()

    def check(self, coming: int, most: int) -> None:
        """Refuse completions that can't be taken in, of which a prompt has `most`.

        Raises:
          UsageError: more completions than there are slots for a prompt, or than may wait at all.
          Busy: too many wait.
          RunError: the engine has failed, or is closing.
        """
        num_slots = self.settings.num_slots
        if most > num_slots:
            raise UsageError(
                f"{most} texts at once are asked for, and the server has {num_slots} slots."
            )
        if coming > self._most_waiting:
            raise UsageError(
                f"{coming} judgements are asked for at once, and at most {self._most_waiting} are "
                "taken. Ask for fewer."
            )
        with self._changed:
            if self.failure or self._is_closing:
                raise RunError(self.failure or "The server is stopping.")
            if self.num_waiting + coming > self._most_waiting:
                self.counters.rejected += 1
                rounds = (self.num_waiting + coming) / num_slots
                raise Busy(max(1, math.ceil(rounds * self._seconds_each)))

    def run(self, work: Callable[[Params], Any]) -> Future[Any]:
        """Let the engine's thread do some other work with the weights, between two blocks.

        Raises:
          RunError: the engine has failed, or is closing.
        """
        future: Future[Any] = Future()
        with self._changed:
            self.check(0, 0)
            self._passes.append((work, future))
            self._changed.notify()
        return future

    def cancel(self, writing: Writing) -> None:
        """Let go of a prompt: nobody waits for it any more."""
        with self._changed:
            writing.is_cancelled = True
            self._changed.notify()

    def close(self) -> None:
        """Finish what has come, take in nothing more, and end the thread."""
        with self._changed:
            self._is_closing = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join()

    def wait(self) -> None:
        """Wait until the engine has ended, by `close` or by a failure."""
        self._thread.join()

    def _run(self) -> None:
        try:
            while self._wait():
                began = time.monotonic()
                self._pass()
                entering = self._next_group()
                if entering:
                    self._take(self._enter(entering))
                elif self.num_running:
                    self._take(self._advance())
                self.counters.seconds += time.monotonic() - began
        except Exception as error:  # the devices may raise anything
            log.exception("The engine has failed.")
            with self._changed:
                self.failure = f"The engine has failed: {type(error).__name__}: {error}"
                left = {id(held[0]): held[0] for held in self._holds if held}
                for writing in (*left.values(), *self._waiting):
                    writing.tell(None)
                self._waiting.clear()
                for _, future in self._passes:
                    future.set_exception(RunError(self.failure))
                self._passes.clear()

    def _pass(self) -> None:
        """Do one piece of other work, so that judgements under way go on after it."""
        with self._changed:
            if not self._passes:
                return
            work, future = self._passes.popleft()
        if not future.set_running_or_notify_cancel():
            return  # the client has left
        try:
            future.set_result(work(self._weights()))
        except UsageError as error:  # a tokenizer or a scale that it can't be done with
            future.set_exception(error)
        except Exception as error:
            future.set_exception(RunError(f"The engine has failed: {type(error).__name__}."))
            raise

    def _wait(self) -> bool:
        """Wait for something to do, and let go of what is cancelled; False: there is no more."""
        with self._changed:
            while True:
                kept = [each for each in self._waiting if not each.is_cancelled]
                gone = [each for each in self._waiting if each.is_cancelled]
                self.counters.cancelled += sum(each.num_completions for each in gone)
                self._waiting = collections.deque(kept)
                if self._waiting or self.num_running or self._passes:
                    return True
                if self._is_closing:
                    return False
                self._changed.wait()

    def _next_group(self) -> list[Writing]:
        """Take prompts of one width that there are slots for, from the front of the queue."""
        with self._changed:
            free = self._holds.count(None)
            if not self._waiting or self._waiting[0].num_completions > free:
                return []  # the first one waits for its slots, and those behind it for their turn
            group = [self._waiting.popleft()]
            width, votes = self._width(len(group[0].prompt_ids)), group[0].num_completions
            largest = max(GROUPS) if votes == 1 else 1
            while (
                self._waiting
                and len(group) < min(largest, free)
                and self._waiting[0].num_completions == votes
                and self._width(len(self._waiting[0].prompt_ids)) == width
            ):
                group.append(self._waiting.popleft())
            return group

    def _width(self, num_tokens: int) -> int:
        return next(width for width in self._widths if width >= num_tokens)

    def _enter(self, group: Sequence[Writing]) -> Turns:
        """Run the prompts of a group, and put each completion into a slot."""
        free = (slot for slot, held in enumerate(self._holds) if held is None)
        chosen = [list(itertools.islice(free, each.num_completions)) for each in group]
        for writing, places in zip(group, chosen, strict=True):
            writing.began = time.monotonic()
            for completion, slot in enumerate(places):
                self._holds[slot] = writing, completion
            self.counters.prompts += 1
            self.counters.prompt_tokens += len(writing.prompt_ids)
        # Filled up to a size that is compiled: by the last completion, and by the last prompt.
        num = self._shards * next(n for n in GROUPS if n * self._shards >= len(group))
        votes = 1 << (group[0].num_completions - 1).bit_length()
        rows = [*zip(group, chosen, strict=True)]
        rows += [rows[-1]] * (num - len(rows))
        filled = [list(enumerate(places)) for _, places in rows]
        filled = [[*own, *[own[-1]] * (votes - len(own))] for own in filled]
        entering = Entering(
            np.array([[slot for _, slot in own] for own in filled], np.int32),
            np.array([each.max_new_tokens for each, _ in rows], np.int32),
            np.array([each.temperature for each, _ in rows], np.float32),
            np.array(
                [
                    [(each.seed, each.number, i) for i, _ in own]
                    for (each, _), own in zip(rows, filled, strict=True)
                ],
                np.int32,
            ),
            self._ends[[each.num_stops - 1 for each, _ in rows]],
        )
        width = max(self._width(len(each.prompt_ids)) for each in group)
        tokens, lengths = pad([each.prompt_ids for each, _ in rows], width)
        layout = self._policy.decoding
        self._state, block = self._enter_program(
            self._weights(),
            self._state,
            Prompts(
                global_array(tokens, layout.activation("P T")),
                global_array(lengths, layout.activation("P")),
            ),
            entering,
            self._stops,
        )
        return jax.device_get(block)

    def _advance(self) -> Turns:
        """Draw a block of tokens in all slots that somebody waits for."""
        for slot, held in enumerate(self._holds):
            if held and held[0].is_cancelled:
                self._holds[slot] = None
                self.counters.cancelled += 1
        running = [held[0] for held in self._holds if held]
        is_wanted = np.array([held is not None for held in self._holds])
        width = self._width(max((len(each.prompt_ids) for each in running), default=1))
        self._state, block = self._advance_program(width)(
            self._weights(), self._state, is_wanted, self._stops
        )
        return jax.device_get(block)

    @functools.cache  # noqa: B019  # an engine lives as long as its process
    def _advance_program(self, width: int) -> Any:
        policy = self._policy
        bound = functools.partial(
            slots.advance, policy.model, policy.decoding, self.settings, width
        )
        return jax.jit(bound, donate_argnums=1)

    def _take(self, block: Turns) -> None:
        """Tell each client what was drawn for it, and free the slots of what has ended."""
        for slot, held in enumerate(self._holds):
            length = int(block.lengths[slot])
            if held is None or not length:
                continue
            writing, completion = held
            ending = int(block.endings[slot])
            self.counters.tokens += length
            if ending != RUNNING:
                self._holds[slot] = None
                self.counters.completions += 1
                took = time.monotonic() - writing.began
                self._seconds_each += (1 - FORGET) * (took - self._seconds_each)
            if not writing.is_cancelled:
                ids = block.tokens[slot, :length].tolist()
                writing.tell(Drawn(completion, ids, ending))
