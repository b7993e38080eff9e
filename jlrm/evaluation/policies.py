"""How verdicts are counted: one table for all benchmarks.

Published numbers of one judge on one benchmark differ by 4 to 20 points with the rules of counting,
so these are data. The first entry of a benchmark is its official rule, or the usual one where there
is none; every field can be overridden, and results say which policy they follow.

Order. as_given: the answers as the benchmark stores them (often the better one first); random: one
order per pair, drawn by seed and item; both: two games per pair.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
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


def _pairs(aggregation: str, default: Policy) -> tuple[Policy, ...]:
    """Return the policies of a benchmark of pairs, the given one first."""
    others = {
        "mean": Policy("mean", "both", 0.5, 0.0),
        "majority": Policy("majority", "both", 0.5, 0.5),
        "all": Policy("all", "both", 0.0, 0.0),
    }
    return default, *(policy for name, policy in others.items() if name != aggregation)


POLICIES: dict[str, tuple[Policy, ...]] = {
    # baaivision/JudgeLM, judgelm/llm_judge/eval_model_judgement.py: unreadable is a draw
    "judgelm": (
        Policy("first_order", "both", 0.0, "tie"),
        Policy("pooled", "both", 0.0, "tie"),
    ),
    # JudgeLRM, pandalm/calculate_result.py: unreadable is a tie
    "pandalm": (
        Policy("first_order", "as_given", 0.0, "tie"),
        Policy("pooled", "both", 0.0, "tie"),
    ),
    # allenai/reward-bench, scripts/run_generative.py (there the order is drawn without a seed)
    "rewardbench": _pairs("mean", Policy("mean", "random", 0.5, 0.5)),
    # allenai/reward-bench, scripts/run_generative_v2.py and rewardbench/utils.py, for single scores
    "rewardbench2": (
        Policy("round_robin", "both", "shared", 0.25),
        Policy("all_wins", "both", 0.0, 0.0),
    ),
    # THU-KEG/RM-Bench, scripts/utils.py: a win is a strictly higher score
    "rmbench": (Policy("matrix", "random", 0.0, 0.0),),
    # ScalerLab/JudgeBench, utils/metrics.py: +1 right, -1 wrong, 0 else, and the sum above 0
    "judgebench": _pairs("majority", Policy("majority", "both", 0.5, 0.5)),
    # princeton-nlp/LLMBar, the rule of its rating evaluators; it has none for errors
    "llmbar": _pairs("mean", Policy("mean", "both", "second", 0.0)),
    # No official rule for judges; these are the usual ones.
    "helpsteer3": _pairs("mean", Policy("mean", "random", 0.5, 0.0)),
    "ppe_preference": _pairs("mean", Policy("mean", "random", 0.5, 0.0)),
    "ppe_correctness": _pairs("mean", Policy("mean", "random", 0.5, 0.0)),
    "rmb": _pairs("mean", Policy("mean", "random", 0.5, 0.0)),
    "pairs": (
        *_pairs("mean", Policy("mean", "both", 0.5, 0.0)),
        Policy("first_order", "both", 0.0, 0.0),  # three classes, as training's held-out set
        Policy("pooled", "both", 0.0, 0.0),
    ),
}
ORDERS = ("as_given", "random", "both")
FIELDS = tuple(field.name for field in dataclasses.fields(Policy))


def policy_of(benchmark: str, overrides: Sequence[str] = ()) -> Policy:
    """Return the policy of a benchmark with overrides such as `order=both`.

    `aggregation=NAME` takes the entry of that name, with its own defaults for the other fields. A
    key may name the benchmark that it is for, `judgebench.order=as_given`; others skip it.

    Raises:
      UsageError: an unknown key or benchmark, or a value that the benchmark can't use.
    """
    known = POLICIES[benchmark]
    chosen = dict(filter(None, (_parsed(text, benchmark) for text in overrides)))
    policy = known[0]
    if wanted := chosen.pop("aggregation", ""):
        names = [each.aggregation for each in known]
        if wanted not in names:
            raise UsageError(
                f"--policy aggregation={wanted}: {benchmark} has {', '.join(names)}. "
                f"{nearest(wanted, names)}"
            )
        policy = known[names.index(wanted)]
    changes = {key: _value(benchmark, key, text) for key, text in chosen.items()}
    return dataclasses.replace(policy, **changes)


def _parsed(text: str, benchmark: str) -> tuple[str, str] | None:
    key, separator, value = text.partition("=")
    owner, dot, field = key.rpartition(".")
    if not separator or not value:
        raise UsageError(f"--policy {text}: wanted KEY=VALUE, e.g. order=both.")
    if dot and owner not in POLICIES:
        raise UsageError(f"--policy {text}: no benchmark '{owner}'. {nearest(owner, POLICIES)}")
    if field not in FIELDS:
        raise UsageError(f"--policy {text}: unknown key '{field}'. {nearest(field, FIELDS)}")
    return None if dot and owner != benchmark else (field, value)


def _value(benchmark: str, key: str, text: str) -> Any:
    if key == "order":
        if text not in ORDERS:
            raise UsageError(f"--policy order={text}: wanted one of {', '.join(ORDERS)}.")
        return text
    is_ranked = benchmark == "rewardbench2"  # whose credit is not one game's
    words = {"tie_credit": ["shared" if is_ranked else "second"], "error_credit": ["tie"]}[key]
    if is_ranked and key == "error_credit":
        words = []
    if text in words:
        return text
    try:
        credit = float(text)
    except ValueError:
        credit = -1.0
    if not 0.0 <= credit <= 1.0:
        more = "".join(f" or '{word}'" for word in words)
        raise UsageError(
            f"--policy {key}={text}: {benchmark} wants a number from 0 to 1{more} here."
        )
    return credit
