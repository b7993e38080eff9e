"""Benchmarks against recorded judges, vectors of the official scorers, and rules that must hold."""

from __future__ import annotations

import ast
import collections
import dataclasses
import importlib.util
import itertools
import json
import logging
import math
import pathlib
import random
import re
from typing import Any

import numpy as np
import pytest
from conftest import required

from jlrm.config import UsageError
from jlrm.data.comparisons import Comparison, write_comparisons
from jlrm.evaluation import sources
from jlrm.evaluation.benchmark import Credit
from jlrm.evaluation.benchmarks import judgebench, rewardbench, rewardbench2
from jlrm.evaluation.benchmarks.judgelm import GOLD, PAIRS
from jlrm.evaluation.benchmarks.raters import mtbench_human
from jlrm.evaluation.benchmarks.registry import BENCHMARKS, benchmark, policy_of
from jlrm.evaluation.benchmarks.rewardbench2 import TiesRow, ties_score
from jlrm.evaluation.classes import classification
from jlrm.evaluation.games import Game, Item, ItemVerdicts, Response, game_verdict
from jlrm.evaluation.policies import Policy
from jlrm.evaluation.reading import (
    Reader,
    count,
    judged_items,
    judgelm_scores,
    read_response,
    reader,
)
from jlrm.evaluation.scoring import kappa
from jlrm.judgement.verdict import parse_authors, preferred
from jlrm.judges.recorded import Recorded

EXACT = {"rel": 1e-12, "abs": 1e-10}
POLICIES = {name: known.policies for name, known in BENCHMARKS.items()}
PAIR_BENCHMARKS = [name for name, known in POLICIES.items() if len(known) == 3]
CLASSES = ["pandalm", "judgelm"]


def golden(reference: pathlib.Path, name: str):
    return json.loads((reference / "golden" / f"{name}.json").read_text())


def score(name, games, said, policy=None, read=None):
    """Score answers given as a function of the game."""
    policy = policy or BENCHMARKS[name].policy
    responses = {game.id: said(game) for game in games}
    judged, missing = judged_items(games, responses, read or Reader())
    assert not missing
    return BENCHMARKS[name].metrics(judged, policy)


def replay(name, data, verdicts, *overrides, parser="lenient"):
    """Score a file of verdicts; return the judged items too."""
    items, policy = BENCHMARKS[name].read(str(data)), policy_of(name, overrides)
    recorded, responses = Recorded(str(verdicts), items), {}
    games = recorded.as_played(BENCHMARKS[name].games(items, policy, 0))
    recorded.backend("file")(games, lambda each: responses.update({each.game: each}))
    judged, missing = judged_items(games, responses, reader(parser))
    assert not missing
    return BENCHMARKS[name].metrics(judged, policy), judged


# ------------------------------------------------------------------------------ recorded judges


@pytest.mark.parametrize("parser", ["lenient", "judgelrm"])
def test_pandalm_of_the_recorded_judgelrm_3b(reference, parser):
    folder = reference / "pandalm"
    files = folder / "testset-v1.json", folder / "results_judgelrm3b.json"
    metrics, judged = replay("pandalm", *files, parser=parser)
    found = {name: round(value, 2) for name, value in metrics.items()}
    assert found == {
        **{"agreement": 77.68, "precision": 74.26, "recall": 70.86, "f1": 72.12},
        **{"agreement_no_ties": 82.66, "precision_no_ties": 82.97},
        **{"recall_no_ties": 82.94, "f1_no_ties": 82.66},
    }
    credits = [BENCHMARKS["pandalm"].credit(each, policy_of("pandalm")) for each in judged]
    confusion = collections.Counter((credit.item.label, credit.verdicts[0]) for credit in credits)
    rows = [[confusion[gold, said] for said in (0, 1, 2)] for gold in (0, 1, 2)]
    assert rows == [[53, 33, 19], [16, 355, 51], [13, 91, 368]]
    assert count(judged, None) == (9 if parser == "lenient" else 0)  # 0, 0 is off the scale


def test_pandalm_of_the_recorded_gpt_35(reference):
    folder = reference / "pandalm"
    files = folder / "testset-v1.json", folder / "gpt-3.5-turbo-testset-v1.json"
    metrics, judged = replay("pandalm", *files)
    found = [round(metrics[name], 2) for name in ("agreement", "precision", "recall", "f1")]
    assert found == [71.07, 58.79, 57.36, 57.55]
    assert (count(judged, 0), count(judged, None)) == (38, 25)  # "Tie" and "garbage"


def test_pandalm_data_has_traps(reference):
    items = BENCHMARKS["pandalm"].read(str(reference / "pandalm" / "testset-v1.json"))
    assert collections.Counter(item.label for item in items) == {0: 105, 1: 422, 2: 472}
    booleans = [item.id for item in items if {"True", "False"} & {*item.answers}]
    assert booleans == ["157", "158", "159", "161", "162", "164"]
    assert sum("" in item.answers for item in items) == 54
    rows = json.loads((reference / "pandalm" / "testset-v1.json").read_text())
    assert items[0].question == rows[0]["instruction"] + "\n" + rows[0]["input"]


O1_MINI = {"Knowledge": 58.44, "Reasoning": 62.24, "Math": 82.14, "Coding": 78.57}
INTERNLM = {"Knowledge": 56.49, "Reasoning": 61.22, "Math": 71.43, "Coding": 50.00}


@pytest.mark.parametrize(
    ("judge", "overall", "both", "orders", "categories"),
    [
        ("arena_hard,judge_model=o1-mini-2024-09-12", 65.71, 58.00, (70.86, 74.57), O1_MINI),
        (
            "reward_model,judge_model=internlm_internlm2-7b-reward",
            *(59.43, 59.43, (59.43, 59.43), INTERNLM),
        ),
    ],
)
def test_judgebench_of_recorded_judges(reference, judge, overall, both, orders, categories):
    name = "dataset=judgebench,response_model=gpt-4o-2024-05-13"
    data = reference / "judgebench" / "data" / f"{name}.jsonl"
    verdicts = reference / "judgebench" / "outputs" / f"{name},judge_name={judge}.jsonl"
    metrics, _ = replay("judgebench", data, verdicts)
    found = {key: round(value, 2) for key, value in metrics.items()}
    assert found.pop("consistency") == (100.0 if overall == both else 68.57)
    shown = {"overall": overall, "both_right": both, "order_1": orders[0], "order_2": orders[1]}
    assert found == shown | categories
    for order, wanted in zip(("as_given", "both"), (orders[0], overall), strict=True):
        metrics, _ = replay("judgebench", data, verdicts, f"order={order}")
        assert round(metrics["overall"], 2) == wanted


def test_judgebench_reads_both_official_files(reference):
    items = BENCHMARKS["judgebench"].read(str(reference / "judgebench" / "data"))
    assert collections.Counter(item.label for item in items) == {1: 193 + 143, 2: 157 + 127}
    assert len(items) == len({item.id for item in items}) == 620


def test_llmbar_of_eight_recorded_judges(reference):
    results = sorted((reference / "llmbar" / "Natural" / "evaluators").glob("*/*/result.json"))
    assert len(results) == 8
    for file in results:
        stated = json.loads(file.with_name("statistics.json").read_text())
        metrics, _ = replay("llmbar", reference / "llmbar", file)
        assert metrics["kappa_agreement"] == pytest.approx(stated["kappa_agreement"], **EXACT)
        for name in ("correct_average", "correct_both", "equal"):
            wanted = float(stated[name].rpartition("= ")[2].rstrip("%"))
            assert metrics[name] == pytest.approx(wanted, **EXACT), (file, name)
        single, _ = replay("llmbar", reference / "llmbar", file, "order=as_given")
        assert single["overall"] == float(stated["correct_False"].split()[0])


