"""A study runs what is not done, in order, and its tables say what its evaluations say."""

from __future__ import annotations

import json
import math
import os
import pathlib
import shlex
import socket
import subprocess
import sys

import pytest
import yaml

from jlrm import study
from jlrm.config import UsageError
from jlrm.reports import contracts, results_file
from jlrm.reports.results_file import BenchmarkResult, Diagnostics, ItemRate, JudgeRecord, Results
from jlrm.runtime import commands, lock
from jlrm.studies import cells, outcomes, page, spec
from jlrm.studies.cells import Record
from jlrm.studies.outcomes import SeedMean, StudyOutcome

ROOT = pathlib.Path(__file__).parents[2]
HEURISTIC = ["--backend", "heuristic"]
RUNS = {
    "longer": {"model": "longer", "label": "the longer answer", "arguments": HEURISTIC},
    "sft": {"settings": ["grpo.steps=0"]},
    "grpo": {"after": "sft", "settings": ["sft.steps=0", "grpo.steps=3"], "against": "sft"},
}
PAIRS = {"benchmark": "pairs", "data": "lists#heldout", "judging": ["--prompt", "toy"]}
TREE = {
    "dir": "study",
    "config": "configs/quickstart.yaml",
    "settings": ["run.eval_every=0"],
    "seeds": [0, 1],
    "runs": RUNS,
    "evaluations": {"pairs": PAIRS},
    "tables": {"main": {"columns": ["pairs.overall", "pairs.consistency"]}},
}


def written(tmp_path, **changes) -> pathlib.Path:
    path = tmp_path / "study.yaml"
    path.write_text(
        yaml.safe_dump({**TREE, "dir": str(tmp_path / "out"), **changes}, sort_keys=False)
    )
    return path


def keys(found) -> list[str]:
    return [cell.key for cell in found]


def test_commands_come_seed_by_seed_and_name_what_they_rest_on(tmp_path):
    read = spec.load(written(tmp_path))
    found = {cell.key: cell for cell in cells.cells(read)}
    assert list(found) == [
        "evaluate/longer/0/pairs",
        *("train/sft/0", "evaluate/sft/0/pairs", "train/grpo/0", "evaluate/grpo/0/pairs"),
        *("train/sft/1", "evaluate/sft/1/pairs", "train/grpo/1", "evaluate/grpo/1/pairs"),
    ]
    train, evaluate = found["train/grpo/1"], found["evaluate/grpo/1/pairs"]
    out = tmp_path / "out"
    words = list(train.command)
    assert words[:3] == ["jlrm.train", "--config", "configs/quickstart.yaml"]
    assert words[3:7] == [
        "run.eval_every=0",
        "sft.steps=0",
        "grpo.steps=3",
        f"run.dir={out}/runs/grpo/seed1",
    ]
    assert words[7:] == ["run.seed=1", "model.preset=", f"model.path={out}/runs/sft/seed1"]
    assert train.needs == ("train/sft/1",)
    assert evaluate.needs == ("train/grpo/1", "evaluate/sft/1/pairs")
    line = shlex.join(evaluate.command)
    assert f"--compare {out}/evaluations/sft/seed1/pairs" in line and "--prompt toy" in line
    assert "--prompt" not in found["evaluate/longer/0/pairs"].command  # its own arguments instead


def test_what_is_done_is_done_once_and_what_rests_on_a_change_is_done_again(tmp_path):
    read = spec.load(written(tmp_path))
    every = cells.cells(read)
    record = Record(pathlib.Path(read.dir))
    assert record.missing(every) == every
    for cell in every:
        record.add(cell)
    assert Record(pathlib.Path(read.dir)).missing(every) == []
    runs = {**RUNS, "sft": {"settings": ["grpo.steps=0", "sft.steps=7"]}}
    changed = cells.cells(spec.load(written(tmp_path, runs=runs)))
    again = keys(Record(pathlib.Path(read.dir)).missing(changed))
    assert again == [key for key in keys(every) if "longer" not in key]


