"""Audits against scikit-learn and krippendorff, and the command that makes them."""

from __future__ import annotations

import json

import krippendorff
import numpy as np
import pytest
from sklearn.isotonic import IsotonicRegression
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import cohen_kappa_score

from jlrm import judge
from jlrm.config import UsageError
from jlrm.evaluation.games import Response
from jlrm.evaluation.reading import Reader, reader
from jlrm.runtime import commands
from jlrm.serving import audit, calibration
from jlrm.serving.audit import Checked
from jlrm.serving.judge import Judge


def drawn(num: int = 400, seed: int = 0) -> list[Checked]:
    """A judge that is right more often the surer it is, and never so often as it says."""
    rng = np.random.default_rng(seed)
    rows = []
    for number in range(num):
        human, confidence = int(rng.choice([0, 1, 2], p=[0.1, 0.45, 0.45])), rng.uniform(0.5, 1.0)
        is_right = rng.random() < 0.5 + 0.6 * (confidence - 0.5)
        verdict = human if is_right else int(rng.choice([0, 1, 2]))
        shown = round(float(confidence), 2) if verdict else None
        rows.append(Checked(verdict, human, shown, f"q{number // 2}", int(rng.choice([1, 2]))))
    return rows


@pytest.mark.parametrize("seed", range(3))
def test_agreement_beyond_chance_is_that_of_others(seed):
    pairs = [(row.judge, row.human) for row in drawn(200, seed)]
    one, two = np.array(pairs).T
    assert audit.audit([Checked(*pair) for pair in pairs]).kappa == pytest.approx(
        cohen_kappa_score(one, two), abs=1e-9
    )
    wanted = krippendorff.alpha(np.array([one, two]), level_of_measurement="nominal")
    assert audit.alpha(pairs) == pytest.approx(wanted, abs=1e-9)


def test_raters_who_say_one_thing_alone_have_no_agreement_beyond_chance():
    assert audit.alpha([(1, 1)] * 4) is None and audit.alpha([]) is None
    assert audit.audit([Checked(None, 1)]).kappa is None


def test_isotonic_regression_is_that_of_scikit_learn():
    rows = [row for row in drawn(500) if row.confidence is not None]
    x, y = np.array([(row.confidence, row.judge == row.human) for row in rows], float).T
    at, found = calibration.isotonic(x, y)
    wanted = IsotonicRegression().fit(x, y).predict(at)
    assert found == pytest.approx(wanted, abs=1e-9)


def test_platts_curve_is_a_logistic_regression():
    """Each row twice, once for each class, weighed by Platt's targets."""
    rows = [row for row in drawn(100) if row.confidence is not None]
    x, y = np.array([(row.confidence, row.judge == row.human) for row in rows], float).T
    targets = np.where(y > 0, (y.sum() + 1) / (y.sum() + 2), 1 / ((1 - y).sum() + 2))
    logits = np.log(x / (1 - x).clip(1e-6))[:, None]
    model = LogisticRegression(C=np.inf, tol=1e-10, max_iter=10000).fit(
        np.vstack([logits, logits]),
        np.repeat([1, 0], len(x)),
        sample_weight=np.concatenate([targets, 1 - targets]),
    )
    slope, offset = calibration.platt(x, y)
    assert (slope, offset) == pytest.approx((model.coef_[0, 0], model.intercept_[0]), abs=1e-3)


@pytest.mark.parametrize(("num", "method"), [(1000, "isotonic"), (120, "platt")])
def test_a_fitted_map_says_how_often_it_is_right(num, method):
    found = audit.audit(drawn(num), is_calibrated=True).calibration
    assert found.method == method and found.ece[1] < found.ece[0]
    assert all(b >= a for a, b in zip(found.is_right, found.is_right[1:], strict=False))
    assert found.brier[1] < found.brier[0] and 0 <= found(0.5) <= found(1.0) <= 1