def test_llmbar_rating_rule_from_the_scores_alone(reference, tmp_path):
    """A judge that scores gets the recorded figures by the policy's rule for ties."""
    for judge in ("ChatGPT/Rating", "GPT-4/Rating", "GPT-4/Rating_NoRules"):
        folder = reference / "llmbar" / "Natural" / "evaluators" / judge
        rows = []
        for number, row in enumerate(json.loads((folder / "result.json").read_text())):
            scores = [float(row["results"][-1][key][0]) for key in ("score_1", "score_2")]
            rows.append({"id": f"Natural-{number}", "scores": scores})
            rows.append({**rows[-1], "scores": scores[::-1], "swapped": True})
        (tmp_path / "scores.json").write_text(json.dumps(rows))
        metrics, _ = replay("llmbar", reference / "llmbar", tmp_path / "scores.json")
        stated = json.loads((folder / "statistics.json").read_text())
        assert f"{metrics['correct_average']:.1f}%" == stated["correct_average"]
        assert f"{metrics['equal']:.1f}%" == stated["equal"].rpartition("= ")[2]
        assert metrics["kappa_agreement"] == pytest.approx(stated["kappa_agreement"], **EXACT)


# ----------------------------------------------------------------- vectors of official scorers


def test_judgelm_vectors(reference, tmp_path):
    for case in golden(reference, "judgelm_metrics"):
        texts = {"question_body": "q", "answer1_body": "a", "answer2_body": "b"}
        rows = [{"question_id": i, **texts} for i in range(len(case["gt"]))]
        for name, extra in ((PAIRS, None), (GOLD, case["gt"])):
            lines = (
                json.dumps(row if extra is None else {"question_id": row["question_id"], "text": t})
                for row, t in zip(rows, extra or case["gt"], strict=True)
            )
            (tmp_path / name).write_text("\n".join(lines))
        verdicts = [
            {"id": i, "output": text, "swapped": is_swapped}
            for key, is_swapped in (("seq", False), ("rev", True))
            for i, text in enumerate(case[key])
        ]
        (tmp_path / "said.jsonl").write_text("\n".join(map(json.dumps, verdicts)))
        metrics, judged = replay("judgelm", tmp_path, tmp_path / "said.jsonl", parser="judgelm")
        expected = {
            key.replace("accuracy", "agreement").replace("perfer", "prefer"): 100 * value
            for key, value in case["expected"].items()
            if key != "total_num"
        }
        assert len(judged) == case["expected"]["total_num"]
        assert metrics == pytest.approx(expected, **EXACT)


def test_rewardbench_vectors(reference):
    for case in golden(reference, "rewardbench_sections"):
        subsets = {k: v for k, v in case["metrics"].items() if isinstance(v, (int, float))}
        assert len(subsets) == 23
        found = rewardbench.sections(subsets)
        assert found == pytest.approx(case["expected"], **EXACT)
        if "published" in case:
            mean = case["published"]["avg_Result_each_section"]
            assert sum(found.values()) / 4 == pytest.approx(mean, **EXACT)


@pytest.mark.slow
def test_rewardbench_of_whole_subsets_gives_the_published_vector(reference):
    """From verdicts on pairs to the sections, with as many right as the accuracies say."""
    sizes = {n: w for subsets in rewardbench.SECTIONS.values() for n, w in subsets.items()}
    sizes["math-prm"] = 447
    for case in golden(reference, "rewardbench_sections"):
        items = [
            (Item(f"{name}-{i}", "?", ("a", "b"), 1, subset=name), i < case["metrics"][name] * n)
            for name, n in sizes.items()
            for i in range(n)
        ]
        # 0.29530201342281 * 447 is a whole number up to rounding
        right = {item.id for item, is_right in items if is_right}
        for name, n in sizes.items():
            wanted = round(case["metrics"][name] * n)
            right -= {f"{name}-{i}" for i in range(wanted, n)}
        games = BENCHMARKS["rewardbench"].games([item for item, _ in items], _both(), 0)
        metrics = score("rewardbench", games, _right_where(right), _both())
        for name, value in case["expected"].items():
            assert metrics[name] == pytest.approx(100 * value, **EXACT)
        if "published" in case:
            wanted = 100 * case["published"]["absoluate_Result"]
            assert metrics["micro"] == pytest.approx(wanted, **EXACT)


def _both() -> Policy:
    return policy_of("rewardbench", ["order=both"])


def _right_where(right):
    """Return a judge that names the label of some items, and the other answer of all others."""

    def said(game: Game) -> Response:
        label = game.item.label if game.item.id in right else 3 - game.item.label
        return Response(game.id, preference=label if game.first == 0 else 3 - label)

    return said


def test_rewardbench2_ties_vectors(reference):
    for case in golden(reference, "rewardbench2_ties"):
        rows = [TiesRow(row["id"], row["scores"], row["num_correct"]) for row in case["rows"]]
        assert ties_score(rows) == pytest.approx(case["expected"], **EXACT)


def test_rewardbench2_ties_through_games(reference, tmp_path):
    """Scores of single answers, as a file of verdicts, come out of the round robin unchanged."""
    for case in golden(reference, "rewardbench2_ties"):
        data = [
            {
                **{"id": row["id"], "subset": "Ties", "prompt": "?"},
                "chosen": [f"c{i}" for i in range(row["num_correct"])],
                "rejected": [f"r{i}" for i in range(len(row["scores"]) - row["num_correct"])],
            }
            for row in case["rows"]
        ]
        said = [{"id": row["id"], "scores": row["scores"]} for row in case["rows"]]
        for name, rows in (("data", data), ("said", said)):
            (tmp_path / f"{name}.json").write_text(json.dumps(rows))
        for variant in ("round_robin", "all_wins"):
            files = tmp_path / "data.json", tmp_path / "said.json"
            metrics, _ = replay("rewardbench2", *files, f"aggregation={variant}")
            wanted = pytest.approx(100 * case["expected"], abs=1e-8)
            assert metrics == {"overall": wanted, "Ties": wanted}


def test_ties_ids_that_stand_twice_are_still_joined(tmp_path):
    """As in a directory that holds a data set in two formats."""
    rows = [
        {"id": f"{kind}:1", "subset": "Ties", "prompt": "?", "chosen": ["c"], "rejected": ["r"]}
        for kind in ("ref", "tied")
    ]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "b.json").write_text(json.dumps(rows))
    items = BENCHMARKS["rewardbench2"].read(str(tmp_path))
    assert len(items) == 4
    numbers = [rewardbench2.ties_number(item) for item in items]
    assert numbers == ["1"] * 4
    assert ties_score([TiesRow(item.id, (9.0, 2.0), 1) for item in items]) > 0.5


@pytest.mark.parametrize("key", ["chosen", "rejected"])
def test_an_item_without_answers_is_named(tmp_path, key):
    row = {"id": "ref:1", "subset": "Ties", "prompt": "?", "chosen": ["c"], "rejected": ["r"]}
    (tmp_path / "a.json").write_text(json.dumps([row | {key: []}]))
    with pytest.raises(UsageError, match=f"'{key}' holds no text: wanted at least one"):
        BENCHMARKS["rewardbench2"].read(str(tmp_path))


