"""The reward of one judgement, term by term: structure, order, distance, margin, length.

A response is read once (`read`), and its verdict is paid (`pay`). The verdict that is paid is also
the one that metrics, tables and the held-out set count, so that nothing can rank a response as
right which the reward calls malformed.

Every term is a small function with a weight in `RewardConfig`; 0 switches it off. A row that has a
preference alone is paid `preference` where a scored row is paid `relation`, `absolute` and
`confidence`. A term that does not apply to a row is None: neither paid nor in the term's mean.

Two modes share the terms. They differ in how scores are read and in what counts as the right order:

judgelrm            what the authors' code pays, quirks included. The text is prompt + completion,
                    cut at the first `Assistant:` in either; a score is what `int()` accepts; a tie
                    counts as "answer 1 at least as good", so that swapping the answers can change
                    the reward. `JUDGELRM` below is the setting of the main model; the authors'
                    `base_reward` adds length=0.2 and limit=-1.0, their `reward_wo_score` has
                    absolute_exact, absolute_near and confidence at 0.
judgelrm_symmetric  the paper's formula. The order is the sign of the difference, scores come from
                    the completion alone, decimals are allowed, and swapping changes nothing.

An answer that is judged alone is paid for the pairs that its score makes with the scores of the
other answer (`pay_beside`), and a list for the pairs of its answers (`pay_list`).
`swap_consistency` needs both orders of a pair, so it comes after the rows are scored (`withhold`).

Left out: rewards of users (judgement/plugins.py), means over a batch, advantages, devices. A failed
judgement earns what the settings say; a label that mode judgelrm_symmetric can't use stops the run.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from jlrm.config import RewardConfig, UsageError
from jlrm.judgement.blocks import split_tags
from jlrm.judgement.prompts import ends_in_rubric
from jlrm.judgement.verdict import (
    Status,
    Verdict,
    implied_probability,
    is_consistent,
    parse,
    preferred,
    structure,
    swap_preference,
)

Terms = dict[str, float | None]
Gold = tuple[Sequence[Any] | None, int | None]  # scores, and a preference

CONTENT = ("relation", "preference", "absolute", "confidence", "brier")
TERMS = ("format", "no_verdict", *CONTENT, "length", "overlong")

# The main model: the authors' `reward_w_length`, which pays nothing for length despite its name.
JUDGELRM = RewardConfig(mode="judgelrm", no_verdict=-2.0, min_score=0)


def read(config: RewardConfig, prompt: str, response: str, num_scores: int = 2) -> Verdict:
    """Read a response by the grammar that the mode pays: its verdict is "ok" or earns nothing.

    num_scores: as many as there are answers; mode judgelrm knows two alone.
    Mode judgelrm reads as the authors' code does, which looks at the prompt too. The other modes
    read the response alone, by the strict grammar of judgement/verdict.py. Where the prompt opens
    `<rubric>` that grammar begins with a rubric, and without one nothing is paid but `malformed`.
    """
    if config.mode == "judgelrm":
        return _authors_verdict(config, prompt, response)
    return parse(
        response,
        min_score=config.min_score,
        max_score=config.max_score,
        num_scores=num_scores,
        has_rubric=ends_in_rubric(prompt),
    )


def pay(
    config: RewardConfig,
    verdict: Verdict,
    *,
    gold: Sequence[Any] | None = None,
    preference: int | None = None,
    num_tokens: int,
    max_tokens: int,
) -> Terms:
    """Return the reward terms of one verdict, as `read` returns it; their sum is the reward.

    gold: the two gold scores, None where only a preference is known. Mode judgelrm also reads a
    one-element sequence with a text that begins with a line of two integers, and scores any other
    gold as no verdict.
    preference: 1, 2, or 0 for a tie; read by mode judgelrm_symmetric where gold is None.
    num_tokens: tokens of the completion; max_tokens: the limit it was sampled under.
    Source: paper v3 Eq. 1-5 and 9; the authors' `reward_score/judgelrm.py`.
    Raises UsageError in mode judgelrm_symmetric where there is neither.
    """
    overlong = overlong_term(config, num_tokens, max_tokens)
    if config.mode == "none":
        return {**dict.fromkeys(TERMS), "overlong": overlong if config.overlong else None}
    length = length_term(config, num_tokens, max_tokens)
    if config.mode == "judgelrm":
        terms = _judgelrm(config, verdict, () if gold is None else gold, length)
    else:
        terms = _symmetric(config, verdict, gold, preference, length)
    return {**terms, "overlong": overlong}


def pay_beside(
    config: RewardConfig, verdict: Verdict, others: Sequence[Verdict], **known: Any
) -> Terms:
    """Return the terms of a verdict on one answer; `others` are verdicts on the answer beside it.

    It is paid as `pay` pays the pairs that it makes with them, on average. So `relation`, or
    `preference`, tells which share of the others' scores it is on the right side of (IRPM, arXiv
    2601.00677). Others without a score make no pair; without any pair no term of content applies.

    known: the rest of what `pay` is given; gold and preference are those of the pair, this answer
    first.
    """
    if verdict.score_1 is None:
        return pay(config, verdict, **known)
    pairs = [verdict.beside(other) for other in others if other.score_1 is not None]
    if not pairs:
        return {**pay(config, verdict.beside(verdict), **known), **dict.fromkeys(CONTENT)}
    paid = [pay(config, pair, **known) for pair in pairs]
    return {name: _mean([terms[name] for terms in paid]) for name in paid[0]}


def pay_list(
    config: RewardConfig, verdict: Verdict, golds: Mapping[tuple[int, int], Gold], **known: Any
) -> Terms:
    """Return the terms of a verdict on a list: what `pay` pays its pairs, on average.

    So `relation`, or `preference`, tells in which share of the pairs scores and gold agree.

    golds: of each pair of answers (counted from 0) that has gold, its scores and its preference.
    known: the rest of what `pay` is given.
    """
    paid = [
        pay(config, verdict.of_pair(*pair), gold=scores, preference=preference, **known)
        for pair, (scores, preference) in golds.items()
    ]
    return {name: _mean([terms[name] for terms in paid]) for name in paid[0]}


def _mean(values: Sequence[float | None]) -> float | None:
    applied = [value for value in values if value is not None]
    return statistics.fmean(applied) if applied else None


def total(terms: Mapping[str, float | None]) -> float:
    """Sum the terms of one completion that apply to it."""
    return sum(value for value in terms.values() if value is not None)


def doubts(config: RewardConfig) -> list[str]:
    """Return what speaks against a choice of terms that is allowed, as sentences for people."""
    if not (config.brier and config.confidence):
        return []
    return [
        f"reward.confidence={config.confidence} pays a right verdict for a wide margin, however "
        "unsure the judge is. reward.brier pays for a margin that shows how sure it is. They work "
        "against each other: set reward.confidence=0 beside reward.brier."
    ]


def withhold(config: RewardConfig, terms: Terms, verdict: Verdict, other: Verdict) -> float:
    """Return what a verdict loses when the one on the same pair in the other order contradicts it.

    That is `swap_consistency` times what its content earned, as a negative number; 0 where both
    name the same answer, or where the content earned nothing. A missing verdict contradicts. At
    `swap_consistency: 1` a verdict that flips is paid for its structure alone.
    """
    if is_consistent(verdict.preference, swap_preference(other.preference)):
        return 0.0
    earned = sum(terms[name] or 0.0 for name in CONTENT)
    return -config.swap_consistency * max(earned, 0.0)


def length_term(config: RewardConfig, num_tokens: int, max_tokens: int) -> float:
    """Pay for a judgement above `length_tokens`, and for one that reached the limit."""
    paid = config.length if num_tokens > config.length_tokens else 0.0
    return paid + (config.limit if num_tokens >= max_tokens else 0.0)


def overlong_term(config: RewardConfig, num_tokens: int, max_tokens: int) -> float:
    """Pay for a completion near the token limit, more the nearer (DAPO, arXiv 2503.14476, Eq. 13).

    Unlike `length_term` it is paid without a verdict too: a completion that was cut has none.
    """
    last = max(config.overlong_share * max_tokens, 1.0)
    return config.overlong * min(max((num_tokens - max_tokens) / last + 1.0, 0.0), 1.0)


def absolute_term(config: RewardConfig, scores: Sequence[float], gold: Sequence[float]) -> float:
    """Pay for scores equal or near to gold's, by the distance of both together."""
    distance = abs(scores[0] - gold[0]) + abs(scores[1] - gold[1])
    if distance == 0:
        return config.absolute_exact
    return config.absolute_near if distance <= config.near_distance else 0.0