def test_what_an_audit_counts():
    rows = [
        Checked(1, 1, 0.9, "a", 1),
        Checked(2, 1, 0.6, "a", 1),
        Checked(None, 2, None, "b", 2),
        Checked(0, 0, None, "c"),
        Checked(1, None, 0.8, "d", 2),
    ]
    found = audit.audit(rows)
    assert (found.rows, found.unread) == (4, 1)
    assert found.agreement.percent == 50.0 and found.agreement.interval[0] < 50
    assert {name: (each.percent, each.n) for name, each in found.recall.items()} == {
        "answer 1": (50.0, 2),
        "answer 2": (0.0, 1),
        "tie": (100.0, 1),
    }
    assert (found.longer_judge.percent, found.longer_human.percent) == (50.0, 100.0)
    assert found.ece == pytest.approx(100 * (0.1 + 0.6) / 2)
    assert [each.accuracy for each in found.abstention] == [100, 100, 100, 50, 50]
    with pytest.raises(UsageError, match="No row has a label"):
        audit.audit([Checked(1, None)])
    with pytest.raises(UsageError, match="20 rows of 5 questions"):
        audit.audit(rows, is_calibrated=True)


def run(capsys, *words):
    code = commands.run(lambda: judge.main(["check", *map(str, words)]))
    printed = capsys.readouterr()
    return code, printed.out, printed.err


@pytest.fixture
def table(tmp_path):
    rows = [
        {"verdict": row.judge, "gold": row.human, "confidence": row.confidence}
        | {"question": row.question}
        for row in drawn(300)
    ]
    path = tmp_path / "verdicts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


COLUMNS = ("--judge", "verdict", "--human", "gold")


def test_the_command(table, capsys):
    code, out, err = run(capsys, table, *COLUMNS, "--json")
    assert code == 0, err
    found = json.loads(out)
    wanted = audit.audit(drawn(300))
    assert found["agreement"]["percent"] == wanted.agreement.percent
    assert found["kappa"] == wanted.kappa and "calibration" in found
    code, out, _ = run(capsys, table, *COLUMNS)
    assert f"agreement                 {wanted.agreement.percent:.1f} %" in out
    assert "right among the surest" in out and "kappa 0." in out


def test_the_directory_of_a_judge_and_labels_of_other_names(tmp_path, capsys):
    rows = [{"winner": 1, "label": "good"}, {"winner": 2, "label": "bad"}, {"winner": None}]
    rows[2]["label"] = "good"
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "verdicts.jsonl").write_text(lines)
    code, _, err = run(capsys, tmp_path)
    assert code == 2 and "Say what it means by --values {good: N}" in err
    code, out, err = run(capsys, tmp_path, "--values", "good=1", "bad=2")
    assert code == 0, err
    assert "3 labelled rows, 1 without" in out and "66.7 %" in out
    assert "kappa 1.000, alpha 1.000 (these two of the 2 read)" in out


def test_a_bar_for_builds(table, capsys):
    assert run(capsys, table, *COLUMNS, "--at-least", "0.5")[0] == 0
    code, _, err = run(capsys, table, *COLUMNS, "--at-least", "0.99")
    assert code == 1 and "fewer than 99 %" in err
    assert run(capsys, table, *COLUMNS, "--at-least", "60")[0] == 2


def test_a_map_is_saved_and_used(table, tmp_path, capsys):
    code, out, err = run(capsys, table, *COLUMNS, "--calibrate")
    assert code == 0 and "after a fitted map" in out, err
    path = tmp_path / "calibration.json"
    beside = path.read_bytes()
    path.unlink()
    assert run(capsys, tmp_path, *COLUMNS, "--calibrate")[0] == 0  # named by its directory
    assert path.read_bytes() == beside
    found = calibration.find("", str(tmp_path))
    assert calibration.read(path) == found == calibration.find("", f"{tmp_path}@12")
    assert "confidences go through this map" in capsys.readouterr().err
    assert (
        calibration.find("none", str(tmp_path)) is None
        and calibration.find("", "somewhere/else") is None
    )
    with pytest.raises(UsageError, match="no such file"):
        calibration.find("nowhere.json", str(tmp_path))

    def backend(games, record):
        for game in games:
            scores = (9.0, 4.0) if game.first == 0 else (4.0, 9.0)
            record(Response(game.id, scores=scores))

    plain = Judge(backend, Reader(), "j").compare("q", "a", "b")
    mapped = Judge(backend, Reader(), "j", 0, found).compare("q", "a", "b")
    assert mapped.confidence == found(plain.confidence) != plain.confidence
    assert mapped.is_calibrated and not plain.is_calibrated


