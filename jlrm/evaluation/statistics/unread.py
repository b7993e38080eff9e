"""Games without a verdict: how many, why, examples of what was said, and what may help.

A judge that answers in a form which the parser does not know looks like a bad judge. So whenever
more than a few games have no verdict, that is said with the texts themselves.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from jlrm.evaluation.games import Game, ItemVerdicts, Response
from jlrm.reports.results_file import BenchmarkResult, UnreadGame

ACCEPTED = 0.02  # share of games without a verdict that is passed over
NUM_EXAMPLES = 3
SHOWN_CHARACTERS = 160  # of the end of a text

HINTS = {  # by the most frequent status
    "cut": "a larger --max-new-tokens",
    "no_think_end": "a larger --max-new-tokens, or --parser lenient",
    "no_answer": "--parser letters for judges that name the better answer, or another --prompt",
    "out_of_range": "the --scale that the judge was told",
    "ambiguous": "another --prompt",
}
OTHER_HINT = (
    "another --parser (lenient reads most forms of scores, letters the names of answers), or"
    " another --prompt"
)


def examples(
    judged: Sequence[ItemVerdicts], responses: Mapping[str, Response]
) -> tuple[UnreadGame, ...]:
    """Return examples of games without a verdict, of as many statuses as there are; none of few."""
    games = [(Game(each.item, *v[:2]).id, v) for each in judged for v in each.verdicts]
    failed = [(game, verdict.status) for game, verdict in games if verdict.preference is None]
    if len(failed) <= ACCEPTED * len(games):
        return ()
    counts: Counter[str] = Counter()
    ranked = []
    for game, status in failed:
        ranked.append((counts[status], game, status))
        counts[status] += 1
    # The first of each status, then the second of each.
    ranked.sort(key=lambda each: each[0])
    return tuple(
        UnreadGame(game, status, _end(_said(responses[game])))
        for _, game, status in ranked[:NUM_EXAMPLES]
    )


def lines(name: str, result: BenchmarkResult) -> Iterator[str]:
    """Yield what is said of a benchmark where more than ACCEPTED of its games have no verdict."""
    num_games, num_failed = result.diagnostics.games, result.parse_failures
    if num_failed <= ACCEPTED * num_games:
        return
    failed = {status: n for status, n in result.statuses.items() if status != "ok"}
    counts = ", ".join(f"{status.replace('_', ' ')} {n}" for status, n in failed.items())
    share = 100 * num_failed / num_games
    yield (
        f"{name}: {num_failed} of {num_games} games have NO VERDICT ({share:.1f} %): {counts}."
        f"{_meaning(num_failed, num_games)}"
    )
    for each in result.unread:
        yield f"  {each.game}, {each.status.replace('_', ' ')}: {each.text!r}"
    yield f"  What may help: {HINTS.get(max(failed, key=failed.__getitem__), OTHER_HINT)}."


def _meaning(num_failed: int, num_games: int) -> str:
    """Return what the metrics say, where they say little of the judge."""
    if num_failed == num_games:
        return " Its metrics would describe the policy alone and are left out."
    if 2 * num_failed >= num_games:
        return " Its metrics describe the policy more than the judge."
    return ""


def _said(response: Response) -> str:
    return (response.texts or ("",))[0]


def _end(text: str) -> str:
    return text if len(text) <= SHOWN_CHARACTERS else "… " + text[-SHOWN_CHARACTERS:]
