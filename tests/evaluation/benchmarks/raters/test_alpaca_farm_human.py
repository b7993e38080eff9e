"""AlpacaFarm's annotations against the rule of alpaca_eval, written down anew with pandas."""

from __future__ import annotations

import json
import random
from typing import Any

import pandas as pd
import pytest

from jlrm.config import UsageError
from jlrm.evaluation.benchmarks.raters import alpaca_farm_human
from jlrm.evaluation.benchmarks.registry import BENCHMARKS, policy_of
from jlrm.evaluation.games import Response
from jlrm.evaluation.reading import Reader, judged_items

KNOWN = BENCHMARKS["alpaca_farm_human"]
KEYS = ["instruction", "output_1", "output_2"]


def published_rows(rng: random.Random, preferences=(1, 2), num_pairs=40) -> list[dict]:
    """Return rows such as the public file has, annotators of a pair apart from each other."""
    rows = [
        {
            **{"instruction": f"do {pair // 2}", "output_1": f"a{pair}", "output_2": f"b{pair}"},
            **{"preference": rng.choice(preferences), "annotator_index": annotator},
            **{"dataset": ("koala", "oasst")[pair % 2], "datasplit": "eval"},
        }
        for annotator in range(5)
        for pair in range(num_pairs)
        if (pair, annotator) != (7, 4) and not (pair == 3 and annotator > 2)
    ]
    return rows  # pair 3 has three annotations, all others at least four


def official_mode(values: Any) -> float:
    modes = values.mode().dropna()
    return (modes.sample(1, random_state=123) if len(modes) > 1 else modes).item()


def official_labels(rows: list[dict]) -> Any:
    """Return the mode of the first four annotations of each pair that has as many."""
    frame: Any = pd.DataFrame(rows)
    frame["preference"] = frame["preference"].replace({0: 1.5}).astype(float)
    frame = frame[frame.groupby(KEYS)["preference"].cumcount() < 4]
    counts = frame.groupby(KEYS)["preference"].transform("count")
    return frame[counts >= 4].groupby(KEYS)["preference"].aggregate(official_mode)


def official_people(rows: list[dict]) -> float:
    """Return the mean over the four annotators of one's agreement with the others' mode."""
    frame: Any = pd.DataFrame(rows)
    frame["preference"] = frame["preference"].replace({0: 1.5}).astype(float)
    frame["index"] = frame.groupby(KEYS)["preference"].cumcount()
    frame = frame[frame["index"] < 4]
    frame = frame[frame.groupby(KEYS)["preference"].transform("count") >= 4]
    scores = []
    for one in range(4):
        alone = frame[frame["index"] == one].set_index(KEYS)["preference"]
        rest = frame[frame["index"] != one].groupby(KEYS)["preference"].aggregate(official_mode)
        scores.append(1 - (alone - rest).abs().mean())
    return 100 * sum(scores) / 4


@pytest.mark.parametrize("preferences", [(1, 2), (0, 1, 2), (1, 1.5, 2)])
def test_agreement_is_that_of_alpaca_eval(tmp_path, preferences):
    rng = random.Random(str(preferences))
    rows = published_rows(rng, preferences)
    file = tmp_path / "crossannotations.json"
    file.write_text(json.dumps(rows))
    items = KNOWN.read(str(file))
    labels = official_labels(rows)
    assert len(items) == len(labels) == 39
    places: dict[Any, float] = {1: 1.0, 2: 2.0, 0: 1.5}
    for item in items:
        assert places[item.label] == labels[item.question, *item.answers], item

    policy = policy_of("alpaca_farm_human", ["order=both"])
    games = KNOWN.games(items, policy, 0)
    says = {game.id: rng.choice((0, 1, 2)) for game in games}
    judged, _ = judged_items(games, {g: Response(g, preference=p) for g, p in says.items()}, READ)
    metrics = KNOWN.metrics(judged, policy)

    swap = {0: 0, 1: 2, 2: 1}
    wanted = []
    for game in games:
        said = says[game.id] if game.first == 0 else swap[says[game.id]]
        label = labels[game.item.question, *game.item.answers]
        wanted.append(1 - abs(places[said] - label))
    assert metrics["agreement"] == pytest.approx(100 * sum(wanted) / len(wanted))
    assert metrics["people"] == pytest.approx(official_people(rows))
    assert {"koala", "oasst", "consistency"} <= metrics.keys()


READ = Reader()


def test_a_split_vote_is_the_draw_of_the_package():
    for votes, label in (
        ([1, 2], 2),
        ([2, 1, 1, 2], 2),
        ([1, 0], 0),
        ([0, 2], 2),
        ([2, 0, 1], 1),
        ([2, 2, 1], 2),
    ):
        assert alpaca_farm_human.mode(votes) == label
        places = pd.Series([alpaca_farm_human.PLACES[vote] for vote in votes])
        assert official_mode(places) == alpaca_farm_human.PLACES[label]


def test_one_annotation_a_pair_is_its_label_and_says_nothing_about_people(tmp_path):
    rows = [row for row in published_rows(random.Random(2)) if row["annotator_index"] == 0]
    (tmp_path / "x.json").write_text(json.dumps(rows))
    items = KNOWN.read(str(tmp_path / "x.json"))
    assert [item.label for item in items] == [row["preference"] for row in rows]
    games = KNOWN.games(items, KNOWN.policy, 0)
    judged, _ = judged_items(games, {g.id: Response(g.id, preference=1) for g in games}, READ)
    assert "people" not in KNOWN.metrics(judged, KNOWN.policy)


def test_what_can_not_be_a_vote_is_left_out_or_named(tmp_path, caplog):
    row = {"instruction": "do", "input": "this", "output_1": "a", "output_2": "b"}
    rows = [{**row, "preference": p} for p in (2, None, 2)] + [
        {**row, "output_1": "c", "preference": 1}
    ]
    (tmp_path / "x.json").write_text(json.dumps(rows))
    (item,) = KNOWN.read(str(tmp_path / "x.json"))
    assert (item.question, item.label, item.meta["votes"]) == ("do\nthis", 2, (2, 2))
    assert "1 rows are not asked: their outputs have fewer than 2 preferences" in caplog.text
    (tmp_path / "x.json").write_text(json.dumps([{**row, "preference": 3}]))
    with pytest.raises(UsageError, match="row 1: 'preference' must be one of"):
        KNOWN.read(str(tmp_path / "x.json"))
    (tmp_path / "x.json").write_text(json.dumps([{**row, "preference": None}]))
    with pytest.raises(UsageError, match="holds no item that can be asked"):
        KNOWN.read(str(tmp_path / "x.json"))
