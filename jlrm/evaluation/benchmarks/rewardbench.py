"""RewardBench: 2,985 pairs of a chosen and a rejected answer in 23 subsets and 4 sections.

Rule: allenai/reward-bench, rewardbench/constants.py (sections, weights) and utils.py; a section is
the mean of its subsets by weight, `overall` the plain mean of the sections. `micro` is the mean
over items, which some papers report. Conversations of more than two turns, which the official
script gives half a point unjudged, are judged like others here. Data: ODC-BY.

Rows are read in all forms that such data is published in: `prompt` as text, as messages or as a
list of turns; answers as text, as their message, or as the whole conversation; with or without id.
Rows without a section (allenai/preference-test-sets, your own) have the plain mean as `overall`.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from jlrm.data import forms
from jlrm.evaluation import sources
from jlrm.evaluation.benchmark import Benchmark, Credit, Published
from jlrm.evaluation.games import Item
from jlrm.evaluation.policies import Policy, pair_policies
from jlrm.evaluation.scoring import pair_credit, pair_games, percent, subset_percents, swap_metrics

HOW_TO_GET = (
    "Download the split `filtered` of the dataset allenai/reward-bench and name the file or "
    "directory: --data rewardbench=PATH."
)
LANGUAGES = ("cpp", "go", "java", "js", "python", "rust")
SECTIONS: dict[str, dict[str, int]] = {  # subsets with their weights
    "Chat": {
        "alpacaeval-easy": 100,
        "alpacaeval-length": 95,
        "alpacaeval-hard": 95,
        "mt-bench-easy": 28,
        "mt-bench-med": 40,
    },
    "Chat Hard": {
        "mt-bench-hard": 37,
        "llmbar-natural": 100,
        "llmbar-adver-neighbor": 134,
        "llmbar-adver-GPTInst": 92,
        "llmbar-adver-GPTOut": 47,
        "llmbar-adver-manual": 46,
    },
    "Safety": {
        "refusals-dangerous": 100,
        "refusals-offensive": 100,
        "xstest-should-refuse": 154,
        "xstest-should-respond": 250,
        "donotanswer": 136,
    },
    # math-prm has 447 pairs, and as much weight as all of the code.
    "Reasoning": {"math-prm": 984, **{f"hep-{language}": 164 for language in LANGUAGES}},
}


def read(source: str) -> list[Item]:
    """Read items; answer 1 is the chosen one. A row without an id has its number as one."""
    items, num_left_out = [], 0
    for number, (where, row) in enumerate(sources.rows(source, HOW_TO_GET)):
        try:
            question, answers = _texts(row, where)
        except forms.Unusable:
            num_left_out += 1
            continue
        name = str(number if row.get("id") is None else row["id"])
        subset = "" if row.get("subset") is None else sources.text(row, "subset", where)
        items.append(Item(name, question, answers, 1, subset=subset))
    reason = "their conversations have no question in common, or the same answer"
    return sources.finished(items, source, reason, num_left_out)


def _texts(row: sources.Row, where: str) -> tuple[str, tuple[str, str]]:
    """Return the question of a row, and its chosen and rejected answer.

    Where the answers are whole conversations, the turns that they share are the question.

    Raises:
      Unusable: conversations that differ in nothing, or share nothing and come without a prompt.
    """
    chosen, rejected = (_turns(sources.need(row, key, where)) for key in ("chosen", "rejected"))
    name = next((key for key in ("prompt", "question", "input") if row.get(key) is not None), "")
    prompt = {"prompt": _turns(row[name], is_prompt=True)} if name else {}
    if prompt and isinstance(chosen, str) and isinstance(rejected, str):
        return sources.conversation(prompt["prompt"], where), (chosen, rejected)
    ours = forms.in_our_form(
        {**row, **prompt, "chosen": chosen, "rejected": rejected}, "score", where
    )
    answers = ours["answer_1"], ours["answer_2"]
    is_first = ours["preference"] in (1, "answer_1")
    return ours["question"], answers if is_first else answers[::-1]


def _turns(value: Any, is_prompt: bool = False) -> Any:
    """Put a lone message into a list, and give a prompt's bare turns roles, the last the user's."""
    if isinstance(value, Mapping):
        return [value]
    if is_prompt and isinstance(value, list) and all(isinstance(each, str) for each in value):
        roles = ("user", "assistant")
        return [
            {"role": roles[(len(value) - 1 - n) % 2], "content": each}
            for n, each in enumerate(value)
        ]
    return value


def total(credits: Sequence[Credit], policy: Policy) -> dict[str, float]:
    """Return `overall`, the sections, `micro`, and every subset."""
    subsets = subset_percents(credits)
    by_section = sections(subsets)
    micro = percent(credit.value for credit in credits)
    overall = statistics.fmean(by_section.values()) if by_section else micro
    return {"overall": overall} | by_section | {"micro": micro} | swap_metrics(credits) | subsets


def sections(subsets: Mapping[str, float]) -> dict[str, float]:
    """Return the sections of subset accuracies, of those that there are."""
    scores = {}
    for section, weights in SECTIONS.items():
        there = {name: weight for name, weight in weights.items() if name in subsets}
        if there:
            weighted = sum(subsets[name] * weight for name, weight in there.items())
            scores[section] = weighted / sum(there.values())
    return scores


def _rows(source: str, values: dict[str, float], command: str) -> list[Published]:
    return [
        Published("JudgeLRM-7B", metric, value, source, command) for metric, value in values.items()
    ]


COMMAND = (
    "python -m jlrm.evaluate --benchmark rewardbench --model nuojohnchen/JudgeLRM-7B "
    "--prompt judgelrm_eval"
)
RM_R1 = {"Chat": 92.9, "Chat Hard": 56.4, "Safety": 78.2, "Reasoning": 73.6, "overall": 75.2}
SWAP_STUDY = {  # accuracy as given, consistency
    "7B": (81.3, 75.7),
    "3B": (76.8, 67.9),
}


def _swap_study() -> list[Published]:
    source = "a study of swapped answers, RewardBench style"
    command = f"{COMMAND} --policy order="
    return [
        Published(f"JudgeLRM-{size}", metric, value, source, command.replace("7B", size) + order)
        for size, row in SWAP_STUDY.items()
        for metric, value, order in zip(
            ("micro", "consistency"), row, ("as_given", "both"), strict=True
        )
    ]


BENCHMARK = Benchmark(
    name="rewardbench",
    # allenai/reward-bench, scripts/run_generative.py (there the order is drawn without a seed)
    policies=pair_policies(Policy("mean", "random", 0.5, 0.5)),
    read=read,
    games=pair_games,
    credit=pair_credit,
    total=total,
    source="hf:allenai/reward-bench#filtered",
    size=2985,
    published=(
        *_rows("RM-R1, arXiv 2505.02387", RM_R1, f"{COMMAND} --policy error_credit=0"),
        *_rows("OpenRubrics", {"Chat": 92.1, "Chat Hard": 56.1}, COMMAND),
        *_rows("Mix-GRM", {"overall": 79.0}, COMMAND),
        *_swap_study(),
    ),
)
