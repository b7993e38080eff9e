"""What is prepared from what, and the steps that look at one row alone."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import math
import pathlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from jlrm.config import UsageError
from jlrm.data import readers
from jlrm.data.batches import count_tokens, prompt_encoder
from jlrm.data.comparisons import Comparison, Dropped
from jlrm.data.contamination import Benchmarks, read_benchmarks
from jlrm.data.tokenizer import load_tokenizer


@dataclass(frozen=True)
class Recipe:
    """What is prepared from what, and how; the fields are the command's flags."""

    input: Sequence[str]
    columns: dict[str, str] = dataclasses.field(default_factory=dict)
    values: dict[str, int] = dataclasses.field(default_factory=dict)
    scores: str = "score"
    validation: float = 0.02  # share of questions; 0: no validation split
    swap: bool = False
    tokenizer: str = ""  # empty: prompts are not measured
    prompt: str = "judgelrm_train"
    max_prompt_tokens: int = 1024
    against: Sequence[str] = ()
    ngram: int = 13  # words
    overlap: float = 0.5  # share of a question's n-grams

    def __post_init__(self) -> None:
        if not 0.0 <= self.validation < 1.0:
            raise UsageError(
                f"--validation={self.validation} is outside [0, 1): name a share of the questions."
            )
        if not 0.0 < self.overlap <= 1.0:
            raise UsageError(
                f"--overlap={self.overlap} is outside (0, 1]: name a share of a question's n-grams."
            )
        for flag, value in (("ngram", self.ngram), ("max-prompt-tokens", self.max_prompt_tokens)):
            if value < 1:
                raise UsageError(f"--{flag}={value} is too small: at least 1.")

    def nothing_seen(self) -> readers.Seen:
        """Return what is known of an input before its first row."""
        return readers.nothing_seen(self.columns, self.values)

    def splits(self) -> list[str]:
        """Return the names of the splits."""
        return ["train", "validation"] if self.validation else ["train"]


# ------------------------------------------------------------------------------------ reading a row


def stored_rows(
    recipe: Recipe, source: str, seen: readers.Seen, piece: readers.Portion = readers.WHOLE
) -> Iterator[Comparison | Dropped]:
    """Yield what an input, or a piece of it, holds. Scores are rounded to float32, as stored.

    Dropped on top of what the readers drop: "unstorable_scores", too large for float32, or two that
    differ by less than it can tell.
    """
    for row in readers.each_row(source, seen, recipe.columns, recipe.scores, piece=piece):
        if isinstance(row, Dropped):
            yield row
            continue
        stored = _as_stored(row)
        is_same = _order(stored) == _order(row)
        yield stored if is_same else Dropped.of(row, "unstorable_scores")


def _as_stored(row: Comparison) -> Comparison:
    if row.scores is None:
        return row
    with np.errstate(over="ignore"):  # `_order` sees the infinity
        first, second = (float(str(np.float32(score))) for score in row.scores)
    return dataclasses.replace(row, score_1=first, score_2=second)


def _order(row: Comparison) -> tuple[bool, ...] | None:
    """Return what of the scores must survive rounding: they are finite, and one is higher."""
    if row.scores is None:
        return None
    first, second = row.scores
    return max(row.scores) < math.inf, first > second, first < second


def is_local(source: str) -> bool:
    """Return whether a source is a file or a directory of this machine."""
    return any(pathlib.Path(name).expanduser().exists() for name in (source, _name(source)))


def _name(source: str) -> str:
    return source.rpartition("#")[0] or source


def fingerprint(row: Comparison) -> int:
    """Return a number of a row and its place; the sum over an input tells it from another one.

    A sum, since engines read the rows in any order.
    """
    return int.from_bytes(hashlib.sha256(f"{row.where.order} {row!r}".encode()).digest())


def fingerprints(recipe: Recipe) -> dict[str, int]:
    """Read the inputs that are not local; return for each the sum of its rows' fingerprints."""
    sums = dict.fromkeys(itertools.filterfalse(is_local, recipe.input), 0)
    for source in itertools.filterfalse(is_local, recipe.input):
        rows = readers.with_progress(stored_rows(recipe, source, recipe.nothing_seen()), source)
        sums[source] += sum(fingerprint(row) for row in rows if isinstance(row, Comparison))
    return sums


# ----------------------------------------------------------------------------------- checking a row


class Finding(NamedTuple):
    """What the checks say of a row."""

    reason: str = ""  # why it is left out, if it is
    benchmark: str = ""  # that asks its question
    num_tokens: int = 0  # of its prompt, where prompts are measured


class Checks:
    """What a row is checked for by itself: benchmarks' questions, and a prompt that is too long."""

    def __init__(
        self, recipe: Recipe, benchmarks: Benchmarks, tokenizer_dir: pathlib.Path | None
    ) -> None:
        self.questions, self.tokenizer_dir = benchmarks.questions, tokenizer_dir
        self._recipe, self._benchmarks, self._encode = recipe, benchmarks, None
        if tokenizer_dir is not None:
            self._encode = prompt_encoder(load_tokenizer(tokenizer_dir), recipe.prompt)

    @classmethod
    def of(cls, recipe: Recipe) -> Checks:
        """Read the benchmarks and the tokenizer of a recipe.

        Raises:
          UsageError: one of them can't be read.
        """
        benchmarks = read_benchmarks(recipe.against, recipe.ngram)
        return cls(recipe, benchmarks, _find_tokenizer(recipe.tokenizer))

    @property
    def is_idle(self) -> bool:
        """Whether every row passes."""
        return not self._recipe.against and self._encode is None

    def __call__(self, rows: Sequence[Comparison]) -> list[Finding]:
        """Check rows, best some hundred of them at a time."""
        questions = [row.question for row in rows]
        found = self._benchmarks.find(questions, self._recipe.overlap)
        checked = [Finding(*each) for each in found]
        clean = [i for i, each in enumerate(checked) if not each.reason]
        for i, count in zip(clean, self._prompt_tokens([rows[i] for i in clean]), strict=True):
            is_over = count > self._recipe.max_prompt_tokens
            checked[i] = Finding("overlong" if is_over else "", "", count)
        return checked

    def _prompt_tokens(self, rows: Sequence[Comparison]) -> list[int]:
        """Count the tokens of each prompt, as training makes it; of both orders the longer."""
        if self._encode is None:
            return [0] * len(rows)
        orders = 2 if self._recipe.swap else 1
        both = [way for row in rows for way in (row, row.swapped())[:orders]]
        lengths = count_tokens(both, self._encode)[:, 0]
        return lengths.reshape(len(rows), orders).max(axis=1, initial=0).tolist()


def _find_tokenizer(source: str) -> pathlib.Path | None:
    if not source:
        return None
    from jlrm.weights import hf  # brings JAX, which nothing else here needs

    return hf.resolve(source, hf.TOKENIZER_FILES)
