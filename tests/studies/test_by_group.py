"""Tables by group: the paper's Table 8 and its figures' lines, ours beside them, and mistakes."""

from __future__ import annotations

import pathlib

import pytest
import yaml

from jlrm.config import UsageError
from jlrm.evaluation import groups as item_groups
from jlrm.evaluation.games import Item
from jlrm.reports import contracts, results_file
from jlrm.reports.results_file import BenchmarkResult, GroupResult, JudgeRecord, Results
from jlrm.studies import cells, groups, outcomes, page, scatter, spec
from jlrm.studies.cells import Record
from jlrm.studies.outcomes import GroupRow, SeedMean, StudyOutcome

ROOT = pathlib.Path(__file__).parents[2]
NAMED = {"Office": {"subsets": ["Excel", "gmail"], "share": 10}, "Life": {"subsets": ["tasty"]}}
RUNS = {name: {"model": name, "arguments": ["--backend", "heuristic"]} for name in ("sft", "grpo")}


def written(tmp_path, named=NAMED, **changes) -> pathlib.Path:
    """Write a study with one table by group, and its file of groups unless there is none."""
    file = tmp_path / "groups.yaml"
    file.write_text(yaml.safe_dump({"groups": named}, sort_keys=False))
    table = {
        "metric": "test.f1",
        "runs": ["sft", "grpo"],
        "gains": [["sft", "grpo"]],
        "published": {"Life": ["19", "24", "60", "-"], "Search": ["7", "20", "50", "55"]},
    }
    tree = {
        "dir": str(tmp_path / "out"),
        "runs": RUNS,
        "evaluations": {"test": {"benchmark": "pandalm", "data": "x", "groups": str(file)}},
        "tables": {},
        "by_group": {"main": {**table, **changes}},
    }
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    return path


def put(path, run, **found) -> None:
    directory = cells.evaluation_dir(spec.load(path), run, 0, "test")
    directory.mkdir(parents=True)
    result = BenchmarkResult(metrics={"f1": 1.0}, groups=found)
    results_file.write(directory, Results(JudgeRecord(name=run), {"pandalm": result}))


def group(value, share=None, n=5) -> GroupResult:
    return GroupResult(n, {"f1": value}, {"f1": (value - 3, value + 4)}, share)


def test_published_numbers_give_the_published_line():
    """Table 8 as printed: the gain over SFT rises with the share, by 0.20 points a percent."""
    found = page.outcome(spec.load(ROOT / "configs/study/judgelrm_7b.yaml"))
    table = found.by_group["table_8"]
    over_sft, over_base = table.gains
    assert over_sft.is_published and (over_sft.over, over_sft.of) == ("Judge-SFT", "JudgeLRM-7B")
    assert over_sft.slope is not None and over_sft.r is not None and over_base.slope is not None
    assert (round(over_sft.slope, 2), round(over_sft.r, 3)) == (0.20, 0.975)
    assert over_sft.gains == pytest.approx((4.49, -0.02, 4.26, 2.30, 1.72), abs=1e-9)
    assert round(over_base.slope, 2) == -0.41  # SFT gains less where more rows need reasoning
    assert sum(row.n or 0 for row in table.rows) == 702
    assert "evaluations.pandalm.groups names no file" in table.missing
    assert "slope +0.20 points a percent, r = 0.975, 5 groups" in page.as_text(found)
    assert table.missing in page.as_text(found)


def test_ours_stand_beside_the_published_ones(tmp_path):
    path = written(tmp_path)
    put(path, "sft", Office=group(60.0, 10.0), Life=group(50.0))
    put(path, "grpo", Office=group(66.0, 10.0))
    found = page.outcome(spec.load(path))
    table = found.by_group["main"]
    kinds = [(row.label, row.is_published) for row in table.rows]
    assert kinds == [("Office", False), ("Life", False), ("Life", True), ("Search", True)]
    office, life, *_ = table.rows
    assert (office.n, office.share, office.values[1].mean) == (5, 10.0, 66.0)
    assert office.values[0].interval == (57.0, 64.0)
    assert life.values[1] == SeedMean(None, missing=1) and not table.missing
    ours, published = table.gains
    assert (ours.groups, ours.gains, ours.slope) == (("Office",), (6.0,), None)
    assert published.groups == ("Search",)  # of the other one a number is not known
    page.write(tmp_path / "out", found)
    text = (tmp_path / "out" / page.TEXT).read_text()
    assert "| Office | 5 | 10.00 | 60.00 (57.0 to 64.0) | 66.00 (63.0 to 70.0) |" in text
    assert "| Life, published | 19 | 24.00 | 60.00 | - |" in text
    html = (tmp_path / "out" / page.PAGE).read_text()
    assert "Gain of grpo over sft" in html and "Some cells have not been run yet" in html
    again = contracts.read(tmp_path / "out" / page.DATA, outcomes.VERSION, "")
    assert contracts.decode(StudyOutcome, again, "tables.json") == found