def test_a_record_of_something_else_is_refused(tmp_path):
    (tmp_path / cells.RECORD).write_text('{"version": 1}')
    with pytest.raises(UsageError, match="is no record of a study"):
        Record(tmp_path)


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"runs": {}}, "The study has no runs"),
        (
            {"evaluations": {"pairs": {**PAIRS, "benchmark": "paris"}}},
            "--benchmark paris is unknown",
        ),
        ({"runs": {"a/b": {}}}, "names a folder"),
        ({"config": ""}, "has neither a config nor a model"),
        ({"runs": {"a": {"after": "b"}, "b": {}}}, "runs.a.after=b must stand above it"),
        ({"runs": {"a": {"after": "grop"}, "grpo": {}}}, "there is no 'grop'. Did you mean 'grpo'"),
        ({"runs": {"m": {"model": "first", "settings": ["a.b=1"]}}}, "is judged as it is"),
        ({"runs": {"m": {"model": "first"}, "a": {"after": "m"}}}, "is not trained"),
        ({"seeds": [1, 1]}, "must name each seed once"),
        ({"seeds": []}, "must name each seed once"),
        ({"tables": {"t": {"columns": []}}}, "tables.t.columns is empty"),
        ({"tables": {"t": {"columns": ["pairs"]}}}, "pairs is not EVALUATION.METRIC"),
        ({"tables": {"t": {"columns": ["pair.x"]}}}, "there is no 'pair'. Did you mean 'pairs'"),
        ({"tables": {"t": {"columns": ["pairs.x"], "rows": ["sfd"]}}}, "Did you mean 'sft'"),
        ({"tables": {"t": {"columns": ["pairs.x"], "at": [1]}}}, "a number for each of its rows"),
        (
            {"tables": {"t": {"columns": ["pairs.x"], "published": {"theirs": ["1", "2"]}}}},
            "theirs has 2 values for 1 columns",
        ),
        (
            {"tables": {"t": {"columns": ["pairs.x"], "published": {"theirs": ["good"]}}}},
            "'good' is no number",
        ),
        ({"tabels": {}}, "Unknown key 'tabels'. Did you mean 'tables'"),
        ({"runs": {"a": {"setings": []}}}, "Unknown key 'runs.a.setings'"),
    ],
)
def test_a_mistake_is_one_sentence(tmp_path, changes, wanted):
    with pytest.raises(UsageError) as error:
        spec.load(written(tmp_path, **changes))
    assert wanted in str(error.value)


def test_a_setting_that_no_config_has_costs_no_run(tmp_path, capsys):
    path = written(tmp_path, runs={**RUNS, "late": {"settings": ["grpo.stepz=3"]}})
    assert commands.run(lambda: study.main([str(path)])) == 2
    told = capsys.readouterr().err
    assert "train/late/0: Unknown key 'grpo.stepz'. Did you mean 'steps'" in told or "stepz" in told
    assert not (tmp_path / "out").exists()


# --- Tables ---


def test_the_mean_of_seeds_has_the_interval_of_items_and_of_seeds():
    found = [(70.0, (64.0, 75.0)), (74.0, (70.0, 79.0)), (72.0, (67.0, 76.0))]
    value = outcomes.over_seeds(found)
    assert value.mean == 72.0 and value.seeds == (70.0, 74.0, 72.0)
    of_seeds = 4.302652729911275 * 2.0 / math.sqrt(3)  # t at 2 degrees, deviation 2
    below = math.sqrt((6**2 + 4**2 + 5**2) / 3 + of_seeds**2)
    above = math.sqrt((5**2 + 5**2 + 4**2) / 3 + of_seeds**2)
    assert value.interval == pytest.approx((72.0 - below, 72.0 + above), abs=1e-9)