def test_shared_ties_are_refused_where_a_game_has_a_credit_of_its_own():
    with pytest.raises(UsageError, match=r"tie_credit=shared: rewardbench2 wants"):
        policy_of("rewardbench2", ["aggregation=all_wins", "tie_credit=shared"])
    assert policy_of("rewardbench2", ["tie_credit=shared"]).tie_credit == "shared"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"id": "1", "judgments": ["A>B", "B>A"]}, "wanted an object with 'decision'"),
        ({"id": "1", "results": [{"swap = False": "1"}]}, "wanted an object with 'winner'"),
        ({"id": "1", "decision": "1", "swapped": "false"}, "'swapped' must be true or false"),
    ],
)
def test_rows_of_verdicts_that_are_not_understood_are_named(tmp_path, row, message):
    items = [Item("1", "?", ("a", "b"), 1)]
    (tmp_path / "said.json").write_text(json.dumps([row]))
    with pytest.raises(UsageError, match=re.escape(message)):
        Recorded(str(tmp_path / "said.json"), items)


def test_verdicts_of_rows_whose_texts_are_messages_are_found_by_id(tmp_path):
    items = [Item("1", "?", ("a", "b"), 1)]
    row = {"id": "1", "input": ["m"], "output_1": "a", "output_2": "b", "decision": "1"}
    (tmp_path / "said.json").write_text(json.dumps([row]))
    assert list(Recorded(str(tmp_path / "said.json"), items).responses) == ["1:0-1"]


def test_scores_without_end_are_no_scores():
    assert judgelm_scores("inf 3") is None and judgelm_scores("8 3") == (8.0, 3.0)
    text = f"</think><answer>{'9' * 400}</answer><answer>1</answer>"
    assert parse_authors(text).status == "out_of_range"


def test_rmbench_vectors(reference, tmp_path):
    names = {"hard_acc": "hard", "normal_acc": "normal", "easy_acc": "easy"}
    names["total_avg_acc"] = "overall"
    for case in golden(reference, "rmbench_compute_accuracy"):
        answers = {"chosen": ["c"] * 3, "rejected": ["r"] * 3, "prompt": "?"}
        data = [{"id": r["id"], "domain": r["domain"], **answers} for r in case["results"]]
        for name, rows in (("data", data), ("said", case["results"])):
            (tmp_path / f"{name}.json").write_text(json.dumps(rows))
        for order in ("random", "both", "as_given"):
            files = tmp_path / "data.json", tmp_path / "said.json"
            metrics, _ = replay("rmbench", *files, f"order={order}")
            wanted = {names.get(k, k): 100 * v for k, v in case["expected"].items()}
            assert metrics == pytest.approx(wanted, **EXACT)


def test_judgebench_vectors(reference):
    decisions = {"A>B": 1, "B>A": 2, "A=B": 0}
    keys = {"Overall": "overall", **judgebench.CATEGORIES}
    for case in golden(reference, "judgebench_double_order"):
        items, said = [], {}
        for number, pair in enumerate(case["pairs"]):
            label, subset = decisions[pair["label"]], judgebench.category(pair["source"])
            item = Item(str(number), "?", ("a", "b"), label, subset=subset)
            items.append(item)
            for order, each in zip(((0, 1), (1, 0)), pair["judgments"], strict=True):
                decision = decisions.get((each or {}).get("decision"))
                game = Game(item, *order)
                text = ("",) if decision is None else None
                said[game.id] = Response(game.id, texts=text, preference=decision)
        games = BENCHMARKS["judgebench"].games(items, policy_of("judgebench"), 0)
        metrics = score("judgebench", games, lambda game, said=said: said[game.id])
        for key, value in case["expected"].items():
            assert metrics[keys[key]] == pytest.approx(value, **EXACT)


# -------------------------------------------------------------------- the official package, live


@pytest.fixture(scope="module")
def official():
    """Functions of the PyPI package `rewardbench`, whose own imports are not needed for them."""
    spec = importlib.util.find_spec("rewardbench")
    if spec is None or spec.origin is None:
        required("JLRM_REQUIRE_REWARDBENCH", "rewardbench is not installed (pip --no-deps)")
    folder = pathlib.Path(spec.origin).parent
    names = {"calculate_scores_per_section", "process_single_model", "sample_stats"}
    names |= {"EXAMPLE_COUNTS", "SUBSET_MAPPING"}
    namespace = {"np": np, "math": math, "Dataset": _Rows}
    for file in ("constants.py", "utils.py"):
        tree = ast.parse((folder / file).read_text())
        tree.body = [node for node in tree.body if names & _defined(node)]
        exec(compile(tree, file, "exec"), namespace)
    return namespace


class _Rows:
    """What process_single_model makes a table of at its end, beside the score."""

    from_dict = staticmethod(dict)


def _defined(node: ast.stmt) -> set[str]:
    if isinstance(node, ast.FunctionDef):
        return {node.name}
    targets = node.targets if isinstance(node, ast.Assign) else []
    return {target.id for target in targets if isinstance(target, ast.Name)}


def test_sections_are_those_of_the_official_package(official):
    counts, mapping = official["EXAMPLE_COUNTS"], official["SUBSET_MAPPING"]
    ours = {section: list(subsets) for section, subsets in rewardbench.SECTIONS.items()}
    assert {k: sorted(v) for k, v in ours.items()} == {k: sorted(v) for k, v in mapping.items()}
    assert {n: w for part in rewardbench.SECTIONS.values() for n, w in part.items()} == counts
    rng = random.Random(0)
    for _ in range(50):
        subsets = {name: 100 * rng.random() for name in counts if rng.random() < 0.9}
        theirs = official["calculate_scores_per_section"](counts, mapping, subsets)
        found = rewardbench.sections(subsets)
        assert found == pytest.approx({k: v for k, v in theirs.items() if k in found})


def test_ties_are_those_of_the_official_package(official):
    rng = random.Random(1)
    for trial in range(100):
        numbers, rows = range(rng.randint(1, 8)), []
        for number in numbers:
            for kind, num_correct in (("ref", 1), ("tied", rng.randint(2, 5))):
                size = num_correct + rng.randint(1, 4)
                draw = (lambda: rng.randint(1, 4)) if trial % 2 else rng.random
                scores = [float(draw()) for _ in range(size)]
                if kind == "tied" and len({*scores[:num_correct]}) == 1:
                    scores[0] += 1.0  # releases differ in what no spread at all is worth
                rows.append(TiesRow(f"{kind}:{number}", scores, num_correct))
        rng.shuffle(rows)
        _, theirs = official["process_single_model"]([row._asdict() for row in rows])
        assert ties_score(rows) == pytest.approx(theirs, **EXACT)


# ------------------------------------------------------------------------- rules that must hold


def items_of(name: str, num: int = 24, seed: int = 0) -> list[Item]:
    """Return items such as a benchmark has, with random labels where it has labels."""
    rng = random.Random(seed)
    subsets = {
        "rewardbench": ["hep-go", "math-prm", "donotanswer", "mt-bench-easy", "llmbar-natural"],
        "rmbench": ["chat", "math", "code", "safety-refuse", "safety-response"],
        "rewardbench2": ["Focus", "Math", "Safety"],
        "rmb": ["Helpfulness Pairwise", "Helpfulness BoN"],
        "mtbench_human": ["turn 1", "turn 2"],
    }.get(name, ["one", "two", ""])
    items = []
    for number in range(num):
        subset = subsets[number % len(subsets)]
        num_answers, label, num_correct = 2, rng.choice([1, 2]), 1
        if name in CLASSES:
            label = rng.choice([0, 1, 2])
        elif name == "rmbench":
            num_answers, label, num_correct = 6, None, 3
        elif name == "rewardbench2":
            num_answers, label = 4, None
        elif name == "rmb" and subset.endswith("BoN"):
            num_answers, label = 3, None
        elif name in ("rewardbench", "rmb"):
            label = 1
        elif name == "lists":
            num_answers, label = rng.choice([2, 3, 4]), None
        golds = tuple(rng.sample(range(9), num_answers)) if name == "lists" else ()
        answers = tuple(f"answer {i}" for i in range(num_answers))
        told = answers, label, num_correct, subset
        items.append(Item(str(number), f"?{number}", *told, golds=golds))
    return items


