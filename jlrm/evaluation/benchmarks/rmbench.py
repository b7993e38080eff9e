"""RM-Bench: 1,327 prompts with three chosen and three rejected answers, from terse to formatted.

Rule: THU-KEG/RM-Bench, scripts/utils.py. Cell i, j of a 3 x 3 matrix is how often chosen answer i
beats rejected answer j. `hard` is the mean above the diagonal (the rejected answer has more style),
`normal` on it, `easy` below. A domain is the mean of the three; `safety` pools its two parts by
item; `overall` is the mean of the domains. Each cell is a game, as in RM-R1, eval/RM-Bench.
"""

from __future__ import annotations

import pathlib
import re
import statistics
from collections.abc import Sequence

from jlrm.config import UsageError
from jlrm.evaluation import sources
from jlrm.evaluation.benchmark import Benchmark, Credit, Published
from jlrm.evaluation.games import Game, Item, ItemVerdicts
from jlrm.evaluation.policies import Policy
from jlrm.evaluation.scoring import game_credit, label_of, ordered, percent

HOW_TO_GET = (
    "Download data/ of github.com/THU-KEG/RM-Bench (or the dataset THU-KEG/RM-Bench) and name the "
    "directory: --data rmbench=DIR."
)
DOMAINS = ("chat", "math", "code", "safety-refuse", "safety-response")
DIFFICULTIES = ("hard", "normal", "easy")
NUM_STYLES = 3
CELLS = [(i, j) for i in range(NUM_STYLES) for j in range(NUM_STYLES)]
WHOLE = "total_dataset.json"  # of all domains


def read(source: str) -> list[Item]:
    """Read items of one file or of a directory with a file per domain; chosen answers stand first.

    Files of one domain have no `domain`: it is in their names.
    """
    pattern = WHOLE if sources.files(source, WHOLE) else "*"
    items = [_item(row, where) for where, row in sources.rows(source, HOW_TO_GET, pattern)]
    return sources.finished(items, source)


def _item(row: sources.Row, where: str) -> Item:
    chosen, rejected = (sources.texts(row, key, where) for key in ("chosen", "rejected"))
    if len(chosen) != NUM_STYLES or len(rejected) != NUM_STYLES:
        raise UsageError(f"{where}: wanted three chosen and three rejected answers.")
    domain = _domain(row, where)
    return Item(
        id=f"{domain}:{sources.need(row, 'id', where)}",
        question=sources.text(row, "prompt", where),
        answers=chosen + rejected,
        num_correct=NUM_STYLES,
        subset=domain,
    )


def _domain(row: sources.Row, where: str) -> str:
    file = pathlib.Path(where.rpartition(", ")[0]).name
    from_name = re.sub(r"(_filtered)?\.json.*$", "", file)
    domain = str(row.get("domain") or from_name)
    for known in DOMAINS:  # the hub's own rows add to some names
        if domain == known or domain.startswith(f"{known}/"):
            return known
    raise UsageError(
        f"{where}: no domain in the row or in the name of its file. Wanted {', '.join(DOMAINS)}."
    )


def games(items: Sequence[Item], policy: Policy, seed: int) -> list[Game]:
    """Return nine games per item, or eighteen in both orders."""
    return [
        game
        for item in items
        for i, j in CELLS
        for game in ordered(Game(item, i, NUM_STYLES + j), policy.order, seed)
    ]


def credit(judged: ItemVerdicts, policy: Policy) -> Credit:
    """Return an item's credit: the mean of its nine cells, and its three difficulties."""
    cells: dict[tuple[int, int], list[float]] = {cell: [] for cell in CELLS}
    verdicts = []
    for verdict in judged.verdicts:
        said = label_of(verdict, policy)
        chosen, rejected = sorted(verdict[:2])
        cells[chosen, rejected - NUM_STYLES].append(game_credit(said, 1, policy))
        verdicts.append(said)
    means = {cell: statistics.fmean(values) for cell, values in cells.items()}
    parts = tuple(
        statistics.fmean(value for (i, j), value in means.items() if _difficulty(i, j) == name)
        for name in DIFFICULTIES
    )
    return Credit(judged.item, statistics.fmean(means.values()), tuple(verdicts), parts)


def _difficulty(chosen: int, rejected: int) -> str:
    return "hard" if chosen < rejected else "easy" if chosen > rejected else "normal"


def total(credits: Sequence[Credit], policy: Policy) -> dict[str, float]:
    """Return `overall`, the difficulties, and the domains that there are."""
    by_domain: dict[str, list[tuple[float, ...]]] = {}
    for credit in credits:
        by_domain.setdefault(credit.item.subset.partition("-")[0], []).append(credit.detail)
    table = {  # hard, normal, easy of each domain
        domain: [percent(column) for column in zip(*parts, strict=True)]
        for domain, parts in by_domain.items()
    }
    domains = {name: statistics.fmean(row) for name, row in sorted(table.items())}
    columns = [statistics.fmean(column) for column in zip(*table.values(), strict=True)]
    overall = {"overall": statistics.fmean(domains.values())}
    return overall | dict(zip(DIFFICULTIES, columns, strict=True)) | domains


COMMAND = (
    "python -m jlrm.evaluate --benchmark rmbench --model nuojohnchen/JudgeLRM-7B "
    "--prompt judgelrm_eval --policy tie_credit=0.5"
)
RM_R1 = {
    **{"chat": 59.9, "math": 59.9, "code": 51.9, "safety": 87.3},
    **{"easy": 73.2, "normal": 66.2, "hard": 54.8, "overall": 64.7},  # printed there as 766.2
}
BENCHMARK = Benchmark(
    name="rmbench",
    policies=(
        # THU-KEG/RM-Bench, scripts/utils.py: a win is a strictly higher score
        Policy("matrix", "random", 0.0, 0.0),
    ),
    read=read,
    games=games,
    credit=credit,
    total=total,
    source="hf:THU-KEG/RM-Bench#train",
    size=1327,
    published=(
        *(
            Published("JudgeLRM-7B", metric, value, "RM-R1, arXiv 2505.02387", COMMAND)
            for metric, value in RM_R1.items()
        ),
        Published("JudgeLRM-7B", "chat", 55.4, "OpenRubrics", COMMAND),
        Published("JudgeLRM-7B", "overall", 78.5, "Mix-GRM", COMMAND),
        Published("JudgeLRM-7B", "overall", 58.7, "wizwand.com, origin not known", COMMAND),
    ),
)