def test_the_bound_of_ties_is_the_one_that_agrees_most():
    """A judge whose verdicts up to 0.6 are those of people who called the pair a tie."""
    rng = np.random.default_rng(0)
    rows = []
    for number in range(300):
        human = int(rng.choice([0, 1, 2]))
        stated = round(float(rng.uniform(0.51, 0.6) if human == 0 else rng.uniform(0.62, 1)), 2)
        rows.append(Checked(human or int(rng.choice([1, 2])), human, stated, f"q{number}"))
    bound, (before, after) = calibration.fit_ties(
        *zip(*((r.confidence, r.judge, r.human, r.question) for r in rows), strict=True)
    )
    assert bound == max(row.confidence for row in rows if row.human == 0)
    assert after > 97 and before == pytest.approx(
        100 * np.mean([row.judge == row.human for row in rows])
    )
    found = audit.audit(rows, is_calibrated=True).calibration
    assert (found.tie_below, found.agreement) == (bound, (before, after))
    text = "\n".join(audit.lines(audit.audit(rows, is_calibrated=True)))
    assert f"up to {100 * bound:.1f} % are ties" in text
    # Without a tie among the labels nothing is fitted: they may have been forbidden.
    decided = [row for row in rows if row.human]
    assert audit.audit(decided, is_calibrated=True).calibration.tie_below == 0.5


def test_close_scores_are_a_tie():
    def backend(games, record):
        for game in games:
            scores = (7.0, 6.0) if game.first == 0 else (6.0, 7.0)
            record(Response(game.id, scores=scores))

    def winner(tie_margin=0.0, found=None):
        read = Reader("lenient", (1, 10), tie_margin)
        pair = Judge(backend, read, "j", 0, found).compare("q", "a", "b")
        assert (pair.confidence is None) == (pair.winner == 0)
        return pair.winner

    assert [winner(margin) for margin in (0.0, 0.9, 1.0, 3.0)] == [1, 1, 0, 0]
    stated = 0.5 + 1 / 18  # a point of nine
    for bound, wanted in ((0.5, 1), (stated - 1e-9, 1), (stated, 0)):
        fitted = calibration.ConfidenceMap(
            "platt", (0.5, 1.0), (0.5, 1.0), 20, 50.0, (0.0, 0.0), (0.0, 0.0), bound
        )
        assert winner(found=fitted) == wanted
    for margin in (-1.0, 9.0):
        with pytest.raises(UsageError, match="tie_margin"):
            reader("lenient", (1, 10), margin)


@pytest.mark.parametrize(
    "changed",
    [{"at": []}, {"at": [0.5, 0.5]}, {"is_right": [0.5, 1.5]}, {"at": [0.5]}, {"at": [2e9, 1]}],
)
def test_a_file_that_is_no_map_is_named(tmp_path, changed):
    path = tmp_path / "calibration.json"
    fitted = calibration.ConfidenceMap(
        "platt", (0.5, 1.0), (0.5, 1.0), 20, 50.0, (0.0, 0.0), (0.0, 0.0)
    )
    calibration.write(path, fitted)
    assert calibration.read(path) == fitted
    path.write_text(json.dumps({**json.loads(path.read_text()), **changed}))
    with pytest.raises(UsageError, match="is no map of a confidence"):
        calibration.read(path)


def test_confidences_are_not_mapped_twice(table, capsys):
    rows = [json.loads(line) | {"is_calibrated": True} for line in table.read_text().splitlines()]
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, _, err = run(capsys, table, *COLUMNS, "--calibrate")
    assert code == 2 and "--calibration none" in err


@pytest.mark.parametrize(
    ("content", "flags", "says"),
    [
        ('{"winner": 1}\n', [], "no column 'label'"),
        ('{"winner": 1, "lable": 2}\n', [], "Did you mean 'lable'?"),
        ('{"winner": 1, "label": "banana"}\n', [], "banana"),
        ('{"winner": 1, "label": 1, "confidence": 7}\n', [], "confidence must be a number"),
        ('{"winner": 1, "label": null}\n', [], "No row has a label"),
        ("", [], "no rows"),
        ("[1]\n", [], "must be"),
    ],
)
def test_mistakes_are_one_sentence(tmp_path, capsys, content, flags, says):
    path = tmp_path / "t.jsonl"
    path.write_text(content)
    code, _, err = run(capsys, path, *flags)
    assert code == 2 and says in err, err