def truth(game: Game) -> int:
    """Return the right verdict as shown."""
    label, golds = game.item.label, game.item.golds
    if golds:
        return preferred(golds[game.first], golds[game.second])
    if label is None:
        first, second = (int(i < game.item.num_correct) for i in (game.first, game.second))
        return (first > second) + 2 * (first < second)
    return label if game.first == 0 or label == 0 else 3 - label


def every_policy():
    return [
        pytest.param(name, dataclasses.replace(known, order=order), id=f"{name}-{i}-{order}")
        for name, entries in POLICIES.items()
        for i, known in enumerate(entries)
        for order in ("as_given", "random", "both")
    ]


def headline(metrics: dict[str, float]) -> float:
    return metrics.get("overall", metrics.get("agreement", math.nan))


@pytest.mark.parametrize(("name", "policy"), every_policy())
def test_perfect_inverse_and_silent_judges(name, policy):
    games = BENCHMARKS[name].games(items_of(name), policy, 0)
    perfect = score(name, games, lambda game: Response(game.id, preference=truth(game)), policy)
    assert headline(perfect) == 100.0
    if name == "llmbar" and policy.order == "both":
        assert perfect["kappa_agreement"] == 1.0
    wrong = {0: 1, 1: 2, 2: 1}
    inverse = score(name, games, lambda g: Response(g.id, preference=wrong[truth(g)]), policy)
    assert headline(inverse) == 0.0
    silent = score(name, games, lambda game: Response(game.id, texts=("Well",)), policy)
    if policy.aggregation == "majority":
        credit = float(policy.error_credit > 0.5)
    elif policy.error_credit == "tie":
        ties = [item.label == 0 for item in items_of(name)]
        credit = sum(ties) / len(ties)
    else:
        credit = policy.error_credit
    assert headline(silent) == pytest.approx(100 * credit)


@pytest.mark.parametrize("name", POLICIES)
def test_a_judge_of_ties_gets_the_credit_of_ties(name):
    policy = policy_of(name, ["order=both"])
    games = BENCHMARKS[name].games(items_of(name), policy, 0)
    for scores in (None, (5.0, 5.0)):

        def said(game, scores=scores):
            return Response(game.id, scores=scores, preference=None if scores else 0)

        found = headline(score(name, games, said, policy))
        if name in CLASSES:
            ties = [item.label == 0 for item in items_of(name)]
            assert found == pytest.approx(100 * sum(ties) / len(ties))
        elif name == "rewardbench2":
            assert found == 25.0  # one of four that share the maximum
        elif name == "rmb":
            assert found == 25.0  # half of the pairs, none of the lists
        else:
            nothing = ("rmbench", "judgebench", "mtbench_human", "lists")
            fraction = 0.0 if name in nothing else 0.5
            assert found == pytest.approx(100 * fraction)


@pytest.mark.parametrize("name", [*PAIR_BENCHMARKS, *CLASSES])
def test_with_both_orders_the_stored_order_of_answers_does_not_matter(name):
    """The same judge, items whose answers are stored the other way round, the same numbers."""
    for known in POLICIES[name]:
        if known.aggregation == "first_order":
            continue
        policy = dataclasses.replace(known, order="both")
        items = [item for item in items_of(name, 60) if item.label is not None]
        swapped = [
            dataclasses.replace(
                item, answers=item.answers[::-1], label=3 - item.label if item.label else 0
            )
            for item in items
        ]
        rng = random.Random(5)
        lean = {(item.id, a): rng.choice([0, 1, 2, 2, None]) for item in items for a in (0, 1)}

        def said(game, lean=lean):  # depends on which text is shown first, not on its index
            shown = game.item.answers[game.first]
            decision = lean[game.item.id, int(shown == "answer 1")]
            text = ("",) if decision is None else None
            return Response(game.id, texts=text, preference=decision)

        one, two = (
            score(name, BENCHMARKS[name].games(each, policy, 0), said, policy)
            for each in (items, swapped)
        )
        if name == "judgebench":
            assert one.pop("order_1") == two.pop("order_2")
            assert two.pop("order_1") == one.pop("order_2")
        # the paper's view without ties gives them to answer 1
        unaffected = [key for key in one if not key.endswith("_no_ties")]
        assert {k: one[k] for k in unaffected} == pytest.approx({k: two[k] for k in unaffected})


def test_a_random_order_depends_on_seed_and_item_alone():
    for name in [*PAIR_BENCHMARKS, "rmbench", "rewardbench2"]:
        policy = policy_of(name, ["order=random"])
        items = items_of(name, 200)
        games = BENCHMARKS[name].games

        def orders(items, seed, games=games, policy=policy):
            return {game.id for game in games(items, policy, seed)}

        everything = orders(items, 0)
        assert orders(items[::-1], 0) == everything
        assert orders(items[10:50], 0) <= everything
        assert orders(items, 1) != everything
        first = [game.first < game.second for game in games(items, policy, 0)]
        assert 0.4 < sum(first) / len(first) < 0.6


def test_games_have_ids_of_their_own():
    for name in POLICIES:
        for order in ("as_given", "random", "both"):
            policy = policy_of(name, [f"order={order}"])
            games = BENCHMARKS[name].games(items_of(name), policy, 0)
            assert len({game.id for game in games}) == len(games)


def test_credit_adds_up_to_the_headline_where_that_is_a_mean():
    for name in [*CLASSES, "pairs", "helpsteer3", "llmbar", "judgebench", "ppe_preference"]:
        policy, rng = policy_of(name, ["order=both"]), random.Random(2)
        games = BENCHMARKS[name].games(items_of(name), policy, 0)
        responses = {g.id: Response(g.id, preference=rng.choice([0, 1, 2])) for g in games}
        judged, _ = judged_items(games, responses, Reader())
        credits = [BENCHMARKS[name].credit(each, policy).value for each in judged]
        mean = 100 * sum(credits) / len(credits)
        assert headline(BENCHMARKS[name].metrics(judged, policy)) == pytest.approx(mean)


def test_rewardbench2_counts_shared_maxima_and_failures():
    item = Item("1", "?", ("right", "a", "b", "c"), subset="Focus")
    policy = policy_of("rewardbench2")

    def credit(scores, policy=policy):
        games = BENCHMARKS["rewardbench2"].games([item], policy, 0)
        verdicts = [
            game_verdict(game, (scores[game.first], scores[game.second]))
            if None not in (scores[game.first], scores[game.second])
            else read_response(game, Response(game.id, texts=("",)), Reader())
            for game in games
        ]
        games = ItemVerdicts(item, tuple(verdicts))
        return BENCHMARKS["rewardbench2"].credit(games, policy).value

    assert len(BENCHMARKS["rewardbench2"].games([item], policy, 0)) == 12
    assert credit([9, 3, 2, 1]) == 1.0
    assert credit([9, 9, 2, 1]) == 0.5
    assert credit([9, 9, 9, 1]) == pytest.approx(1 / 3)
    assert credit([8, 9, 2, 1]) == 0.0
    assert credit([None, None, None, None]) == 0.25
    assert credit([None, 1, 2, 3]) == 0.0  # without a score it can't be the best
    strict = policy_of("rewardbench2", ["tie_credit=0"])
    assert (credit([9, 9, 2, 1], strict), credit([9, 8, 2, 1], strict)) == (0.0, 1.0)
    wins = policy_of("rewardbench2", ["aggregation=all_wins"])
    assert len(BENCHMARKS["rewardbench2"].games([item], wins, 0)) == 6
    assert (credit([9, 9, 2, 1], wins), credit([9, 8, 2, 1], wins)) == (0.0, 1.0)


