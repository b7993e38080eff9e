"""HelpSteer3, validation: pairs of answers to conversations, with the preference of people.

There is no official rule for judges; usual is the share of right verdicts over the pairs that are
no ties. `overall_preference` runs from -3 (answer 1 is much better) to 3. Data: nvidia/HelpSteer3,
config preference, CC-BY-4.0.
"""

from __future__ import annotations

from jlrm.evaluation import sources
from jlrm.evaluation.benchmark import Benchmark, Published
from jlrm.evaluation.games import Item
from jlrm.evaluation.policies import Policy, pair_policies
from jlrm.evaluation.scoring import micro_total, pair_credit, pair_games

HOW_TO_GET = (
    "Download preference/validation.jsonl.gz of the dataset nvidia/HelpSteer3 and name it: "
    "--data helpsteer3=FILE."
)
# negative: answer 1
PREFERENCES = {-3: 1, -2: 1, -1: 1, 0: 0, 1: 2, 2: 2, 3: 2}


def read(source: str) -> list[Item]:
    """Read items; rows whose preference is 0 are left out. Subsets are the domains."""
    rows = list(sources.rows(source, HOW_TO_GET))
    items = []
    for number, (where, row) in enumerate(rows):
        label = sources.choice(row, "overall_preference", where, PREFERENCES)
        if label:
            items.append(
                Item(
                    id=str(row.get("id", number)),
                    question=sources.conversation(sources.need(row, "context", where), where),
                    answers=(
                        sources.text(row, "response1", where),
                        sources.text(row, "response2", where),
                    ),
                    label=label,
                    subset=str(row.get("domain") or ""),
                )
            )
    return sources.finished(items, source, "their label is a tie", len(rows) - len(items))


BENCHMARK = Benchmark(
    name="helpsteer3",
    # no official rule for judges; this is the usual one
    policies=pair_policies(Policy("mean", "random", 0.5, 0.0)),
    read=read,
    games=pair_games,
    credit=pair_credit,
    total=micro_total,
    source="hf:nvidia/HelpSteer3:preference#validation",
    published=(
        Published(
            "JudgeLRM-7B",
            "overall",
            60.2,
            "OpenRubrics",
            "python -m jlrm.evaluate --benchmark helpsteer3 --model nuojohnchen/JudgeLRM-7B "
            "--prompt judgelrm_eval",
        ),
    ),
)
