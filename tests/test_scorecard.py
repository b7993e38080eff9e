"""What a scorecard promises: the numbers of `results.json`, hostile text kept text, no network."""

from __future__ import annotations

import base64
import dataclasses
import json
import pathlib
import re
import subprocess
import sys
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest

from jlrm import scorecard
from jlrm.config import UsageError
from jlrm.evaluation.benchmarks import pairs
from jlrm.evaluation.benchmarks.registry import policy_of
from jlrm.evaluation.games import Game, Item, Response
from jlrm.evaluation.reading import reader
from jlrm.evaluation.statistics import diagnostics, results
from jlrm.reports import (
    contracts,
    results_file,
    scorecard_charts,
    scorecard_page,
    theme,
)
from jlrm.reports.evaluated import EvaluatedJudge
from jlrm.reports.results_file import BenchmarkResult, JudgeRecord, Published, Results

EVIL = "</pre></details><script>alert('x')</script><img src=http://evil.example/x onerror=y> | $x_"
PUBLISHED = Published(
    "JudgeLRM-7B",
    "agreement",
    78.28,
    "arXiv 2504.00050, Table 1; https://example.org/paper",
    "python -m jlrm.evaluate --benchmark pandalm",
)
BENCHMARK = pairs.BENCHMARK._replace(published=(PUBLISHED,))
POLICY = policy_of("pairs", ["aggregation=first_order"])


def evaluation(seed: int, num_items: int = 60, num_missing: int = 0) -> results.Evaluation:
    """Return a judge's hostile responses to random items of two subsets, a tenth cut short."""
    rng = np.random.default_rng(seed)
    items = [
        Item(
            f"item-{number}",
            f"Why? {EVIL} {number}",
            (f"One {EVIL}" + "a" * number, f"Two {EVIL}" + "b" * (num_items - number)),
            label=number % 3,
            subset=f"hard {EVIL}" if number % 3 == 0 else "easy",
        )
        for number in range(num_items)
    ]
    games = BENCHMARK.games(items, POLICY, 0)
    responses = {
        game.id: Response(
            game.id,
            texts=(f"first vote {EVIL}" + _verdict(rng, game), "second vote \ud800"),
            prompt_tokens=70,
            num_tokens=int(rng.integers(1, 99)),
            seconds=0.5,
        )
        for game in games[: len(games) - num_missing]
    }
    return results.Evaluation(BENCHMARK, POLICY, games, responses, reader("strict"))


def _verdict(rng: np.random.Generator, game: Game) -> str:
    """Return scores that are often those of the label; nothing in one case of ten."""
    if rng.random() < 0.1:
        return ""
    first, second = rng.integers(1, 11, 2)
    if rng.random() < 0.5 and game.item.label:
        right = game.first + 1 == game.item.label
        first, second = (9, 2) if right else (2, 9)
    return f"</think><answer>{first}</answer><answer>{second}</answer>"


def benchmark(seed: int, **settings: int) -> BenchmarkResult:
    return results.entry(evaluation(seed, **settings), 9.0)


def judge(name: str, **benchmarks: BenchmarkResult) -> Results:
    about = JudgeRecord(
        name=name,
        model="/home/someone/models/judge-3b",
        backend="jlrm",
        prompt="judgelrm",
        parser="strict",
        decoding={"temperature": 0.0, "max_new_tokens": 2048},
    )
    return Results(about, benchmarks)


PAIRED = results.comparison(evaluation(2), evaluation(0), "ours")
RESULTS = [
    judge("/home/someone/ours", pandalm=benchmark(0), rewardbench=benchmark(1, num_missing=9)),
    judge(
        f"base {EVIL}",
        pandalm=dataclasses.replace(benchmark(2), comparison=PAIRED),
        judgebench=benchmark(3, num_items=1200),
    ),
]
NAMES = ("pandalm", "rewardbench", "judgebench")