def confidence_term(config: RewardConfig, scores: Sequence[float], gold: Sequence[float]) -> float:
    """Pay for a margin at least gold's."""
    return config.confidence if abs(scores[0] - scores[1]) >= abs(gold[0] - gold[1]) else 0.0


def brier_term(config: RewardConfig, scores: Sequence[float], label: int) -> float:
    """Pay the quadratic score of the probability that the margin gives to answer 1.

    1 - 4 (p - y)^2 with y = 1, 0, or 1/2 for a tie: certain and right earns 1, no margin 0 (on a
    pair that is no tie), certain and wrong -3. The expectation is highest where p is the true
    probability, so a judge gains nothing by claiming more than it knows (Brier, 1950).
    """
    span = config.certain_margin or config.max_score - config.min_score
    truth = {1: 1.0, 2: 0.0, 0: 0.5}[label]
    return config.brier * (
        1.0 - 4.0 * (implied_probability(scores[0], scores[1], span) - truth) ** 2
    )


def content_terms(
    config: RewardConfig, scores: Sequence[float], gold: Sequence[float], *, is_right: bool
) -> Terms:
    """Compare scores with gold; distance and margin count only where the order is right.

    A term without weight is not computed: gold given as text has an order but no distance.
    """
    if not is_right:
        return {"relation": config.wrong_relation}
    terms: Terms = {"relation": config.relation}
    if config.absolute_exact or config.absolute_near:
        terms["absolute"] = absolute_term(config, scores, gold)
    if config.confidence:
        terms["confidence"] = confidence_term(config, scores, gold)
    return terms