def test_one_seed_keeps_its_own_interval_and_an_unknown_one_makes_none():
    assert outcomes.over_seeds([(70.0, (64.0, 75.0))]).interval == (64.0, 75.0)
    assert outcomes.over_seeds([(70.0, (64.0, 75.0)), (71.0, None)]).interval is None
    assert outcomes.over_seeds([], missing=2) == SeedMean(None, missing=2)


def put(tmp_path, run, seed, value, unread=0):
    directory = cells.evaluation_dir(spec.load(tmp_path / "study.yaml"), run, seed, "pairs")
    directory.mkdir(parents=True)
    result = BenchmarkResult(
        metrics={"overall": value},
        intervals={"overall": (value - 2, value + 2)},
        parse_failures=unread,
        diagnostics=Diagnostics(games=40, consistency=ItemRate(50.0, 20, (40.0, 60.0))),
    )
    results_file.write(directory, Results(JudgeRecord(name=run), {"pairs": result}))


def test_tables_hold_what_is_there_and_say_what_is_not(tmp_path):
    columns = ["pairs.overall", "pairs.consistency", "pairs.unread", "pairs.difference"]
    tables = {"main": {"columns": columns, "published": {"theirs": ["80", "-", "-", "1.5"]}}}
    read = spec.load(written(tmp_path, tables=tables))
    put(tmp_path, "sft", 0, 60.0)
    put(tmp_path, "sft", 1, 64.0, unread=10)
    put(tmp_path, "grpo", 0, 90.0)
    found = page.outcome(read)
    longer, sft, grpo, theirs = found.tables["main"].rows
    assert longer.values[0] == SeedMean(None, missing=1)  # it has one seed
    assert [value.mean for value in sft.values] == [62.0, 50.0, 12.5, None]
    assert (grpo.values[0].mean, grpo.values[0].missing) == (90.0, 1)
    assert theirs.is_published and theirs.values[0] == SeedMean(80.0)
    page.write(tmp_path / "out", found)
    text = (tmp_path / "out" / page.TEXT).read_text()
    assert "| grpo | 90.00 (88.0 to 92.0) [1 of 2 seeds] |" in text
    assert "| theirs, published | 80.00 | - | - | 1.50 |" in text
    html = (tmp_path / "out" / page.PAGE).read_text()
    assert "Some cells have not been run yet" in html and "theirs, published" in html
    again = contracts.read(tmp_path / "out" / page.DATA, outcomes.VERSION, "")
    assert contracts.decode(StudyOutcome, again, "tables.json") == found


def test_a_metric_that_a_benchmark_does_not_have_is_named(tmp_path):
    read = spec.load(written(tmp_path, tables={"t": {"columns": ["pairs.overal"]}}))
    put(tmp_path, "sft", 0, 60.0)
    with pytest.raises(UsageError, match=r"has no 'overal'\. Did you mean 'overall'"):
        page.outcome(read)


def test_columns_are_drawn_over_numbers(tmp_path):
    table = {
        "columns": ["pairs.overall"],
        "rows": ["sft", "grpo"],
        "at": [3, 7],
        "across": "size, billions",
    }
    read = spec.load(written(tmp_path, tables={"sizes": table}))
    put(tmp_path, "sft", 0, 60.0)
    (chart,) = page._charts(page.outcome(read).tables["sizes"])
    assert "pairs.overall" in chart.alt
    page.write(tmp_path / "out", page.outcome(read))


# --- The command ---

JUDGES = {name: {"model": name, "arguments": HEURISTIC} for name in ("longer", "shorter", "first")}