def row(share, before, after) -> GroupRow:
    return GroupRow(f"at {share}", 1, share, (SeedMean(before), SeedMean(after)))


@pytest.mark.parametrize(
    ("rows", "slope", "r"),
    [
        ([row(1.0, 5, 6), row(2.0, 5, 8), row(3.0, 5, 10)], 2.0, 1.0),
        ([row(1.0, 5, 6), row(2.0, 5, 8)], None, None),
        ([row(1.0, 5, 6), row(1.0, 5, 8), row(1.0, 5, 9)], None, None),
        ([row(1.0, 5.1, 5.4), row(2.0, 0.1, 0.4), row(3.0, 70.7, 71.0)], 0.0, None),
        ([row(None, 5, 6)], "none", None),
    ],
    ids=["line", "two groups", "one share", "all alike", "no share"],
)
def test_a_line_is_drawn_where_there_is_one(rows, slope, r):
    found = groups.fitted(rows, (0, 1), ["a", "b"])
    if slope == "none":
        assert found is None
        return
    assert found is not None and found.r == (None if r is None else pytest.approx(r))
    assert found.slope == (None if slope is None else pytest.approx(slope, abs=1e-9))
    drawn = scatter.chart([found], "share, %")
    assert ("no line through so few points" in drawn.alt) == (slope is None)


def test_evaluations_are_done_again_if_the_groups_change(tmp_path):
    path = written(tmp_path)
    before = cells.cells(spec.load(path))
    record = Record(tmp_path / "out")
    for cell in before:
        assert "--groups" in cell.command
        record.add(cell)
    assert not Record(tmp_path / "out").missing(cells.cells(spec.load(path)))
    written(tmp_path, {**NAMED, "Life": {"subsets": ["tasty"], "share": 3}})
    assert len(Record(tmp_path / "out").missing(cells.cells(spec.load(path)))) == len(before)


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"metric": "f1"}, "by_group.main.metric: there is no 'f1'"),
        ({"metric": "test"}, "test is not EVALUATION.METRIC"),
        ({"runs": []}, "by_group.main.runs is empty"),
        ({"runs": ["sft", "grop"]}, "Did you mean 'grpo'"),
        ({"gains": [["sft"]]}, "['sft'] is not a pair of runs"),
        ({"gains": [["sft", "base"]]}, "by_group.main.gains: there is no 'base'"),
        ({"published": {"Life": ["1", "2", "3"]}}, "Life has 3 values for 4 columns"),
        ({"published": {"Life": ["1", "2", "3", "x"]}}, "'x' is no number"),
    ],
)
def test_a_mistake_in_a_table_by_group_is_one_sentence(tmp_path, changes, wanted):
    with pytest.raises(UsageError) as error:
        spec.load(written(tmp_path, **changes))
    assert wanted in str(error.value)


def test_a_metric_that_groups_do_not_have_is_named(tmp_path):
    path = written(tmp_path, metric="test.f2")
    put(path, "sft", Office=group(60.0, 10.0))
    with pytest.raises(UsageError, match=r"the groups have no 'f2'\. Did you mean 'f1'"):
        page.outcome(spec.load(path))


@pytest.mark.parametrize(
    ("named", "wanted"),
    [
        ({}, "names no group"),
        ({"A": {"subsets": []}}, "group A names no subset"),
        ({"A": {"subsets": ["x"]}, "B": {"subsets": ["y", "X "]}}, "'x' is in A and in B"),
        ({"A": {"subsets": ["x"], "share": 101}}, "share=101.0: wanted 0 to 100"),
        ({"A": {"subset": ["x"]}}, "Did you mean 'subsets'"),
        ({"A": ["x"]}, "groups.A"),
    ],
)
def test_a_mistake_in_a_file_of_groups_is_one_sentence(tmp_path, named, wanted):
    written(tmp_path, named)
    with pytest.raises(UsageError) as error:
        item_groups.read(tmp_path / "groups.yaml")
    assert wanted in str(error.value)


def test_subsets_are_found_whatever_their_capitals_and_others_are_named(tmp_path):
    items = [Item(str(i), "q", ("a", "b"), 1, subset=name) for i, name in enumerate(("imdb", "x"))]
    file = tmp_path / "groups.yaml"
    file.write_text("groups: {Films: {subsets: [IMDB]}}")
    assert item_groups.of_items(file, items).of_subset == {"imdb": "Films"}
    file.write_text("groups: {Films: {subsets: [imdbb]}}")
    with pytest.raises(UsageError, match=r"no subset 'imdbb'\. Did you mean 'imdb'"):
        item_groups.of_items(file, items)


def test_a_groups_file_that_is_not_there_costs_no_run(tmp_path):
    path = written(tmp_path)
    (tmp_path / "groups.yaml").unlink()
    with pytest.raises(UsageError, match=r"Cannot read .*groups\.yaml"):
        cells.cells(spec.load(path))