def result(name: str, column: int) -> BenchmarkResult:
    return RESULTS[column].benchmarks.get(name, BenchmarkResult())


class Page(HTMLParser):
    """Collect what a test asks about; refuses tags that are closed out of order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.tables: list[list[list[str]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("th", "td"):
            self.tables[-1][-1].append("")
        if tag in ("br", "small"):
            self.handle_data("\n")
        if tag not in ("meta", "source", "img", "br"):  # need no end tag
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        if {"th", "td"} & {*self.open}:
            self.tables[-1][-1][-1] += data

    def table(self, corner: str) -> list[dict[str, list[str]]]:
        """Return all tables with a first header cell: row -> cells, "" -> the header."""
        return [
            {row[0].split("\n")[0]: row[1:] for row in table[1:]} | {"": table[0][1:]}
            for table in self.tables
            if table[0][0] == corner
        ]


def render(out: pathlib.Path, results: list[Results]) -> Page:
    scorecard_page.write(out, results)
    return Page((out / "report.html").read_text())


@pytest.fixture(scope="module")
def full(tmp_path_factory) -> pathlib.Path:
    out = tmp_path_factory.mktemp("full")
    places = [out / str(number) for number in range(len(RESULTS))]
    for place, each in zip(places, RESULTS, strict=True):
        place.mkdir()
        results_file.write(place, each)
    scorecard.main([*map(str, places), "--out", str(out)])
    return out


@pytest.fixture(scope="module")
def page(full) -> Page:
    return Page((full / "report.html").read_text())


@pytest.mark.slow
def test_the_page_stands_alone(full, page):
    text = (full / "report.html").read_text()
    assert not {"script", "link", "iframe", "object", "base", "form"} & set(page.tags)
    for name, value in page.attributes:
        assert not name.startswith("on")
        if name in ("src", "srcset", "href", "action", "poster", "data", "xlink:href"):
            assert value.startswith(("data:image/svg+xml;base64,", "#")), value[:50]
    targets = {value for name, value in page.attributes if name == "id"}
    links = {value[1:] for name, value in page.attributes if name == "href"}
    assert links and links <= targets
    styles = text[: text.index("</style>")] + "".join(v for n, v in page.attributes if n == "style")
    assert "url(" not in styles and "@import" not in styles


@pytest.mark.slow
def test_what_a_judge_wrote_stays_text(full, page):
    text = (full / "report.html").read_text()
    assert EVIL not in text and "<script" not in text and "evil.example/x onerror" in text
    for written in ("Why? ", "One ", "Two ", "first vote ", "hard ", "base "):
        assert written + EVIL in page.text or written == "hard "  # a subset is in a picture
    worst = [item for r in RESULTS for b in r.benchmarks.values() for item in b.worst]
    votes = [text for item in worst for text in item.responses if "first vote" in text]
    assert page.text.count("first vote") == len(votes) > 100 and "second vote ?" in page.text
    assert page.tags.count("script") == 0
    for item in worst:
        told = ", ".join("none" if s is None else f"{s[0]:g} : {s[1]:g}" for s in item.scores)
        assert (f"scores {told}" if any(item.scores) else "no scores") in page.text
    assert "label: a tie" in page.text and "Answer 2 (label)" in page.text


def metric_text(entry: BenchmarkResult, metric: str) -> str:
    value, (low, high) = entry.metrics[metric], entry.intervals[metric]
    return f"{value:.2f}\n{low:.1f} to {high:.1f}" + "\n⚠ INCOMPLETE" * entry.incomplete


def test_every_metric_of_every_judge_is_in_the_tables(page):
    tables = page.table("Metric (%)")
    assert len(tables) == 3
    for name, table in zip(NAMES, tables, strict=True):
        metrics = dict.fromkeys(m for column in (0, 1) for m in result(name, column).metrics)
        assert table[""] == list(metrics)
        for column, row in enumerate(("ours", f"base {EVIL}")):
            entry = result(name, column)
            expected = [metric_text(entry, m) for m in metrics] if entry.metrics else None
            assert table.get(row) == expected
        published = ["78.28" if metric == "agreement" else "–" for metric in metrics]
        assert table["JudgeLRM-7B"] == published and "None" not in str(table)


def test_the_first_table_says_which_judge_by_how_much_and_how_sure(page):
    table = page.tables[0]
    assert table[0] == ["Benchmark (%)", "ours", f"base {EVIL}", "Lead (points)"]
    assert [row[0] for row in table[1:]] == [
        "pandalm\nagreement, n = 60",
        f"rewardbench\nagreement, n = {result('rewardbench', 0).n}",
        "judgebench\nagreement, n = 1,200",
    ]
    assert table[1][1:3] == [metric_text(result("pandalm", i), "agreement") for i in (0, 1)]
    assert table[2][1:] == [metric_text(result("rewardbench", 0), "agreement"), "–", "–"]
    assert table[3][1:] == ["–", metric_text(result("judgebench", 1), "agreement"), "–"]
    lead = table[1][3]
    ahead = "ours" if PAIRED.difference < 0 else f"base {EVIL}"
    low, high = PAIRED.interval
    low, high = (-high, -low) if PAIRED.difference < 0 else (low, high)
    margin = f"{ahead} +{abs(PAIRED.difference):.1f}\npaired, {low:.1f} to {high:.1f}"
    assert lead.startswith(margin)
    is_settled = PAIRED.interval[0] * PAIRED.interval[1] > 0
    assert lead.endswith(": not settled") != is_settled
    assert f"{ahead} leads on 1 of 1 benchmarks ({int(is_settled)} settled)" in page.text


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"a": (70, 65, 75), "b": (60, 55, 64)}, "a +10.0, intervals do not overlap"),
        ({"a": (60, 55, 66), "b": (70, 65, 75)}, "b +10.0, intervals overlap: not settled"),
        (
            {"a": (60, 55, 66), "b": (70, 68, 75), "c": (50, 1, 99)},
            "b +10.0, intervals do not overlap",
        ),
        ({"a": (60, 55, 66)}, None),
    ],
)
def test_a_lead_is_settled_where_intervals_are_apart(values, expected):
    judges = [
        EvaluatedJudge(
            name,
            JudgeRecord(),
            {"b": BenchmarkResult(metrics={"x": value}, intervals={"x": (low, high)})},
        )
        for name, (value, low, high) in values.items()
    ]
    lead = scorecard_page._lead("b", judges)
    assert expected == (lead and f"{lead.judge} +{lead.margin:.1f}, {lead.note}")


@pytest.mark.slow
def test_items_that_judges_differ_in_are_counted_apart(tmp_path):
    page = render(tmp_path, [judge("a", b=benchmark(0)), judge("c", b=benchmark(0, num_items=12))])
    row = page.tables[0][1]
    assert row[0] == "b\nagreement" and [cell.split("\n")[-1] for cell in row[1:3]] == [
        "n = 60",
        "n = 12",
    ]


def test_folders_of_a_machine_are_not_shown(full, page):
    assert "/home/someone" not in page.text and "judge-3b" in page.text
    assert "/home/someone/ours" not in (full / "model_card.md").read_text()


@pytest.mark.slow
def test_a_judge_without_verdicts_stays_in_the_charts(tmp_path):
    silent = evaluation(0)
    silent = silent._replace(
        responses={
            name: dataclasses.replace(each, texts=("?",)) for name, each in silent.responses.items()
        }
    )
    three = [judge("a", b=benchmark(0)), judge("mute", b=results.entry(silent, 9.0)), judge("out")]
    page = render(tmp_path, three)
    drawings = [
        base64.b64decode(value.partition(",")[2]).decode()
        for name, value in page.attributes
        if name == "src"
    ]
    titles = [value for name, value in page.attributes if name == "alt"]
    by_title = {title.split(";")[0]: each for title, each in zip(titles, drawings, strict=True)}
    headline = by_title["Results: b"]
    assert "mute" in headline and "out" in headline and "not run" in headline
    assert "no verdicts" in by_title[scorecard_charts.PLACES_TITLE]
    assert "mute none" in by_title["Reliability: b"]
    assert "mute" in by_title[scorecard_charts.CONSISTENCY_TITLE]


def test_diagnostics_are_those_of_the_results(page):
    tables = page.table("Diagnostic")
    assert len(tables) == 3
    for name, table in zip(NAMES, tables, strict=True):
        for column, judged in enumerate(RESULTS):
            if name not in judged.benchmarks:
                assert {cells[column] for cells in table.values() if cells} <= {
                    "–",
                    "0",
                    table[""][column],
                }
                continue
            made = judged.benchmarks[name].diagnostics
            rate, lean, failures = made.first, made.lean_to_first, made.parse_failures
            low, high = rate.interval
            assert table["Names the answer shown first"][column] == (
                f"{rate.percent:.1f} %\n{low:.1f} to {high:.1f}\nn = {rate.n:,}"
            )
            assert table["Lean to the first, of the other pairs"][column] == (
                f"{lean.points:+.1f} points\nn = {lean.n:,}"
            )
            assert table["No verdict"][column].startswith(f"{failures.percent:.1f} %")
            assert table["… no think end"][column] == f"{made.statuses['no_think_end']:,}"
            assert table["Verdicts for the longer answer"][column].startswith(
                f"{made.length.verdicts.percent:.1f} %"
            )
            calibration, cost = made.calibration, made.cost
            assert table["Expected calibration error (points)"][column] == f"{calibration.ece:.1f}"
            assert table["Brier score (0 to 1)"][column] == f"{calibration.brier:.3f}"
            assert table["Prompt tokens a game"][column] == f"70\nn = {made.games:,}"
            assert table["Generated tokens a second"][column] == f"{cost.tokens_per_second:.0f}"


def test_confusion_matrices_and_reliability_in_numbers(page):
    matrices = [table for table in page.tables if table[0] == ["", "tie", "1", "2", "none"]]
    expected = [
        judged.benchmarks[name].diagnostics
        for name in NAMES
        for judged in RESULTS
        if name in judged.benchmarks
    ]
    assert len(matrices) == len(expected) == 4
    for matrix, made in zip(matrices, expected, strict=True):
        assert [row[0] for row in matrix[1:]] == ["tie", "1", "2"]
        counts = [[int(cell.replace(",", "")) for cell in row[1:]] for row in matrix[1:]]
        assert counts == [list(row) for row in made.confusion.counts]
    reliability = [table for table in page.tables if table[0][0] == "Confidence (%)"]
    for table, made in zip(reliability, expected, strict=True):
        assert table[1:] == [
            [f"{b.low:g} to {b.high:g}", f"{b.confidence:.1f}", f"{b.accuracy:.1f}", f"{b.n:,}"]
            for b in made.calibration.bins
            if b.n
        ]


def test_comparisons_and_sources_are_told(page):
    (table,) = page.table("Paired")
    assert table[""] == ["Points", "Bootstrap p", "McNemar p", "Items"]
    low, high = PAIRED.interval
    points = f"{PAIRED.difference:+.2f}\n{low:.1f} to {high:.1f}"
    p_values = [f"{PAIRED.p_value:.4f}", f"{PAIRED.mcnemar_p:.4f}"]
    assert table[f"base {EVIL} less ours"] == [points, *p_values, "60"]
    assert "https://example.org/paper" in page.text and "jlrm.evaluate --benchmark" in page.text


@pytest.mark.slow
def test_clusters_are_told_in_the_page_and_the_card_and_older_files_have_none(tmp_path):
    pair = dataclasses.replace(PAIRED, mcnemar_p=None, clusters=12, design_effect=2.5)
    entry = dataclasses.replace(benchmark(2), comparison=pair, clusters=10, design_effect=1.75)
    page = render(tmp_path / "new", [judge("mine", pandalm=entry)])
    (table,) = page.table("Paired")
    assert table["mine less ours"][-1] == "60\n12 clusters, design effect 2.50"
    line = "60 items in 10 clusters of items that share a question, design effect 1.75"
    assert f"mine: {line}." in page.text
    assert f"* pandalm: {line}; " in (tmp_path / "new" / "model_card.md").read_text()

    content = contracts.encode(judge("mine", pandalm=entry))
    older = content["benchmarks"]["pandalm"]
    for part in (older, older["comparison"]):
        del part["clusters"], part["design_effect"]
    (tmp_path / "results.json").write_text(json.dumps(content))
    read = results_file.read(tmp_path)
    assert read.benchmarks["pandalm"].clusters is None
    page = render(tmp_path / "old", [read])
    assert page.table("Paired")[0]["mine less ours"][-1] == "60" and "clusters of" not in page.text


@pytest.mark.slow
def test_a_judge_without_verdicts_is_named_on_the_page_and_in_the_card(tmp_path):
    made = evaluation(0)
    texts = {name: dataclasses.replace(each, texts=("?",)) for name, each in made.responses.items()}
    silent = results.entry(made._replace(responses=texts), 9.0)
    page = render(tmp_path, [judge("mute", pandalm=silent), judge("ours", pandalm=benchmark(1))])
    assert "NO VERDICT. A figure without" in page.text
    assert "mute: pandalm, none of 120 games" in page.text
    card = (tmp_path / "model_card.md").read_text()
    assert "* **mute, pandalm: NO VERDICT in any of 120 games. All figures are left out" in card
    assert page.text.count("no verdicts") >= len(silent.metrics)
    assert silent.diagnostics.consistency and silent.diagnostics.consistency.percent is None


@pytest.mark.slow
def test_a_p_value_is_never_nought(tmp_path):
    pair = dataclasses.replace(PAIRED, p_value=0.00004, mcnemar_p=None)
    entry = dataclasses.replace(benchmark(2), comparison=pair)
    (table,) = render(tmp_path, [judge("mine", pandalm=entry)]).table("Paired")
    assert table["mine less ours"][1:] == ["< 0.0001", "–", "60"]


@pytest.mark.slow
def test_incomplete_runs_are_marked_in_the_page_and_the_card(full, page, tmp_path):
    assert "INCOMPLETE. These runs have not judged all games" in page.text
    assert page.text.count("ours: rewardbench") == 2  # above all, and in its section
    assert "ours: pandalm" not in page.text
    card = (full / "model_card.md").read_text()
    assert "| rewardbench (INCOMPLETE) |" in card and "pandalm (INCOMPLETE)" not in card
    assert "**ours, rewardbench: INCOMPLETE. Not all games were judged.**" in card
    complete = render(tmp_path, [judge("ours", rewardbench=benchmark(1))])
    assert "INCOMPLETE" not in complete.text


def test_pictures_are_pictures_in_two_themes(full, page):
    from PIL import Image

    sources = [v for n, v in page.attributes if n in ("src", "srcset")]
    alts = [value for name, value in page.attributes if name == "alt"]
    kinds = {"Results", "Same verdict", "Verdicts", "Reliability", "Accuracy by subset"}
    assert all(any(alt.startswith(kind) for alt in alts) for kind in kinds)
    assert len(alts) == 3 + 2 + 2 * 3 and len(sources) == 2 * len(alts)
    papers = set()
    for source in sources:
        drawing = base64.b64decode(source.partition(",")[2], validate=True).decode()
        assert ElementTree.fromstring(drawing).tag.endswith("svg")
        papers.add(re.search("fill: (#.{6})", drawing)[1])
    assert papers == {theme.LIGHT.paper, theme.DARK.paper}
    overview = Image.open(full / "report.png")
    assert overview.width > 2000 and len(set(overview.convert("L").resize((64, 64)).getdata())) > 9


def card_rows(out: pathlib.Path) -> list[list[str]]:
    lines = (out / "model_card.md").read_text().splitlines()
    rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in lines if line.startswith("|")]
    return [[cell.strip() for cell in row] for row in rows]


def test_the_model_card_holds_every_metric_with_its_rules(full):
    rows = card_rows(full)
    header = ["judge", "benchmark", "metric", "value (%)", "95 % interval", "n", "policy"]
    assert rows[0] == [*header, "prompt", "parser"] and set(rows[1]) == {"---"}
    policy = "aggregation: first\\_order · order: both · tie credit: 0.0 · error credit: 0.0"
    policy += " · refused: unjudged"
    entry = result("pandalm", 0)
    value, (low, high) = entry.metrics["agreement"], entry.intervals["agreement"]
    expected = ["ours", "pandalm", "agreement", f"{value:.2f}", f"{low:.1f} to {high:.1f}", "60"]
    assert rows[2] == [*expected, policy, "judgelrm", "strict"]
    metrics = sum(len(b.metrics) for r in RESULTS for b in r.benchmarks.values())
    assert [len(row) for row in rows[: metrics + 2]] == [9] * (metrics + 2)
    published = rows[metrics + 2 :]
    assert published[0] == ["benchmark", "judge", "metric", "value (%)", "source"]
    assert (
        published[2][:4] == ["pandalm", "JudgeLRM-7B", "agreement", "78.28"] and len(published) == 5
    )
    text = (full / "model_card.md").read_text()
    assert "<script" not in text and "<img" not in text
    made = RESULTS[0].benchmarks["pandalm"].diagnostics
    failures, swaps = made.parse_failures, made.consistency
    assert f"no verdict in {failures.percent:.1f} % (n = {failures.n})" in text
    assert f"same verdict in both orders {swaps.percent:.1f} % (n = {swaps.n})" in text
    assert "temperature 0.0" in text and "bootstrap over clusters" in text


@pytest.mark.slow
def test_the_model_card_says_which_prompts_are_open_to_planting(tmp_path):
    for prompt, is_open in (("judgelrm_eval", True), ("jlrm", False), ("", False)):
        entry = judge("ours", pandalm=benchmark(0))
        about = dataclasses.replace(entry.judge, prompt=prompt)
        render(tmp_path, [dataclasses.replace(entry, judge=about)])
        text = (tmp_path / "model_card.md").read_text()
        assert ("an answer can plant a verdict" in text) == is_open


@pytest.mark.slow
def test_one_judge_has_no_judge_column(tmp_path):
    entry = dataclasses.replace(benchmark(0), published=())
    page = render(tmp_path, [judge("ours", pandalm=entry)])
    rows = card_rows(tmp_path)
    assert rows[0][0] == "benchmark" and len(rows) == 2 + len(entry.metrics)
    assert page.tables[0][0] == ["Benchmark (%)", "ours"]  # and nobody leads
    assert [*page.table("Metric (%)")[0]] == ["ours", ""]


@pytest.mark.parametrize(
    "result",
    [
        {"judge": {}, "benchmarks": {}},
        {"judge": {"name": "j"}, "benchmarks": {"b": {}}},
        {"judge": {"name": "j"}, "benchmarks": {"b": {"metrics": {"overall": 50.0}}}},
        {"judge": {"name": "j"}, "benchmarks": {"b": {"metrics": {"overall": "nan"}, "n": 0}}},
        {
            "judge": {"name": "j"},
            "benchmarks": {
                "b": {
                    "metrics": {"x": None},
                    "intervals": {"x": [None, None]},
                    "n": 0,
                    "diagnostics": contracts.encode(diagnostics.summary([], {})),
                    "subsets": {"s": {"n": 0, "accuracy": None, "interval": None}},
                    "worst": [{}],
                }
            },
        },
    ],
    ids=["nothing", "no metrics", "one metric", "nan", "nothing judged"],
)
def test_what_is_missing_is_left_out(tmp_path, result):
    (tmp_path / "results.json").write_text(json.dumps(result))
    page = render(tmp_path, [results_file.read(tmp_path)])
    assert "nan" not in page.text and "None" not in page.text
    for absent in ("Labels (rows)", "Reliability", "Calibration", "Cost", "Length", "INCOMPLETE"):
        assert absent not in page.text
    has_value = result["benchmarks"].get("b", {}).get("metrics") == {"overall": 50.0}
    assert page.tags.count("img") == has_value and ("50.00" in page.text) == has_value
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "model_card.md").read_text().startswith("## Evaluation")


def test_judges_of_one_name_are_told_apart(tmp_path):
    three = [judge("same", b=BenchmarkResult(metrics={"x": float(i)})) for i in range(3)]
    page = render(tmp_path, three)
    assert page.table("Metric (%)")[0] == {
        "": ["x"],
        "same": ["0.00"],
        "same (2)": ["1.00"],
        "same (3)": ["2.00"],
    }


@pytest.mark.slow
def test_the_command_renders_compares_and_refuses(tmp_path):
    for name, value in {"a": 41.0, "b": 43.0}.items():
        (tmp_path / name).mkdir()
        entry = BenchmarkResult(metrics={"agreement": value})
        results_file.write(tmp_path / name, judge(name, pandalm=entry))
    command = [sys.executable, "-m", "jlrm.scorecard"]
    places = [str(tmp_path / name) for name in ("a", "b")]
    done = subprocess.run(
        [*command, *places, "--out", str(tmp_path / "new" / "both")], capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout.strip() == str(tmp_path / "new" / "both" / "report.html")
    page = Page((tmp_path / "new" / "both" / "report.html").read_text())
    assert page.table("Metric (%)")[0] == {"": ["agreement"], "a": ["41.00"], "b": ["43.00"]}
    wrong = subprocess.run([*command, str(tmp_path), "--out", "x"], capture_output=True, text=True)
    assert wrong.returncode == 2 and wrong.stderr.count("\n") == 1
    assert "holds no results.json" in wrong.stderr


def test_the_command_explains_itself(capsys):
    with pytest.raises(SystemExit) as stop:
        scorecard.main(["--help"])
    assert stop.value.code == 0 and "--out" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is no JSON"),
        ("[1]", "holds no JSON object"),
        ("null", "holds no JSON object"),
        ('{"judge": {}}', "no `judge` and `benchmarks`"),
        ('{"judge": 1, "benchmarks": []}', "no `judge` and `benchmarks`"),
        (
            '{"judge": {}, "benchmarks": {"b": {"n": "x"}}}',
            r"benchmarks\.b\.n must be a whole number, got 'x'",
        ),
        (
            '{"judge": {}, "benchmarks": {"b": {"metrics": {"f1": [1]}}}}',
            r"metrics\.f1 must be a number, got \[1\]",
        ),
        (
            '{"judge": {}, "benchmarks": {"b": {"subsets": {"s": {}}}}}',
            r"subsets\.s has no 'n'",
        ),
        (
            '{"version": 2, "judge": {}, "benchmarks": {}}',
            "is of version 2, and this program reads version 1 and older. Update jlrm",
        ),
    ],
)
def test_other_files_are_refused(tmp_path, content, message):
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(UsageError, match=message):
        scorecard.main([str(tmp_path), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("results", RESULTS)
def test_results_are_read_back_as_they_were_written(tmp_path, results):
    results_file.write(tmp_path, results)
    assert results_file.read(tmp_path) == results
    content = json.loads((tmp_path / "results.json").read_text())
    assert content["version"] == 1
    content |= {"later": 1}  # a key of a newer program
    del content["version"]  # as files were written before there was one
    (tmp_path / "results.json").write_text(json.dumps(content))
    assert results_file.read(tmp_path) == results
