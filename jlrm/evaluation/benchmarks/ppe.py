"""Preference Proxy Evaluations: votes of people, and pairs of which one answer is verified right.

`ppe_preference`: lmarena-ai/PPE-Human-Preference-V1, 16,038 votes; ties are left out. Accuracy.
`ppe_correctness`: five datasets of prompts with 32 answers each, known to be right or wrong; the
judge sees the sampled pairs of one right and one wrong answer (`sampled_conflict_pairs`). Accuracy
per dataset, and the mean of the five. How a judge's ties count is not specified officially.
"""

from __future__ import annotations

import pathlib
import statistics
from collections.abc import Iterator, Sequence

from jlrm.config import UsageError
from jlrm.evaluation import sources
from jlrm.evaluation.benchmark import Benchmark, Credit, Published
from jlrm.evaluation.games import Item
from jlrm.evaluation.policies import Policy, pair_policies
from jlrm.evaluation.scoring import (
    micro_total,
    pair_credit,
    pair_games,
    subset_percents,
    swap_metrics,
)

HOW_TO_GET_PREFERENCE = (
    "Download the split test of the dataset lmarena-ai/PPE-Human-Preference-V1 and name the file "
    "or directory: --data ppe_preference=PATH."
)
HOW_TO_GET_CORRECTNESS = (
    "Download the datasets lmarena-ai/PPE-NAME-Best-of-K (NAME: MMLU-Pro, MATH, GPQA, IFEval, "
    "MBPP-Plus), each into a directory of that name below one: --data ppe_correctness=DIR."
)
WINNERS = {"model_a": 1, "model_b": 2, "tie": 0, "tie (bothbad)": 0}
NAMES = ("MMLU-Pro", "MATH", "GPQA", "IFEval", "MBPP-Plus")
HUB = "hf:lmarena-ai/PPE-Best-of-K"  # stands for all five


def read_preference(source: str) -> list[Item]:
    """Read votes; ties are left out. Subsets are the languages."""
    rows = list(sources.rows(source, HOW_TO_GET_PREFERENCE))
    items = [
        Item(
            id=str(sources.need(row, "question_id", where)),
            question=sources.conversation(sources.need(row, "prompt", where), where),
            answers=tuple(
                sources.conversation(sources.need(row, key, where), where)
                for key in ("response_1", "response_2")
            ),
            label=label,
            subset=str(row.get("language") or ""),
        )
        for where, row in rows
        if (label := sources.choice(row, "winner", where, WINNERS))
    ]
    return sources.finished(items, source, "their label is a tie", len(rows) - len(items))


def read_correctness(source: str) -> list[Item]:
    """Read the sampled pairs of all prompts; subsets are the five datasets."""
    items = [
        item
        for name, part in _parts(source)
        for where, row in sources.rows(part, HOW_TO_GET_CORRECTNESS)
        for item in _pairs(row, where, name)
    ]
    return sources.finished(items, source)


def _parts(source: str) -> list[tuple[str, str]]:
    """Return the name and the source of each dataset."""
    if source == HUB:
        return [(name, f"hf:lmarena-ai/PPE-{name}-Best-of-K#train") for name in NAMES]
    parts = [(name, str(path)) for path in sources.files(source) if (name := _name(str(path)))]
    if not parts and (name := _name(source)):
        parts = [(name, source)]
    if not parts:
        raise UsageError(
            f"{source}: no file or directory is named after one of {', '.join(NAMES)}. "
            f"{HOW_TO_GET_CORRECTNESS}"
        )
    return parts


def _name(path: str) -> str | None:
    """Return the dataset that a path belongs to, by the last of its parts that names one."""
    for part in reversed(pathlib.PurePath(path).parts):
        folded = part.lower().replace("_", "-")
        for name in NAMES:
            if name.lower() in folded:
                return name
    return None


def _pairs(row: sources.Row, where: str, name: str) -> Iterator[Item]:
    scores = sources.need(row, "scores", where)
    for pair in sources.need(row, "sampled_conflict_pairs", where):
        first, second = pair
        if scores[first] == scores[second]:
            raise UsageError(
                f"{where}: answers {first} and {second} are no pair: scores are equal."
            )
        yield Item(
            id=f"{name}:{sources.need(row, 'question_id', where)}:{first}-{second}",
            question=sources.text(row, "prompt", where),
            answers=tuple(sources.text(row, f"response_{i + 1}", where) for i in pair),
            label=1 if scores[first] > scores[second] else 2,
            subset=name,
        )


def prompt(item: Item) -> str:
    """Return the prompt that an item's pair of answers is of; there are up to five pairs of one."""
    return item.id.rpartition(":")[0]


def total(credits: Sequence[Credit], policy: Policy) -> dict[str, float]:
    """Return `overall`, the mean of the datasets, and each of them."""
    subsets = subset_percents(credits)
    return {"overall": statistics.fmean(subsets.values())} | swap_metrics(credits) | subsets


COMMAND = (
    "python -m jlrm.evaluate --benchmark ppe_correctness --model nuojohnchen/JudgeLRM-7B "
    "--prompt judgelrm_eval"
)
USUAL = Policy("mean", "random", 0.5, 0.0)  # there is no official rule for judges
PREFERENCE = Benchmark(
    name="ppe_preference",
    policies=pair_policies(USUAL),
    read=read_preference,
    games=pair_games,
    credit=pair_credit,
    total=micro_total,
    source="hf:lmarena-ai/PPE-Human-Preference-V1#test",
)
CORRECTNESS = Benchmark(
    name="ppe_correctness",
    policies=pair_policies(USUAL),
    read=read_correctness,
    games=pair_games,
    credit=pair_credit,
    total=total,
    group=prompt,
    source=HUB,
    published=(
        Published("JudgeLRM-7B", "IFEval", 46.0, "OpenRubrics", COMMAND),
        Published("JudgeLRM-7B", "overall", 57.9, "Mix-GRM (PPE, part not said)", COMMAND),
        Published("JudgeLRM-7B", "overall", 42.6, "wizwand.com, origin not known", COMMAND),
    ),
)