def _structure_pay(config: RewardConfig, status: Status) -> float:
    if status in ("ok", "no_header"):
        return config.format
    # Tags in order around no score of the scale: the lesser fault, in the authors' code too.
    is_structured = status in ("out_of_range", "not_a_number")
    return config.out_of_range if is_structured else config.malformed


def _symmetric(
    config: RewardConfig,
    verdict: Verdict,
    gold: Sequence[float] | None,
    preference: int | None,
    length: float,
) -> Terms:
    label = _label(gold, preference)
    structure_pay = _structure_pay(config, verdict.status)
    if verdict.scores is None:
        return _terms(gold, format=structure_pay, no_verdict=config.no_verdict)
    is_right = verdict.preference == label
    if gold is None:
        paid = config.preference if is_right else config.wrong_preference
        content: Terms = {"preference": paid}
    else:
        content = content_terms(config, verdict.scores, gold, is_right=is_right)
    content["brier"] = brier_term(config, verdict.scores, label)
    return _terms(gold, format=structure_pay, length=length, **content)


def _label(gold: Sequence[float] | None, preference: int | None) -> int:
    """The better answer by scores, or by the preference where there are none; 0 for a tie."""
    if gold is None and preference in (0, 1, 2):
        return preference
    if gold is None or len(gold) != 2 or not all(math.isfinite(g) and g >= 0 for g in gold):
        raise UsageError(
            f"gold={gold!r} is no pair of scores and preference={preference!r} none of 0, 1, 2. "
            "Wanted two finite numbers, neither negative (JudgeLM marks a failed review by -1), or "
            "a preference. Leave the row out."
        )
    return preferred(gold[0], gold[1])


def _judgelrm(config: RewardConfig, verdict: Verdict, gold: Sequence[Any], length: float) -> Terms:
    label, scores = _authors_gold(gold), verdict.scores
    if label is None:
        return _terms(gold, no_verdict=config.no_verdict)
    structure_pay = _structure_pay(config, verdict.status)
    if scores is None:
        return _terms(gold, format=structure_pay, no_verdict=config.no_verdict)
    is_right = (label[0] >= label[1]) == (scores[0] >= scores[1])
    try:
        content = content_terms(config, scores, label, is_right=is_right)
    except TypeError:  # gold as two texts: the authors' code pays this and the length term
        content = {"no_verdict": config.no_verdict}
    return _terms(gold, format=structure_pay, length=length, **content)


def _authors_gold(gold: Sequence[Any]) -> Sequence[Any] | None:
    """Two elements of any kind as they are, else two integers on the first line of element 0.

    The authors demand a NumPy array and fail on a list; here any sequence stands for that array.
    """
    if isinstance(gold, str):
        return None
    if len(gold) == 2:
        return gold
    if len(gold) == 0 or not isinstance(gold[0], str):
        return None
    try:
        label = [int(word) for word in gold[0].partition("\n")[0].split()]
    except ValueError:
        return None
    return label if len(label) == 2 else None


def _authors_verdict(config: RewardConfig, prompt: str, response: str) -> Verdict:
    """Read prompt and response as one text, cut at its first header.

    Counting tags, ordering their first positions and matching two answer blocks, as the authors
    do, admits exactly one sequence of tags.
    """
    text, reasoning = prompt + response, response.partition("</think>")[0].strip()
    header = next((h for h in ("Assistant:", "<|im_start|>assistant") if h in text), None)
    tags, texts = split_tags(text.partition(header)[2] if header else text)
    status = structure(tags[1:]) if tags[:1] == ["<think>"] else "no_think_begin"
    if status != "ok":
        return Verdict(None, None, status, reasoning)
    try:
        # int() alone keeps separators such as \x1c that strip() takes off.
        scores = int(texts[3].strip()), int(texts[5].strip())
    except ValueError:
        return Verdict(None, None, "not_a_number", reasoning)
    if not all(config.min_score <= score <= config.max_score for score in scores):
        return Verdict(None, None, "out_of_range", reasoning)
    if header is None:
        return Verdict(None, None, "no_header", reasoning)
    return Verdict(*scores, "ok", reasoning)


def _terms(gold: Sequence[Any] | None, **given: float | None) -> Terms:
    """All terms; what is not given is 0, or None where the row's kind of label has no such term."""
    absent = ("preference",) if gold is not None else ("relation", "absolute", "confidence")
    return {name: None if name in absent else given.get(name, 0.0) for name in TERMS}