def start(path, *words):
    command = [sys.executable, "-m", "jlrm.study", str(path), *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_settings_of_the_command_line_stand_over_the_files_and_under_a_runs_own(tmp_path, capfd):
    path = str(written(tmp_path))
    words = ["run.eval_every=5", "--dry-run", "sft.steps=9"]  # flags may stand between
    assert commands.run(lambda: study.main([path, *words])) == 0
    sft, grpo = [line for line in capfd.readouterr().out.splitlines() if "run.seed=1" in line]
    of_all = "run.eval_every=0 run.eval_every=5 sft.steps=9"
    assert f" {of_all} grpo.steps=0 run.dir=" in sft
    assert f" {of_all} sft.steps=0 grpo.steps=3 run.dir=" in grpo
    for wrong, says in (
        ("run.eval_evry=5", "Unknown key 'run.eval_evry'"),
        ("sft.steps=many", "sft.steps"),  # which each run of this study sets itself
        ("run.dir=elsewhere", "Use --dir"),
        ("run.seed=3", "Use --seeds"),
    ):
        assert commands.run(lambda wrong=wrong: study.main([path, "--dry-run", wrong])) == 2
        assert says in capfd.readouterr().err


def test_a_study_has_one_writer(tmp_path, capfd):
    path = str(written(tmp_path, runs=JUDGES))
    with lock.sole_writer(tmp_path / "out"):
        assert commands.run(lambda: study.main([path])) == 2
    assert "is written by process" in capfd.readouterr().err


@pytest.mark.slow
def test_a_study_runs_draws_and_then_has_nothing_to_do(tmp_path, capfd):
    path = written(tmp_path, runs=JUDGES)
    assert commands.run(lambda: study.main([str(path), "--json"])) == 0
    found = json.loads(capfd.readouterr().out)
    values = {row["label"]: row["values"][0]["mean"] for row in found["tables"]["main"]["rows"]}
    assert set(values) == set(JUDGES) and values["longer"] > values["shorter"]
    assert commands.run(lambda: study.main([str(path), "--dry-run"])) == 0
    assert capfd.readouterr().out.strip() == ""


@pytest.mark.slow
def test_a_failure_stops_the_study_or_only_what_rests_on_it(tmp_path, capfd):
    broken = {"model": "nowhere", "arguments": ["--backend", "heuristic"]}
    runs = {"broken": broken, "after": {**JUDGES["longer"], "against": "broken"}, **JUDGES}
    path = written(tmp_path, runs=runs)
    assert commands.run(lambda: study.main([str(path)])) == 1
    assert "evaluate/broken/0/pairs ended with exit code 2" in capfd.readouterr().err
    assert commands.run(lambda: study.main([str(path), "--keep-going"])) == 1
    told = capfd.readouterr()
    assert "left out: evaluate/broken/0/pairs failed" in told.err
    assert "2 of 5 commands failed or were left out" in told.err
    done = Record(tmp_path / "out").done
    assert set(done) == {f"evaluate/{name}/0/pairs" for name in JUDGES}


@pytest.mark.parametrize(
    "path", sorted((ROOT / "configs/study").glob("*.yaml")), ids=lambda p: p.stem
)
def test_every_study_of_configs_is_whole(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    wanted = cells.cells(spec.load(path))
    study._check_configs(wanted)
    assert wanted
    lines = path.read_text().splitlines()
    assert lines[1].startswith("#   python -m jlrm.study configs/study/")


@pytest.mark.slow
def test_two_processes_run_one_study(tmp_path):
    path = written(tmp_path, runs={name: JUDGES[name] for name in ("longer", "shorter")})
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    both = [
        start(
            path,
            *("--coordinator", f"localhost:{port}"),
            *("--num-processes", "2", "--process-id", str(number)),
        )
        for number in (0, 1)
    ]
    told = [process.communicate(timeout=300) for process in both]
    assert [process.returncode for process in both] == [0, 0], told
    assert "| longer |" in told[0][0] and told[1][0] == ""
    found = contracts.read(tmp_path / "out" / page.DATA, outcomes.VERSION, "")
    assert [row["values"][0]["missing"] for row in found["tables"]["main"]["rows"]] == [0, 0]
