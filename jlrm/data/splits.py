"""Which rows a run learns from, and which it holds out: by whole questions, never by rows."""

from __future__ import annotations

import dataclasses
import logging
import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int, UInt64

from jlrm.config import DataConfig, UsageError
from jlrm.data import scales, sharded
from jlrm.data.batches import Examples, encode_prompts
from jlrm.data.comparisons import (
    SWAPPED,
    Comparison,
    Dropped,
    describe_dropped,
    question_key,
)
from jlrm.data.contamination import warn_of_benchmark
from jlrm.data.sharded import ShardedRows
from jlrm.data.tokenizer import Tokenizer
from jlrm.data.worlds import toy
from jlrm.judgement.verdict import swap_preference

log = logging.getLogger(__name__)

USUAL_HELDOUT = 200  # comparisons: enough to see a few points of agreement
LARGEST_SHARE = 5  # of small data no more than one row in five is held out


class Splits(NamedTuple):
    """Training rows, held-out rows, and what was left out of both."""

    train: ShardedRows
    heldout: ShardedRows
    dropped: list[Dropped]


def read_splits(data: DataConfig, scale: tuple[int, int], needs_scores: bool) -> Splits:
    """Read the sources of a run; `needs_scores` leaves out rows that have a preference alone.

    With `data.gold: shuffled` training rows lose what their gold says; held-out rows keep it. With
    `majority` training rows need no label, and only rows that have one are held out.
    Gold scores outside `scale`, the judge's, are counted and said, and only their order is kept.

    Raises:
      UsageError: a source that can't be read, or that leaves nothing to train on.
    """
    splits = _as_given(data, scale, needs_scores)
    if data.gold != "shuffled":
        return splits
    log.warning("data.gold=shuffled: a control, whose training gold says nothing")
    train = dataclasses.replace(splits.train, mine=[_by_chance(row) for row in splits.train.mine])
    return splits._replace(train=train)


