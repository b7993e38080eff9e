"""How verdicts are counted: what a policy is, and how its fields are overridden.

Published numbers of one judge on one benchmark differ by 4 to 20 points with the rules of counting,
so these are data. The file of a benchmark lists its policies. The first is its official rule, or
the usual one where there is none; every field can be overridden, and results say which policy they
follow.

Order. as_given: the answers as the benchmark stores them (often the better one first); random: one
order per pair, drawn by seed and item; both: two games per pair.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from jlrm.config import UsageError, nearest


@dataclass(frozen=True)
class Policy:
    """What a benchmark does with verdicts."""

    # How games make an item's credit and items the result. mean, majority (more than half of its
    # games' credit), all (the least credit of its games); else see the benchmark's own file.
    aggregation: str
    order: Literal["as_given", "random", "both"]
    # Of a verdict "tie" where one answer is better. "second": a tie names the answer shown second;
    # "shared": divided among the best answers.
    tie_credit: float | Literal["second", "shared"]
    # Of a game without a verdict. "tie": as if the verdict were a tie.
    error_credit: float | Literal["tie"]
    # Of a game that the judge, or a filter before it, refuses for what is in it. unjudged: its item
    # does not count; error_credit: as a game without a verdict.
    refused: Literal["unjudged", "error_credit"] = "unjudged"

    @property
    def counts_refused(self) -> bool:
        """Whether refused games count."""
        return self.refused == "error_credit"


def pair_policies(official: Policy) -> tuple[Policy, ...]:
    """Return the policies of a benchmark of pairs, the given one first."""
    usual = (
        Policy("mean", "both", 0.5, 0.0),
        Policy("majority", "both", 0.5, 0.5),
        Policy("all", "both", 0.0, 0.0),
    )
    return official, *(each for each in usual if each.aggregation != official.aggregation)


WORDS = {"order": ("as_given", "random", "both"), "refused": ("unjudged", "error_credit")}
FIELDS = tuple(field.name for field in dataclasses.fields(Policy))


def overridden(
    benchmark: str, known: Sequence[Policy], overrides: Sequence[str], benchmarks: Collection[str]
) -> Policy:
    """Return the first of a benchmark's policies with overrides such as `order=both`.

    `aggregation=NAME` takes the entry of that name, with its own defaults for the other fields. A
    key may name the benchmark that it is for, `judgebench.order=as_given`; others skip it.

    Raises:
      UsageError: an unknown key or benchmark, or a value that the benchmark can't use.
    """
    parsed = (_parsed(text, benchmark, benchmarks) for text in overrides)
    chosen = dict(filter(None, parsed))
    policy = known[0]
    if wanted := chosen.pop("aggregation", ""):
        names = [each.aggregation for each in known]
        if wanted not in names:
            raise UsageError(
                f"--policy aggregation={wanted}: {benchmark} has {', '.join(names)}. "
                f"{nearest(wanted, names)}"
            )
        policy = known[names.index(wanted)]
    is_ranked = policy.tie_credit == "shared"  # its credit is not one game's
    changes = {key: _value(benchmark, is_ranked, key, text) for key, text in chosen.items()}
    return dataclasses.replace(policy, **changes)


def _parsed(text: str, benchmark: str, benchmarks: Collection[str]) -> tuple[str, str] | None:
    key, separator, value = text.partition("=")
    owner, dot, field = key.rpartition(".")
    if not separator or not value:
        raise UsageError(f"--policy {text}: wanted KEY=VALUE, e.g. order=both.")
    if dot and owner not in benchmarks:
        raise UsageError(f"--policy {text}: no benchmark '{owner}'. {nearest(owner, benchmarks)}")
    if field not in FIELDS:
        raise UsageError(f"--policy {text}: unknown key '{field}'. {nearest(field, FIELDS)}")
    return None if dot and owner != benchmark else (field, value)


def _value(benchmark: str, is_ranked: bool, key: str, text: str) -> Any:
    if key in WORDS:
        if text not in WORDS[key]:
            raise UsageError(f"--policy {key}={text}: wanted one of {', '.join(WORDS[key])}.")
        return text
    words = {"tie_credit": ["shared" if is_ranked else "second"], "error_credit": ["tie"]}[key]
    if is_ranked and key == "error_credit":
        words = []
    if text in words:
        return text
    try:
        credit = float(text)
    except ValueError:
        credit = math.nan
    if not 0.0 <= credit <= 1.0:
        more = "".join(f" or '{word}'" for word in words)
        raise UsageError(
            f"--policy {key}={text}: {benchmark} wants a number from 0 to 1{more} here."
        )
    return credit
