"""AlpacaFarm's human annotations: how often a judge names the answer that most people prefer.

Rule: `Human agreement` of tatsu-lab/alpaca_eval, analyze.py (n_annotators=4, scoring rule
"absolute"). The first four annotations of a pair of outputs count, pairs with fewer are left out,
and the label is the mode of the four. Credit is 1 - |verdict - label|, where a tie stands at 1.5: a
tie against a winner, on either side, earns a half. `people` is the same figure for the annotators:
each one against the mode of the other three, 65.66 on the public file.

Where two preferences are equally frequent, the package draws one with a fixed seed, which takes the
greater: two votes against two are always a vote for output_2. Labels here are the same, because
published figures rest on them. Responses that can't be read are left out there; here they earn
`error_credit`.
Data: tatsu-lab/alpaca_eval on the Hugging Face hub, CC-BY-NC-4.0; a row is an annotation.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

from jlrm.evaluation import sources
from jlrm.evaluation.benchmark import Benchmark, Credit, Published
from jlrm.evaluation.games import Item, ItemVerdicts
from jlrm.evaluation.policies import Policy
from jlrm.evaluation.scoring import label_of, pair_games, percent, subset_percents, swap_metrics

FILE = "alpaca_farm_human_crossannotations.json"
HOW_TO_GET = (
    f"Download {FILE} of the dataset tatsu-lab/alpaca_eval (hf download --repo-type dataset) and "
    "name the file: --data alpaca_farm_human=FILE."
)
NUM_ANNOTATORS = 4
PREFERENCES = {1: 1, 2: 2, 1.5: 0, 0: 0}
PLACES = {1: 1.0, 0: 1.5, 2: 2.0}  # of labels, on the scale of `preference`


class Outputs(NamedTuple):
    """What annotations must share to be about the same pair."""

    question: str
    output_1: str
    output_2: str


def read(source: str) -> list[Item]:
    """Read annotations; an item is a pair of outputs with the first four of its preferences.

    In a file whose pairs all have fewer (alpaca_farm_human_annotations.json has one each), the
    largest number of preferences takes the place of four.
    """
    if source.startswith("hf:"):
        source = f"{sources.hub_files(source, (FILE,), HOW_TO_GET)}/{FILE}"
    votes: dict[Outputs, list[int]] = {}
    subsets: dict[Outputs, str] = {}
    for where, row in sources.rows(source, HOW_TO_GET):
        outputs = _outputs(row, where)
        subsets.setdefault(outputs, str(row.get("dataset") or ""))
        known = votes.setdefault(outputs, [])
        if sources.need(row, "preference", where) is not None:
            known.append(sources.choice(row, "preference", where, PREFERENCES))
    wanted = max(1, min(NUM_ANNOTATORS, max(map(len, votes.values()), default=0)))
    items = [
        _item(str(number), outputs, votes[outputs][:wanted], subsets[outputs])
        for number, outputs in enumerate(votes)
        if len(votes[outputs]) >= wanted
    ]
    reason = f"their outputs have fewer than {wanted} preferences"
    return sources.finished(items, source, reason, len(votes) - len(items))


def _outputs(row: sources.Row, where: str) -> Outputs:
    question = sources.text(row, "instruction", where)
    if row.get("input"):  # early releases keep it apart
        question = f"{question}\n{sources.text(row, 'input', where)}"
    return Outputs(question, *(sources.text(row, f"output_{n}", where) for n in (1, 2)))


def _item(name: str, outputs: Outputs, votes: Sequence[int], subset: str) -> Item:
    answers = (outputs.output_1, outputs.output_2)
    meta: dict[str, Any] = {"votes": tuple(votes)}
    return Item(name, outputs.question, answers, mode(votes), subset=subset, meta=meta)


def mode(votes: Sequence[int]) -> int:
    """Return the most frequent label; of equally frequent ones that which the package draws.

    pandas.Series.sample(1, random_state=123) takes the second of two, and the first of three.
    """
    modes = sorted(statistics.multimode(votes), key=PLACES.__getitem__)
    return modes[1 if len(modes) == 2 else 0]


def _credit(said: int | None, label: int, policy: Policy) -> float:
    if said is None:
        return float(policy.error_credit)
    if said == label:
        return 1.0
    return float(policy.tie_credit) if 0 in (said, label) else 0.0


def credit(judged: ItemVerdicts, policy: Policy) -> Credit:
    """Return an item's credit, and as detail that of its annotators."""
    item = judged.item
    assert item.label is not None, f"{item.id} has no label"
    said = tuple(label_of(verdict, policy) for verdict in judged.verdicts)
    value = statistics.fmean(_credit(each, item.label, policy) for each in said)
    return Credit(item, value, said, people(item.meta.get("votes", ())))


def people(votes: Sequence[int]) -> float | None:
    """Return how well one vote meets the mode of the others; None of fewer than two votes."""
    if len(votes) < 2:
        return None
    others = [mode([*votes[:n], *votes[n + 1 :]]) for n in range(len(votes))]
    return statistics.fmean(
        1 - abs(PLACES[vote] - PLACES[other]) for vote, other in zip(votes, others, strict=True)
    )


def total(credits: Sequence[Credit], policy: Policy) -> dict[str, float]:
    """Return `agreement`, `people` where there are several votes, and the subsets."""
    agreement = {"agreement": percent(credit.value for credit in credits)}
    of_people = [credit.detail for credit in credits if credit.detail is not None]
    beside = {"people": percent(of_people)} if of_people else {}
    return agreement | beside | swap_metrics(credits) | subset_percents(credits)


SOURCE = "tatsu-lab/alpaca_eval, evaluators_leaderboard.csv"
COMMAND = "python -m jlrm.evaluate --benchmark alpaca_farm_human --backend openai --model {model}"
RECORDED = "python -m jlrm.evaluate --benchmark alpaca_farm_human --verdicts FILE"
LEADERBOARD = {  # Human agreement, with the model behind the annotator; "": none
    "alpaca_eval_gpt4": (69.17, "gpt-4"),
    "alpaca_eval_gpt4_turbo_fn": (68.09, "gpt-4-1106-preview"),
    "alpaca_farm_greedy_gpt4": (66.44, "gpt-4"),
    "gpt4": (66.94, "gpt-4"),
    "humans": (65.66, ""),
    "longest": (62.19, ""),
    "chatgpt": (57.28, "gpt-3.5-turbo"),
}
BENCHMARK = Benchmark(
    name="alpaca_farm_human",
    policies=(Policy("mode", "random", 0.5, 0.0),),
    read=read,
    games=pair_games,
    credit=credit,
    total=total,
    source="hf:tatsu-lab/alpaca_eval",
    published=tuple(
        Published(judge, "agreement", value, SOURCE, COMMAND.format(model=m) if m else RECORDED)
        for judge, (value, m) in LEADERBOARD.items()
    ),
)