def _as_given(data: DataConfig, scale: tuple[int, int], needs_scores: bool) -> Splits:
    if data.train == "toy" and data.judging == "lists":
        raise UsageError("data.train=toy has pairs. Lists of answers has data.train=lists-many.")
    if data.train == "toy":
        train = sharded.deal(toy.comparisons(1, toy.NUM_TRAIN))
        num_heldout = data.eval_rows or USUAL_HELDOUT
        return Splits(train, sharded.deal(toy.comparisons(2, num_heldout)), [])
    warn_of_benchmark(data.train)
    needs_label = data.gold != "majority"
    train, dropped = _read(data, data.train, scale, needs_scores, needs_label)
    questions = train.questions(data.folding)
    is_labelled = train.flags("rows with a label", lambda row: row.label is not None)
    if not is_labelled.all():
        log.warning(
            "%s: %d of %d rows have no label: the majority of the judgements of each is its gold",
            *(data.train, np.sum(~is_labelled), len(train)),
        )
    if data.eval:
        rows, dropped_too = _read(data, data.eval, scale, needs_scores)
        theirs = rows.questions(data.folding)
        heldout, _ = _hold_out(theirs, data.eval_rows or USUAL_HELDOUT, np.ones(len(rows), bool))
        num_shared = len(np.intersect1d(questions, theirs[heldout]))
        if num_shared:
            log.warning("%d held-out questions are in %s too", num_shared, data.train)
        return Splits(train, rows.select(heldout), [*dropped, *dropped_too])
    if not is_labelled.any():
        raise UsageError(
            f"None of the {len(train)} rows of {data.train} has a label, and held-out rows need "
            "one. Name labelled ones in data.eval."
        )
    num_heldout = data.eval_rows or min(USUAL_HELDOUT, max(1, len(train) // LARGEST_SHARE))
    heldout, rest = _hold_out(questions, num_heldout, is_labelled)
    if not len(rest):
        num_questions = len(np.unique(questions))
        raise UsageError(
            f"{data.train} has {len(train)} usable rows with {num_questions} different questions. "
            f"A question is trained on or held out, and data.eval_rows={num_heldout} would hold "
            "all of them out. Lower it, or name a data.eval file."
        )
    if num_heldout < USUAL_HELDOUT and not data.eval_rows:
        log.warning(
            "%s is small: %d of its %d rows are held out, %d are trained on (data.eval_rows or "
            "data.eval set what is held out)",
            *(data.train, len(heldout), len(train), len(rest)),
        )
    if num_between := len(train) - len(heldout) - len(rest):
        log.warning(
            "%s: %d rows ask a question that is held out, beyond data.eval_rows: they are neither "
            "held out nor trained on",
            *(data.train, num_between),
        )
    return Splits(train.select(rest), train.select(heldout), dropped)


def encode_splits(
    splits: Splits, tokenizer: Tokenizer, data: DataConfig, scale: tuple[int, int]
) -> tuple[Examples, Examples]:
    """Return the training and held-out rows that fit, the latter in both orders.

    With `data.orders: both` training row 2i+1 is row 2i in the other order. With `data.judging:
    single` it is too, and the prompt of each shows what is answer 1 there. The held-out rows come
    all as given, then all swapped.

    Raises:
      UsageError: no row fits, or rows that are swapped already would be swapped back.
    """
    rows, together = splits.train, 1
    if data.prompts_of_row == 2:
        if rows.flags("swapped rows", lambda row: row.id.endswith(SWAPPED)).any():
            raise UsageError(
                f"{data.train} holds swapped rows already (prepared with --swap), and data.orders="
                "both or data.judging=single would swap them back. Prepare it anew without them."
            )
        rows, together = rows.in_both_orders(), 2
    train = encode_prompts(rows, tokenizer, data, scale, together=together, progress="tokenise")
    if train.dropped:
        log.warning(
            "%d of %d training rows left out: prompts over data.max_prompt_tokens=%d",
            len(train.dropped),
            len(splits.train),
            data.max_prompt_tokens,
        )
    # A pair stands together while it is encoded: both of its orders fit, or neither is asked.
    pairs = encode_prompts(splits.heldout.in_both_orders(), tokenizer, data, scale, together=2)
    if pairs.dropped:
        log.warning("%d of %d held-out rows left out", len(pairs.dropped), len(splits.heldout))
    places = range(len(pairs))
    return train, pairs.select([*places[::2], *places[1::2]])


def _read(
    data: DataConfig,
    source: str,
    scale: tuple[int, int],
    needs_scores: bool,
    needs_label: bool = True,
) -> tuple[ShardedRows, list[Dropped]]:
    rows, dropped = sharded.read(
        source,
        columns=data.columns,
        values=data.values,
        scores=data.scores,
        is_listed=data.judging == "lists",
        needs_label=needs_label,
    )
    rows = scales.rescaled(rows, data.rescale)
    if said := scales.describe_off_scale(rows, scale, source):
        order = "such scores count by their order alone, as a preference"
        log.warning(
            "%s Until then %s.", said, "negative ones are no gold" if needs_scores else order
        )
    # The authors' reward compares whatever is not negative: JudgeLM has a few scores of 0.
    rows = scales.without_off_scale(rows, (0, math.inf) if needs_scores else scale)
    if needs_scores:
        is_scored = rows.flags("rows with scores", lambda row: row.scores is not None)
        if not is_scored.any():
            raise UsageError(
                f"{source} has no scores that reward.mode=judgelrm can use, only preferences. Set "
                "reward.mode=judgelrm_symmetric, which is paid by preferences too."
            )
        dropped = [*dropped, *rows.left_out(np.flatnonzero(~is_scored), "no_scores")]
        rows = rows.select(np.flatnonzero(is_scored))
    if dropped:
        log.warning("%s: left out %s", source, describe_dropped(dropped))
    return rows, dropped


def _by_chance(row: Comparison) -> Comparison:
    """Return the row with its gold turned round, or as it is, whatever the order of its answers.

    The written judgement stays: a control of GRPO begins where the run begins that it is compared
    with.
    """
    texts = "\n".join((row.question, *sorted((row.answer_1, row.answer_2))))
    if question_key(texts, "text") % 2:
        return row
    written = {"judged": row.judgement[1]} if row.judgement else {}
    return dataclasses.replace(
        row,
        score_1=row.score_2,
        score_2=row.score_1,
        preference=swap_preference(row.preference),
        meta={**row.meta, **written},
    )


def _hold_out(
    questions: UInt64[np.ndarray, " N"], num_rows: int, is_labelled: Bool[np.ndarray, " N"]
) -> tuple[Int[np.ndarray, " H"], Int[np.ndarray, " M"]]:
    """Return which labelled rows are held out, and rows whose questions are not among theirs."""
    in_order = np.argsort(questions, kind="stable")
    heldout = in_order[is_labelled[in_order]][:num_rows]
    return heldout, np.flatnonzero(~np.isin(questions, questions[heldout]))