def mtbench_votes(rng: random.Random) -> list[dict[str, Any]]:
    """Return votes in the form of lmsys/mt_bench_human_judgments, pairs of models in any order."""
    rows = []
    for question, turn in itertools.product(range(81, 91), (1, 2)):
        for pair in itertools.combinations(("alpaca", "gpt-4", "llama"), 2):
            for judge in (f"expert_{rng.randint(0, 9)}" for _ in range(rng.randint(0, 3))):
                models = pair[:: rng.choice((1, -1))]
                talks = [
                    [
                        {"role": role, "content": f"{role} {i}" + f" {model}" * (role != "user")}
                        for i in (1, 2)
                        for role in ("user", "assistant")
                    ]
                    for model in models
                ]
                rows.append(
                    {
                        "question_id": question,
                        **{"model_a": models[0], "model_b": models[1], "turn": turn},
                        **{"conversation_a": talks[0], "conversation_b": talks[1]},
                        "winner": rng.choice(("model_a", "model_b", "tie")),
                        "judge": judge,
                    }
                )
    return [*rows, {**rows[0], "judge": "author_1"}]


def test_agreement_with_people_counts_votes_as_fastchat_does(tmp_path, caplog):
    rng = random.Random(4)
    rows = mtbench_votes(rng)
    (tmp_path / "votes.json").write_text(json.dumps(rows))
    known = BENCHMARKS["mtbench_human"]
    items = known.read(str(tmp_path / "votes.json"))
    assert "1 rows are not asked: their judge is no expert" in caplog.text
    assert items[0].question == "user 1"
    texts = {item.subset: item.answers[0] for item in items if ":alpaca-" in item.id}
    assert texts["turn 1"] == "assistant 1 alpaca"
    assert texts["turn 2"] == (
        "Assistant: assistant 1 alpaca\n\nUser: user 2\n\nAssistant: assistant 2 alpaca"
    )
    games = known.games(items, known.policy, 0)
    shown = {game.id: rng.choice((1, 2, 0, None)) for game in games}
    metrics = score("mtbench_human", games, lambda g: said_or_not(g.id, shown[g.id]))

    agreed: dict[str, list[bool]] = collections.defaultdict(list)
    for row in rows[:-1]:
        models = sorted((row["model_a"], row["model_b"]))
        name = f"{row['question_id']}:{'-'.join(models)}:{row['turn']}"
        given, swapped = ({1: 0, 2: 1}.get(shown[f"{name}:{o}"]) for o in ("0-1", "1-0"))
        swapped = None if swapped is None else 1 - swapped
        verdict = "tie" if given is None or given != swapped else models[given]
        vote = {"tie": "tie"}.get(row["winner"]) or row[row["winner"]]
        for metric in ("agreement", f"turn {row['turn']}"):
            agreed[metric].append(vote == verdict)
            if "tie" not in (vote, verdict):
                agreed[f"{metric}_no_ties"].append(vote == verdict)
    wanted = {metric: 100 * sum(each) / len(each) for metric, each in agreed.items()}
    assert {k: v for k, v in metrics.items() if k != "consistency"} == pytest.approx(wanted)


def said_or_not(game: str, decision: int | None) -> Response:
    return Response(game, texts=("",) if decision is None else None, preference=decision)


def test_votes_that_are_split_make_no_label():
    rows = [{"winner": winner} for winner in ("model_a", "model_b", "model_a")]
    for votes, label in ((rows, 1), (rows[:2], 0), (rows[1:2], 2)):
        counted = mtbench_human.with_votes(
            Item("1", "?", ("a", "b")), [mtbench_human.WINNERS[row["winner"]] for row in votes]
        )
        assert counted.label == label


@pytest.mark.slow
def test_every_field_of_a_policy_has_an_effect():
    """Some judge is scored otherwise for another value of each field."""
    for name in POLICIES:
        policy, rng = policy_of(name, ["order=both"]), random.Random(3)
        items = items_of(name, 60)
        everything = BENCHMARKS[name].games(items, policy, 0)
        picks = {g.id: rng.choice([0, 1, 2, None]) for g in everything}
        for item in items[:6]:  # without any verdict
            picks |= {g.id: None for g in everything if g.item is item}
        for item in items[6:12]:  # ties alone
            picks |= {g.id: 0 for g in everything if g.item is item}

        def result(*overrides, name=name, items=items, picks=picks):
            policy = policy_of(name, ["order=both", *overrides])
            games = BENCHMARKS[name].games(items, policy, 0)

            def said(game):
                pick = picks[game.id]
                return Response(game.id, texts=None if pick is not None else ("",), preference=pick)

            return score(name, games, said, policy)

        for change in ("order=as_given", "order=random", "error_credit=1", "tie_credit=1"):
            assert result(change) != result(), (name, change)
        for other in POLICIES[name][1:]:
            assert result(f"aggregation={other.aggregation}") != result(), (name, other)


# --------------------------------------------------------------------------- small mathematics


def test_classification_is_that_of_scikit_learn_by_hand():
    pairs = {(0, 0): 2, (0, 1): 1, (1, 1): 3, (1, 0): 2, (2, None): 1}
    found = classification(pairs)
    assert found["accuracy"] == pytest.approx(100 * 5 / 9)
    assert found["precision"] == pytest.approx(100 * (2 / 4 + 3 / 4 + 0) / 3)
    assert found["recall"] == pytest.approx(100 * (2 / 3 + 3 / 5 + 0) / 3)
    assert found["f1"] == pytest.approx(100 * (4 / 7 + 6 / 9 + 0) / 3)


def test_kappa_by_hand():
    assert kappa([1, 1, 2, 2], [1, 2, 2, 2]) == pytest.approx((0.75 - 0.5) / 0.5)
    assert kappa([1, 1], [1, 1]) == 1.0


# ------------------------------------------------------------------------------ verdicts of texts


def test_votes_are_averaged_and_failures_keep_a_status():
    game = Game(Item("1", "?", ("a", "b"), 1), 0, 1)

    def read(*texts, parser="lenient"):
        return read_response(game, Response(game.id, texts=texts), reader(parser))

    one = "<answer>8</answer><answer>7</answer>"
    other = "r</think><answer>2</answer><answer>9</answer>"
    assert read(one).scores == (8.0, 7.0)
    assert read(one, one, one, other).scores == (6.5, 7.5)
    assert read(one, "no scores at all").scores == (8.0, 7.0)
    assert read("x", "y", "<answer>8</answer>").status == "no_answer"
    assert read(one, parser="strict").status == "no_think_end"
    assert read(other, parser="strict").scores == (2.0, 9.0)
    zeros = "<answer>0</answer><answer>0</answer>"
    assert read(zeros).status == "out_of_range"
    assert read(zeros, parser="judgelrm").preference == 0
    wide = Reader("lenient", (0, 100))
    assert read_response(game, Response(game.id, texts=(zeros,)), wide).preference == 0
    for text, scores in (
        ("8 9\nwhy", (8.0, 9.0)),
        ("8,9", (8.0, 9.0)),
        ("8, 9", None),
        ("8  9", None),
        ("8.5 9", (8.5, 9.0)),
        ("", None),
        ("\n8 9", None),
        ("nan 1", None),
    ):
        assert read(text, parser="judgelm").scores == scores, text
    with pytest.raises(UsageError, match="Did you mean 'lenient'"):
        reader("lenint")


