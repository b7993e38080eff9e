"""What the report promises: one page that stands alone, for whatever part of a run there is."""

from __future__ import annotations

import base64
import itertools
import json
import pathlib
import re
import subprocess
import sys
from html.parser import HTMLParser
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib.figure import Figure

from jlrm.config import RewardConfig, UsageError
from jlrm.data.batches import Example
from jlrm.data.comparisons import Comparison
from jlrm.reports import charts, run_page, run_summary, tracking
from jlrm.reports.run_summary import RunSummary
from jlrm.reports.theme import DARK, LIGHT
from jlrm.training.rollouts import RolloutBatch, Sampled, table_rows
from jlrm.training.scoring import judge_responses

EVIL = "<script>alert('x')</script> & \"quoted\""

NOT_SAMPLED = Sampled([], *(np.zeros(0) for _ in range(3)))  # tokens are not shown
STAGE: dict[str, Any] = {"stage": "grpo", "first_step": 0, "tensorboard": False, "config": {}}
STAGE |= {"wandb_project": "", "is_writer": True}


def write_stage(run_dir: pathlib.Path, stage: str, num_steps: int, **metrics: float) -> None:
    rng = np.random.default_rng(0)
    with tracking.Tracker(run_dir, **STAGE | {"stage": stage}, num_steps=num_steps) as tracker:
        for step in range(1, num_steps + 1):
            row = {name: value + 0.1 * rng.random() for name, value in metrics.items()}
            if step in (num_steps // 2, num_steps):
                row |= {"eval/agreement": 50.0 + step, "eval/parse_rate": 99.0, "eval/reward": 1.0}
            tracker.log(step, row)
        if stage == "grpo":
            tracker.log_completions(num_steps, judgements())


def judgements() -> list[dict[str, Any]]:
    """Return what training records of five right, five wrong and five unreadable responses."""
    verdicts = {"right": (9, 2), "wrong": (2, 9), "unparsed": None}
    examples, responses = [], []
    for outcome, scores in verdicts.items():
        said = "" if scores is None else "<answer>{}</answer><answer>{}</answer>".format(*scores)
        for number in range(5):
            texts = f"Why {EVIL}", f"Because one {EVIL}", f"Because two {EVIL}"
            row = Comparison(f"{outcome}-{number}", *texts, score_1=8.0, score_2=3.5)
            examples.append(Example(row, f"Which answer is better? {EVIL}", [1]))
            responses.append(f"I think so {EVIL}</think>{said}")
    judged = judge_responses(RewardConfig(), [], examples, responses, [[1]] * 15, 8)
    advantages = np.full(15, 0.25, np.float32)
    return table_rows(RolloutBatch(examples, NOT_SAMPLED, judged, advantages))


def write_sft(run_dir: pathlib.Path, num_steps: int = 4) -> None:
    write_stage(run_dir, "sft", num_steps, loss=2.0, grad_norm=1.0)


def write_grpo(run_dir: pathlib.Path, num_steps: int = 4) -> None:
    metrics = {metric: 0.5 for panel in run_page.PANELS if (metric := panel.metric)}
    metrics |= {"reward_std": 1.0, "rewards/format/mean": 0.9, "rewards/relation/mean": 0.1}
    write_stage(run_dir, "grpo", num_steps, **metrics)


class Page(HTMLParser):
    """Collect what a test asks about; refuses tags that are closed out of order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.alts: list[str] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.alts += [value or "" for name, value in attrs if name == "alt"]
        if tag not in ("meta", "source", "img"):  # these need no end tag
            self.open.append(tag)

    def handle_data(self, data: str) -> None:
        self.text += data

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def render(run_dir: pathlib.Path) -> tuple[str, Page]:
    run_page.write_report(run_dir)
    text = (run_dir / "report.html").read_text()
    page = Page(text)
    assert not page.open
    return text, page


def cells(text: str, title: str) -> list[str]:
    row = re.search(rf"<tr><th[^>]*>{re.escape(title)}</th>(.*?)</tr>", text)[1]
    return re.findall("<td>(.*?)</td>", row)


@pytest.mark.slow
def test_both_stages_show_every_panel_and_the_change_in_points(tmp_path):
    write_sft(tmp_path)
    write_grpo(tmp_path, 30)
    results = {
        "start": {"agreement": 40.0, "reward": -1.0},
        "sft": {"agreement": 60.25, "parse_rate": 90.0, "reward": 1.5, "mean_length": 200.0},
        "grpo": {"agreement": 72.5, "parse_rate": 99.0, "reward": 2.0, "mean_length": None},
    }
    run_summary.write(tmp_path, RunSummary(results, steps=34, seconds=3700.0, tokens=2_500_000))
    text, page = render(tmp_path)
    titles = [alt.split(";")[0] for alt in page.alts]
    assert titles[0] == "Held-out comparisons (%)"  # what the page leads with
    own = [p.title for p in run_page.PANELS if p.stage in ("sft", "grpo")]
    assert sorted(titles) == sorted(["Held-out comparisons (%)", *own])
    assert cells(text, "Agreement (%)") == ["40.0", "60.2", "72.5", "+12.2 points"]
    assert cells(text, "Reward") == ["-1.00", "1.50", "2.00", "+0.50"]
    assert cells(text, "Mean length (tokens)") == ["–", "200", "–", "–"]
    assert cells(text, "Steps") == ["0", "4", "30", ""]
    assert "Swap consistency" not in text and "SFT → GRPO" in text
    assert "1 h 2 min, 2.5 million tokens" in text
    run_summary.write(tmp_path, RunSummary(results, steps=34, seconds=3700.0, tokens=8_400))
    assert "1 h 2 min, 8,400 tokens" in render(tmp_path)[0]


@pytest.mark.slow
def test_a_run_with_sft_alone(tmp_path):
    write_sft(tmp_path)
    run_summary.write(tmp_path, RunSummary({"sft": {"agreement": 60.0, "parse_rate": 90.0}}))
    text, page = render(tmp_path)
    assert len(page.alts) == 3 and "GRPO" not in text and "None sampled yet" in text
    assert cells(text, "Agreement (%)") == ["60.0"]


@pytest.mark.slow
def test_a_run_under_way_shows_its_latest_evaluation(tmp_path):
    write_grpo(tmp_path, 1)
    text, page = render(tmp_path)
    assert cells(text, "Agreement (%)") == ["51.0"] and "SFT" not in "".join(page.alts)


@pytest.mark.slow
def test_agreement_has_its_interval_where_the_number_of_pairs_is_known(tmp_path):
    summary = {
        "sft": {"agreement": 50.0, "pairs": 100.0},
        "grpo": {"agreement": 100.0, "pairs": 100.0},
    }
    run_summary.write(tmp_path, RunSummary(summary))
    text, _ = render(tmp_path)
    # Wilson's interval, which unlike the normal one has a width at 100 %
    assert "95 % interval 96.3 to 100.0" in text and "Band: 95 % interval" in text
    low, high = run_page._band(np.array([50.0]), 100)
    assert np.allclose([low[0], high[0]], [40.38, 59.62], atol=0.02)
    write_sft(tmp_path / "old")
    assert "95 % interval" not in render(tmp_path / "old")[0]


def test_results_alone_make_a_report(tmp_path):
    run_summary.write(tmp_path, RunSummary({"start": {"agreement": 48.0}}))
    assert cells(render(tmp_path)[0], "Agreement (%)") == ["48.0"]


@pytest.mark.slow
def test_values_that_are_not_finite_do_not_stop_it(tmp_path):
    write_stage(tmp_path, "grpo", 25, loss=0.0, reward=np.nan, kl=np.inf, grad_norm=1.0)
    run_summary.write(tmp_path, RunSummary({"grpo": {"agreement": 50.0, "reward": np.nan}}))
    text, page = render(tmp_path)
    assert [alt.split(";")[0] for alt in page.alts] == [
        "Held-out comparisons (%)",
        "GRPO gradient norm",
    ]
    assert "nan" not in re.sub('base64,[^"]*', "", text)


@pytest.mark.slow
def test_the_page_stands_alone_and_user_text_stays_text(tmp_path):
    write_grpo(tmp_path)
    (tmp_path / "config.yaml").write_text(f"run:\n  dir: {EVIL}\n")
    text, page = render(tmp_path)
    assert "script" not in page.tags and "link" not in page.tags
    assert not re.search(r"https?://", text) and "@import" not in text
    assert set(re.findall(r'(?:src|srcset|href)="([^,"]*)', text)) == {"data:image/svg+xml;base64"}
    assert EVIL not in text and "&lt;script&gt;alert(&#39;x&#39;)" in text
    images = [base64.b64decode(image) for image in re.findall(r'base64,([^"]*)"', text)]
    assert len(images) == 2 + 2 * len(page.alts)  # the first chart is there for a broad screen too
    assert all(ElementTree.fromstring(image).tag.endswith("svg") for image in images)
    papers = [re.search(b"fill: (#.{6})", image)[1].decode() for image in images]
    assert set(papers) == {LIGHT.paper, DARK.paper}
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_sampled_judgements_mix_outcomes_and_show_gold_beside_the_verdict(tmp_path):
    write_grpo(tmp_path)
    text, page = render(tmp_path)
    headings = re.findall(r'<span class="badge (\w+)">', text)
    assert set(headings[:3]) == {"right", "wrong", "unparsed"}  # which are not folded
    assert "5 more" in text
    assert len(headings) == 8 == page.tags.count("article")
    assert {headings.count(outcome) for outcome in ("right", "wrong", "unparsed")} == {2, 3}
    tables = re.findall(r"<th scope=.row.>(\w+)</th><td>(.*?)</td><td>(.*?)</td>", text)
    assert tables[:2] == [("Gold", "8", "3.5"), ("Verdict", "9", "2")]
    assert ("Verdict", "–", "–") in tables and "no answer" in text
    rows = judgements()
    assert cells(text, "relation") == [f"{rows[0]['rewards/relation']:+.2f}"]
    assert cells(text, "total") == [f"{rows[0]['reward']:+.2f}"]
    assert cells(text, "advantage") == ["+0.25"]


@pytest.mark.slow
def test_question_and_answers_stand_beside_what_the_judge_wrote(tmp_path):
    write_grpo(tmp_path)
    _, page = render(tmp_path)
    card = page.text.split("right-0")[1].split("wrong-0")[0]
    parts = [f"Why {EVIL}", f"Because one {EVIL}", f"Because two {EVIL}", f"I think so {EVIL}"]
    places = [card.index(part) for part in parts]
    assert places == sorted(places) and card.index("better") < places[1]  # marks the first answer
    assert card.index("Prompt as the model reads it") > places[-1]


@pytest.mark.slow
def test_records_without_question_and_answers_show_the_prompt(tmp_path):
    write_grpo(tmp_path, 2)
    kept = ("id", "prompt", "gold", "label", "verdict", "status", "reward", "advantage")
    old = [{k: row[k] for k in kept} | {"completion": row["response"]} for row in judgements()]
    with tracking.Tracker(tmp_path, **STAGE | {"first_step": 2}, num_steps=9) as tracker:
        tracker.log_completions(9, old)
    _, page = render(tmp_path)
    card = page.text.split("right-0")[1].split("wrong-0")[0]
    assert card.index(f"Which answer is better? {EVIL}") < card.index(f"I think so {EVIL}")
    assert "Question" not in card and "Because" not in card


@pytest.mark.slow
def test_judgements_of_different_prompts_come_first_and_of_the_last_step(tmp_path):
    write_sft(tmp_path)
    write_grpo(tmp_path, 2)
    with tracking.Tracker(tmp_path, **STAGE | {"first_step": 2}, num_steps=9) as tracker:
        rows = [{"id": f"p{i // 4}", "label": 2, "verdict": [1, 2]} for i in range(12)]
        tracker.log_completions(9, rows)
    text, _ = render(tmp_path)
    assert "GRPO, step 9" in text
    assert re.findall(r"<small>(p\d)", text) == ["p0", "p1", "p2", "p0", "p1", "p2", "p0", "p1"]


@pytest.mark.parametrize(
    ("label", "verdict", "outcome"),
    [
        (1, [7, 6.5], "right"),
        (0, [7, 7], "right"),
        (0, [7, 6], "wrong"),
        (1, [4, 4], "wrong"),
        (2, [4, 5], "right"),
        (1, None, "unparsed"),
    ],
)
def test_outcomes_follow_the_order_of_the_scores(label, verdict, outcome):
    assert run_page._outcome({"label": label, "verdict": verdict}) == outcome


def test_outcomes_of_lists_and_single_answers_are_those_that_were_counted():
    whole = {"label": 3, "verdict": [4, 1, 7], "is_right": 1.0}
    assert run_page._outcome(whole) == "right"
    assert run_page._outcome({**whole, "is_right": 2 / 3}) == "wrong"
    alone = {"label": 1, "verdict": [9], "is_right": False}  # the other answer's was not read
    assert run_page._outcome(alone) == "wrong"


@pytest.mark.slow
def test_a_list_is_shown_with_all_of_its_answers(tmp_path):
    write_grpo(tmp_path, 2)
    answers = {"answers": ["one", "two", f"three {EVIL}"], "label": 3, "is_right": 1.0}
    scores = {"gold": [4.0, None, 8.0], "verdict": [3.0, 5.0, 9.0]}
    rows = [{**judgements()[0], **answers, **scores}]
    with tracking.Tracker(tmp_path, **STAGE | {"first_step": 2}, num_steps=9) as tracker:
        tracker.log_completions(9, rows)
    text, page = render(tmp_path)
    parts = ("Answer 1", "one", "Answer 2", "two", "Answer 3 best", f"three {EVIL}", "I think so")
    card = page.text.split("right-0")[1]
    places = [card.index(part) for part in parts]
    assert places == sorted(places) and EVIL not in text and "a tie" not in card
    assert cells(text, "Gold") == ["4", "–", "8"] and cells(text, "Verdict") == ["3", "5", "9"]


@pytest.mark.slow
def test_a_row_without_a_label_is_shown_as_neither_right_nor_wrong(tmp_path):
    write_grpo(tmp_path, 2)
    bare = {"label": None, "gold": [], "verdict": [3.0, 5.0], "is_right": None}
    with tracking.Tracker(tmp_path, **STAGE | {"first_step": 2}, num_steps=9) as tracker:
        tracker.log_completions(9, [{**judgements()[0], **bare}])
    text, page = render(tmp_path)
    card = page.text.split("? unlabelled")[1]
    assert "right-0" in card and "a tie" not in card and "better" not in card.split("What the")[0]
    assert cells(text, "Verdict") == ["3", "5"] and cells(text, "Gold") == ["–", "–"]


@pytest.mark.slow
def test_terms_that_are_always_zero_are_not_drawn_and_lines_differ_in_colour(tmp_path):
    terms = {f"rewards/term_{i}/mean": float(i % 10 != 0) for i in range(21)}
    with tracking.Tracker(tmp_path, **STAGE, num_steps=2) as tracker:
        for step in (1, 2):
            tracker.log(step, {**terms, "reward": 1.0})
    text, page = render(tmp_path)
    (alt,) = [alt for alt in page.alts if alt.startswith("Reward by term")]
    drawn = re.findall(r"term (\d+)", alt)
    assert drawn == [str(i) for i in range(21) if i % 10]
    image = base64.b64decode(re.search(rf'base64,([^"]*)" alt="{alt}', text)[1])
    names = re.findall(rb"fill: (#.{6})[^>]*>term (\d+)", image)
    assert len({colour for colour, _ in names}) == len(names) == len(drawn)


@pytest.mark.parametrize("heights", [[0.0] * 3, [0.97, 0.98, 1.0], [0.5], [], [0.1] * 12])
def test_names_beside_lines_stand_apart_and_within_the_chart(heights):
    placed = charts.spread(heights)
    gap = min(charts.LABEL_GAP, 1 / max(1, len(heights) - 1))
    assert all(b - a >= gap - 1e-9 for a, b in itertools.pairwise(placed))
    assert all(-1e-9 <= height <= 1 for height in placed) and len(placed) == len(heights)


def test_both_themes_have_a_colour_for_each_use_and_enough_contrast():
    for theme in (LIGHT, DARK):
        colours = [*theme[:-1], *theme.colours]
        assert len({*colours}) == len(colours)
        contrasts = [contrast(each, theme.paper) for each in theme.colours]
        assert min(contrasts) >= 3 and contrast(theme.soft, theme.box) >= 4.5
        assert all(contrast(each, theme.paper) >= 4.5 for each in (theme.right, theme.wrong))


def contrast(one: str, other: str) -> float:
    """Return WCAG's ratio of two colours."""
    rgb = np.array([[int(c[i : i + 2], 16) / 255 for i in (1, 3, 5)] for c in (one, other)])
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    low, high = sorted(linear @ [0.2126, 0.7152, 0.0722])
    return (high + 0.05) / (low + 0.05)


def test_smoothing_keeps_level_and_length():
    assert np.allclose(charts.running_mean(np.full(40, 3.0)), 3.0)
    noisy = np.random.default_rng(0).normal(size=300)
    smooth = charts.running_mean(noisy)
    assert smooth.shape == noisy.shape and smooth.std() < 0.5 * noisy.std()


@pytest.mark.slow
def test_the_command_renders_again_and_refuses_other_directories(tmp_path):
    write_sft(tmp_path)
    command = [sys.executable, "-m", "jlrm.report"]
    done = subprocess.run([*command, tmp_path], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip() == str(tmp_path / "report.html")
    wrong = subprocess.run([*command, tmp_path / "no"], capture_output=True, text=True)
    assert wrong.returncode == 2 and wrong.stderr.count("\n") == 1
    assert "holds no metrics.jsonl" in wrong.stderr
    helped = subprocess.run([*command, "--help"], capture_output=True, text=True)
    assert helped.returncode == 0 and "run_dir" in helped.stdout
    (tmp_path / "summary.json").write_text(json.dumps({}))
    with pytest.raises(UsageError):
        run_page.write_report(tmp_path / "no")


@pytest.mark.parametrize("highest", [1.504e-7, 2e-5])
def test_ticks_of_a_log_axis_have_texts_of_their_own(highest):
    line = charts.Line("gap", np.arange(2), np.array([1.496e-7, highest]))
    axes = Figure().subplots()
    charts.curves("Gap", [line], charts.Axes(is_log=True)).draw(axes)
    low, high = axes.get_ylim()
    ticks = [tick for tick in axes.yaxis.get_minorticklocs() if low <= tick <= high]
    texts = axes.yaxis.get_minor_formatter().format_ticks(ticks)
    assert len(set(texts)) == len(ticks) > 1