def test_votes_of_letters_are_counted():
    game = Game(Item("1", "?", ("a", "b"), 1), 1, 0)

    def read(*texts, endings=None):
        response = Response(game.id, texts=texts, endings=endings)
        return read_response(game, response, reader("letters"))

    assert read("[[A]]") == (1, 0, 1, None, "ok") and read("[[B]]").in_order == 1
    assert read("[[A]]", "[[B]]", "[[A]]").preference == 1
    assert read("[[A]]", "[[B]]").preference == 0 == read("[[C]]", "[[A]]", "[[C]]").preference
    assert read("[[B]]", "nothing", "?").preference == 2
    assert read("?", "?", "[[A]] or [[B]]").status == "no_answer"
    assert read("so far [[A]]", endings=("length",)).status == "cut"
    assert read("why</think>[[A]]", endings=("length",)).preference == 1
    assert read("so far [[A]]", "</think>[[B]]", endings=("length", "stop")).preference == 2


@pytest.mark.parametrize("parser", ["lenient", "strict", "letters"])
def test_a_text_without_a_verdict_that_was_cut_off_is_called_so(parser):
    game = Game(Item("1", "?", ("a", "b"), 1), 0, 1)

    def status(text, *endings):
        return read_response(
            game, Response(game.id, texts=(text,), endings=endings or None), reader(parser)
        ).status

    draft = "The format is <answer>3</answer><answer>5</answer>. I first weigh both"
    assert status(draft, "length") == "cut"
    assert status("so</think>The", "length") == "cut" != status("so</think>The", "stop")
    assert status("why</think><answer>8</answer><ans", "length") == "cut"
    if parser != "letters":  # which more tokens would not mend
        assert status("why</think><answer>8</answer><answer>99</answer>", "length") != "cut"
    if parser == "lenient":  # nobody said how it ended
        assert status(draft) == "cut" and status(draft, "stop") == "ok"
        assert status(draft + ".") == "ok"


def test_given_texts_are_read_as_wanted(cases):
    """Each in the way that the file names for it."""
    game = Game(Item("1", "?", ("a", "b"), 1), 0, 1)
    for line in (cases / "texts.jsonl").read_text().splitlines():
        row = json.loads(line)
        parser = "letters" if "letters" in row["how"] else "lenient"
        verdict = read_response(game, Response(game.id, texts=(row["output"],)), reader(parser))
        if isinstance(row["wanted"], str):
            assert verdict.preference == {"first": 1, "second": 2, "tie": 0}[row["wanted"]], row
        else:
            assert verdict.scores == (row["wanted"] and tuple(row["wanted"])), row
        assert (verdict.status == "cut") == (row["wanted"] is None)


def test_an_item_with_an_unjudged_game_does_not_count():
    games = BENCHMARKS["judgebench"].games(items_of("judgebench", 3), policy_of("judgebench"), 0)
    responses = {game.id: Response(game.id, preference=1) for game in games[:-2]}
    responses[games[-2].id] = Response(games[-2].id, error="timeout")
    judged, missing = judged_items(games, responses, Reader())
    assert (len(judged), missing) == (2, 1)


# ------------------------------------------------------------------------------------- policies


def test_policies_are_overridden_by_key():
    assert policy_of("pandalm") == POLICIES["pandalm"][0] == BENCHMARKS["pandalm"].policy
    found = policy_of("rewardbench", ["order=both", "error_credit=0", "tie_credit=second"])
    assert found == Policy("mean", "both", "second", 0.0)
    assert policy_of("judgebench", ["aggregation=all"]) == Policy("all", "both", 0.0, 0.0)
    mixed = ["judgebench.order=as_given", "tie_credit=1"]
    assert policy_of("judgebench", mixed).order == "as_given"
    assert policy_of("pandalm", mixed) == dataclasses.replace(policy_of("pandalm"), tie_credit=1.0)
    assert policy_of("rewardbench2", ["aggregation=all_wins"]).tie_credit == 0.0


@pytest.mark.parametrize(
    ("name", "override", "message"),
    [
        ("pandalm", "ordr=both", "Did you mean 'order'"),
        ("pandalm", "order", "wanted KEY=VALUE"),
        ("pandalm", "order=", "wanted KEY=VALUE"),
        ("pandalm", "order=bot", "wanted one of as_given, random, both"),
        ("pandalm", "aggregation=mean", "has first_order, pooled"),
        ("pandalm", "tie_credit=half", "a number from 0 to 1 or 'second'"),
        ("pandalm", "tie_credit=nan", "a number from 0 to 1"),
        ("pandalm", "tie_credit=1.5", "a number from 0 to 1"),
        ("rewardbench2", "error_credit=tie", "a number from 0 to 1 here"),
        ("rewardbench2", "tie_credit=second", "or 'shared'"),
        ("pandalm", "pandlm.order=both", "Did you mean 'pandalm'"),
    ],
)
def test_a_wrong_policy_is_refused(name, override, message):
    with pytest.raises(UsageError, match=message):
        policy_of(name, [override])


# -------------------------------------------------------------------------------------- readers


def write(path: pathlib.Path, rows) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows))
    return str(path)


def test_rmbench_takes_the_domain_from_the_name_of_the_file(reference, tmp_path):
    items = BENCHMARKS["rmbench"].read(str(reference / "rmbench"))
    subsets = collections.Counter(item.subset for item in items)
    assert subsets == {"chat": 129, "safety-refuse": 284}
    assert {(len(item.answers), item.num_correct) for item in items} == {(6, 3)}
    row = {"id": 1, "prompt": "?", "chosen": ["a"] * 3, "rejected": ["b"] * 3}
    with pytest.raises(UsageError, match="no domain"):
        BENCHMARKS["rmbench"].read(write(tmp_path / "x.json", [row]))
    with pytest.raises(UsageError, match="three chosen"):
        BENCHMARKS["rmbench"].read(write(tmp_path / "chat.json", [{**row, "chosen": ["a"]}]))
    whole = write(tmp_path / "total_dataset.json", [{**row, "domain": "code"}])
    assert [item.id for item in BENCHMARKS["rmbench"].read(whole)] == ["code:1"]
    assert [item.id for item in BENCHMARKS["rmbench"].read(str(tmp_path))] == ["code:1"]


def test_rewardbench_reads_the_part_that_there_is(reference):
    file = reference / "rewardbench" / "partial_llmbar_hep.jsonl"
    items = BENCHMARKS["rewardbench"].read(str(file))
    assert len({item.id for item in items}) == 1403
    games = BENCHMARKS["rewardbench"].games(items, policy_of("rewardbench"), 0)
    metrics = score("rewardbench", games, lambda game: Response(game.id, preference=truth(game)))
    assert {"overall", "Chat Hard", "Reasoning", "micro", "hep-go"} <= metrics.keys()
    assert "Chat" not in metrics


def test_ids_that_repeat_become_unique(tmp_path):
    row = {"id": 1, "prompt": "?", "chosen": "a", "rejected": "b"}
    rows = [{**row, "subset": name} for name in ("hep-go", "hep-go", "math-prm")]
    items = BENCHMARKS["rewardbench"].read(write(tmp_path / "x.json", rows))
    assert [item.id for item in items] == ["hep-go:1", "hep-go:1#2", "math-prm:1"]


def test_helpsteer3_and_ppe_leave_out_ties(tmp_path, caplog):
    messages = [{"role": "user", "content": "Hi"}]
    long = [*messages, {"role": "assistant", "content": "Ho"}, {"role": "user", "content": "So?"}]
    rows = [
        {
            "context": c,
            "response1": "a",
            "response2": "b",
            "overall_preference": p,
            "domain": "stem",
        }
        for c, p in ((messages, -2), (long, 1), (messages, 0))
    ]
    with caplog.at_level(logging.WARNING):
        items = BENCHMARKS["helpsteer3"].read(write(tmp_path / "h.json", rows))
    assert [(i.question, i.label) for i in items] == [
        ("Hi", 1),
        ("User: Hi\n\nAssistant: Ho\n\nUser: So?", 2),
    ]
    assert "1 rows are not asked" in caplog.text
    votes = [
        {"question_id": i, "prompt": "?", "response_1": "a", "response_2": "b", "winner": winner}
        for i, winner in enumerate(["model_a", "model_b", "tie", "tie (bothbad)"])
    ]
    items = BENCHMARKS["ppe_preference"].read(write(tmp_path / "p.json", votes))
    assert [item.label for item in items] == [1, 2]
    with pytest.raises(UsageError, match="'winner' must be one of"):
        BENCHMARKS["ppe_preference"].read(write(tmp_path / "w.json", [{**votes[0], "winner": "c"}]))


def test_ppe_correctness_asks_the_sampled_pairs(tmp_path):
    row = {
        **{"question_id": "q", "prompt": "?", "response_1": "a", "response_2": "b"},
        **{"response_3": "c", "scores": [True, False, True]},
        "sampled_conflict_pairs": [[0, 1], [1, 2]],
    }
    write(tmp_path / "PPE-IFEval-Best-of-K" / "train.json", [row])
    write(tmp_path / "PPE-MATH-Best-of-K" / "train.json", [row, row])
    items = BENCHMARKS["ppe_correctness"].read(str(tmp_path))
    assert [(item.id, item.answers, item.label) for item in items[:2]] == [
        ("IFEval:q:0-1", ("a", "b"), 1),
        ("IFEval:q:1-2", ("b", "c"), 2),
    ]
    assert len({item.id for item in items}) == 6
    games = BENCHMARKS["ppe_correctness"].games(items, policy_of("ppe_correctness"), 0)
    right = {item.id for item in items if item.subset == "MATH"}
    found = score("ppe_correctness", games, _right_where(right))
    assert found == {"overall": 50.0, "IFEval": 0.0, "MATH": 100.0}
    with pytest.raises(UsageError, match="named after one of MMLU-Pro"):
        BENCHMARKS["ppe_correctness"].read(write(tmp_path / "other" / "x.json", [row]))


def test_rmb_reads_pairs_and_lists(tmp_path):
    ask = {"conversation_input": [{"role": "user", "content": "?"}]}
    best, worse = {"answer": "a", "llm_name": "m"}, {"answer": "b", "llm_name": "n"}
    write(
        tmp_path / "Pairwise_set" / "Harmlessness" / "S1.json",
        [{**ask, "pair_uid": "1", "chosen": best, "reject": worse}],
    )
    write(
        tmp_path / "BoN_set" / "Helpfulness" / "Chat" / "x.json",
        [{**ask, "bon_uid": "1", "bon_best": best, "loser_list": [worse, worse]}],
    )
    items = BENCHMARKS["rmb"].read(str(tmp_path))
    assert [(i.id, i.subset, len(i.answers)) for i in items] == [
        ("BoN:1", "Helpfulness BoN", 3),
        ("Pairwise:1", "Harmlessness Pairwise", 2),
    ]
    policy = policy_of("rmb", ["order=both"])
    games = BENCHMARKS["rmb"].games(items, policy, 0)
    assert len(games) == 6
    # one loser beats the best in one order
    said = {game.id: truth(game) for game in games} | {"BoN:1:0-2": 2}
    found = score("rmb", games, lambda game: Response(game.id, preference=said[game.id]), policy)
    assert found == {"overall": 50.0, "Harmlessness Pairwise": 100.0, "Helpfulness BoN": 0.0}


def test_pairs_reads_whatever_training_reads(tmp_path):
    rows = [
        Comparison("x", "q", "a", "b", 8.0, 3.0, source="s"),
        Comparison("y", "r", "a", "b", None, None, 0, "t"),
    ]
    write_comparisons(rows, tmp_path / "pairs.jsonl")
    items = BENCHMARKS["pairs"].read(str(tmp_path / "pairs.jsonl"))
    assert [(item.id, item.label, item.subset) for item in items] == [("x", 1, "s"), ("y", 0, "t")]
    games = BENCHMARKS["pairs"].games(items, policy_of("pairs"), 0)
    found = score("pairs", games, lambda game: Response(game.id, preference=0))
    assert found == {"overall": 75.0, "consistency": 100.0, "s": 50.0, "t": 100.0}


@pytest.mark.parametrize("name", BENCHMARKS)
def test_missing_data_says_how_to_get_it(name, tmp_path, monkeypatch):
    known = BENCHMARKS[name]
    for missing in (str(tmp_path / "absent.json"), ""):
        with pytest.raises(UsageError) as error:
            known.read(missing)
        if name in ("pairs", "lists") and missing:
            continue  # the reader's own sentence
        assert f"--data {name}=" in str(error.value)
    if known.source:  # offline, as all tests are
        monkeypatch.setenv("HF_HOME", str(tmp_path))
        with pytest.raises(UsageError) as error:
            known.read(known.source)
        assert f"--data {name}=" in str(error.value)


def test_rows_that_lack_a_field_are_named(tmp_path):
    for name, row, message in (
        ("judgebench", {"pair_id": "1"}, "row 1 has no field 'question'"),
        ("llmbar", {"input": 3}, "'input' must be text, got 3"),
        ("rewardbench2", [], "must be a JSON object, got list"),
        ("pandalm", {"instruction": "", "input": None}, "'input' must be text, got None"),
    ):
        file = write(tmp_path / "dataset.json", [row])
        with pytest.raises(UsageError, match=message):
            BENCHMARKS[name].read(file)


def test_judgelm_reads_labels_from_scores_too_and_needs_both_files(tmp_path):
    texts = {"question_body": "q", "answer1_body": "a", "answer2_body": "b"}
    rows = [{"question_id": i, **texts, "score": s} for i, s in enumerate(([8, 9], [-1, -1]))]
    items = BENCHMARKS["judgelm"].read(write(tmp_path / "one" / "x.json", rows))
    assert [(item.id, item.label) for item in items] == [("0", 2)]
    (tmp_path / PAIRS).write_text(json.dumps({"question_id": 1, **texts}))
    with pytest.raises(UsageError, match=f"holds no {GOLD}"):
        BENCHMARKS["judgelm"].read(str(tmp_path))
    (tmp_path / GOLD).write_text(json.dumps({"question_id": 2, "text": "1 2"}))
    with pytest.raises(UsageError, match="has no row for it"):
        BENCHMARKS["judgelm"].read(str(tmp_path))


def test_conversations_are_read_or_refused():
    assert sources.conversation("text", "x") == "text"
    for wrong in ([], [{}], 3, None, ["a"]):
        with pytest.raises(UsageError, match="wanted text or a list"):
            sources.conversation(wrong, "x, row 1")


# ----------------------------------------------------------------------------- recorded verdicts


def recorded(tmp_path, rows, items=None):
    items = items or [Item("7", "?", ("a", "b"), 1), Item("8", "!", ("a", "b"), 2)]
    return Recorded(write(tmp_path / "verdicts.json", rows), items)


def test_recorded_verdicts_in_every_form(tmp_path):
    for row, wanted in (
        ({"id": 7, "output": "text"}, Response("7:0-1", texts=("text",))),
        ({"idx": 7, "output": ["a", "b"]}, Response("7:0-1", texts=("a", "b"))),
        ({"pair_id": "7", "scores": [1, 2.5]}, Response("7:0-1", scores=(1.0, 2.5))),
        ({"id": "7", "decision": 2}, Response("7:0-1", preference=2)),
        ({"id": "7", "decision": "A>B", "swapped": True}, Response("7:1-0", preference=1)),
        ({"id": "7:1-0", "decision": "tie"}, Response("7:1-0", preference=0)),
        ({"game": "7:1-0", "decision": "B"}, Response("7:1-0", preference=2)),
        ({"id": "7", "decision": None}, Response("7:0-1", texts=("",))),
        ({"id": "7", "gpt_result": "Tie\nas"}, Response("7:0-1", preference=0)),
        ({"id": "7", "decision": " "}, Response("7:0-1", texts=(" ",))),
        ({"id": "7", "decision": "[[A]]"}, Response("7:0-1", preference=1)),
        ({"id": "7", "decision": "Response 2"}, Response("7:0-1", preference=2)),
        ({"id": "7", "decision": "A=B"}, Response("7:0-1", preference=0)),
        ({"id": "7", "gpt_result": "garbage"}, Response("7:0-1", texts=("garbage",))),
        ({"id": "7", "result": 1}, Response("7:0-1", preference=1)),
    ):
        assert list(recorded(tmp_path, [row]).responses.values()) == [wanted], row


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"id": "7", "verdict": 1}, "row 1 holds no verdict in a known form"),
        ({"decision": 1}, "row 1 names no item: wanted one of game, id, idx, pair_id"),
        ({"id": "7", "decision": 3}, "must be 1, 2 or 0"),
        ({"id": "7", "decision": "C"}, "row 1: 'decision' is 'C', which names no answer"),
        ({"id": "7", "decision": "maybe"}, "The raw text of a judge goes into 'output'"),
        ({"id": "7", "decision": "A or B"}, "which names no answer. Wanted 1, 2, 0; A, B, tie"),
        ({"id": "7", "judgments": [{"decision": "A>"}]}, "row 1: 'decision' is 'A>'"),
        ({"id": "7", "decision": True}, "must be a decision"),
        ({"id": "7", "decision": [1]}, "must be a decision"),
        ({"id": "7", "scores": [1]}, "must be two numbers"),
        ({"id": "7", "scores": [1, "2"]}, "must be a list of numbers"),
        ({"id": "7", "scores": [1, math.nan]}, "holds a value that is not a number"),
        ({"id": "7", "judgments": 3}, "must be a list of one or two"),
        ({"id": "7", "results": []}, "must be a list of objects"),
        ({"id": "7", "output": 3}, "must be a list of texts"),
        ({"id": "7", "output": []}, "row 1: 'output' holds no text"),
        ({"id": "7", "output": None}, "row 1 holds no verdict: it is null"),
        ({"id": "9", "scores": [1, 2]}, "2 scores for the 3 answers"),
        ({"id": "9", "decision": 1}, 'Say which two were shown with "game": "9:0-1"'),
    ],
)
def test_unknown_forms_of_verdicts_are_refused(tmp_path, row, message):
    items = [Item("7", "?", ("a", "b"), 1), Item("9", "?", ("a", "b", "c"))]
    with pytest.raises(UsageError, match=message):
        recorded(tmp_path, [row], items)
    with pytest.raises(UsageError, match=r"a second verdict on 7:0-1\..*'swapped': true"):
        recorded(tmp_path, [{"id": 7, "decision": 1}, {"idx": 7, "decision": 2}], items)


def test_a_file_of_verdicts_without_a_row_is_refused(tmp_path):
    (tmp_path / "none.jsonl").write_text("\n")
    with pytest.raises(UsageError, match="holds no rows"):
        Recorded(str(tmp_path / "none.jsonl"), [Item("7", "?", ("a", "b"), 1)])


def test_missing_and_extra_verdicts_are_counted(tmp_path, caplog):
    found = recorded(tmp_path, [{"id": 7, "decision": 1}, {"id": "unknown", "decision": 1}])
    items = [Item("7", "?", ("a", "b"), 1), Item("8", "!", ("a", "b"), 2)]
    games, responses = BENCHMARKS["judgebench"].games(items, policy_of("judgebench"), 0), []
    with caplog.at_level(logging.WARNING):
        found.backend("FILE")(games, responses.append)
    assert [each.error is None for each in responses] == [True, False, False, False]
    assert "1 rows name no item" in caplog.text and "3 games have no row" in caplog.text
    assert "--policy order=as_given" in caplog.text


def test_one_order_of_a_pair_is_that_of_the_file(tmp_path):
    rows = [{"id": 7, "decision": 1, "swapped": True}, {"id": 8, "decision": 1}]
    items = [Item("7", "?", ("a", "b"), 1), Item("8", "!", ("a", "b"), 1)]
    found = recorded(tmp_path, rows, items)
    for seed in range(4):
        games = BENCHMARKS["rewardbench"].games(items, policy_of("rewardbench"), seed)
        assert [game.id for game in found.as_played(games)] == ["7:1-0", "8:0-1"]
    both = BENCHMARKS["judgebench"].games(items, policy_of("judgebench"), 0)
    assert found.as_played(both) == both


# -------------------------------------------------------------------------------------- table


def test_published_rows_name_metrics_that_the_benchmark_has(reference):
    for name, known in BENCHMARKS.items():
        assert known.name == name and known.policy == POLICIES[name][0]
        policy = policy_of(name, ["order=both"])
        metrics = score(
            name,
            known.games(items_of(name), policy, 0),
            lambda game: Response(game.id, preference=truth(game)),
            policy,
        )
        known_elsewhere = {"Chat", "IFEval", "Precise IF", "chat", "safety"}
        for row in known.published:
            is_known = row.metric in {*metrics, *known_elsewhere}
            assert is_known or row.metric.endswith("_two_classes"), (name, row)
            assert 0 <= row.value <= 100 and row.source
            assert f"--benchmark {name} " in row.command
    table = {(r.judge, r.metric): r.value for r in BENCHMARKS["pandalm"].published}
    assert table["JudgeLRM-7B", "f1"] == 75.05 and len(table) == 28


def test_an_unknown_benchmark_is_named():
    with pytest.raises(UsageError, match="Did you mean 'pandalm'"):
        benchmark("padalm")


def test_marks_of_ties_carry_their_row():
    item = Item("tied:1", "?", ("a", "b", "c"), num_correct=2, subset="Ties")
    games = BENCHMARKS["rewardbench2"].games([item], policy_of("rewardbench2"), 0)
    said = {0: 9.0, 1: 8.0, 2: 1.0}
    scores = [(said[game.first], said[game.second]) for game in games]
    judged = ItemVerdicts(item, tuple(map(game_verdict, games, scores)))
    credit = rewardbench2.credit(judged, policy_of("rewardbench2"))
    assert credit == Credit(item, 1.0, (), TiesRow("tied:1", [9.0, 8.0, 1.0], 2))
