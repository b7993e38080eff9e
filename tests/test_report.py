"""What the report promises: one page that stands alone, for whatever part of a run there is."""

from __future__ import annotations

import base64
import json
import pathlib
import re
import subprocess
import sys
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest

from jlrm.config import UsageError
from jlrm.reports import run_page, run_summary, tracking
from jlrm.reports.run_summary import RunSummary

EVIL = "<script>alert('x')</script> & \"quoted\""


def write_stage(run_dir: pathlib.Path, stage: str, num_steps: int, **metrics: float) -> None:
    rng = np.random.default_rng(0)
    with tracking.Tracker(
        run_dir,
        stage=stage,
        num_steps=num_steps,
        first_step=0,
        tensorboard=False,
        wandb_project="",
        config={},
        is_writer=True,
    ) as tracker:
        for step in range(1, num_steps + 1):
            row = {name: value + 0.1 * rng.random() for name, value in metrics.items()}
            if step in (num_steps // 2, num_steps):
                row |= {"eval/agreement": 50.0 + step, "eval/parse_rate": 99.0, "eval/reward": 1.0}
            tracker.log(step, row)
        if stage == "grpo":
            tracker.log_completions(num_steps, judgements())


def judgements() -> list[dict[str, Any]]:
    verdicts = {"right": [9, 2], "wrong": [2, 9], "unparsed": None}
    return [
        {
            "id": f"{outcome}-{number}",
            "prompt": f"Which answer is better? {EVIL}",
            "completion": f"<think>{EVIL}</think>",
            "gold": [8.0, 3.5],
            "label": 1,
            "verdict": verdict,
            "status": "ok" if verdict else "malformed",
            "rewards/format": 1.0,
            "rewards/relation": -1.5,
            "reward": -0.5,
            "advantage": 0.25,
        }
        for outcome, verdict in verdicts.items()
        for number in range(5)
    ]


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
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.alts += [value or "" for name, value in attrs if name == "alt"]
        if tag not in ("meta", "source", "img", "tr", "th", "td"):  # these need no end tag
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def render(run_dir: pathlib.Path) -> tuple[str, Page]:
    run_page.write_report(run_dir)
    text = (run_dir / "report.html").read_text()
    page = Page(text)
    assert not page.open
    return text, page


def cells(text: str, title: str) -> list[str]:
    return re.search(rf"<th>{re.escape(title)}<td>(.*?)<(?:tr|/table)>", text)[1].split("<td>")


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
    assert sorted(titles) == sorted(
        ["Held-out comparisons (%)", *(p.title for p in run_page.PANELS)]
    )
    assert cells(text, "Agreement (%)") == ["40.0", "60.2", "72.5", "+12.2 points"]
    assert cells(text, "Reward") == ["-1.00", "1.50", "2.00", "+0.50"]
    assert cells(text, "Mean length (tokens)") == ["–", "200", "–", "–"]
    assert cells(text, "Steps") == ["0", "4", "30", ""]
    assert "Swap consistency" not in text and "SFT → GRPO" in text
    assert "1 h 2 min, 2.5 million tokens" in text


def test_a_run_with_sft_alone(tmp_path):
    write_sft(tmp_path)
    run_summary.write(tmp_path, RunSummary({"sft": {"agreement": 60.0, "parse_rate": 90.0}}))
    text, page = render(tmp_path)
    assert len(page.alts) == 3 and "GRPO" not in text and "None sampled yet" in text
    assert cells(text, "Agreement (%)") == ["60.0"]


def test_a_run_under_way_shows_its_latest_evaluation(tmp_path):
    write_grpo(tmp_path, 1)
    text, page = render(tmp_path)
    assert cells(text, "Agreement (%)") == ["51.0"] and "SFT" not in "".join(page.alts)


def test_results_alone_make_a_report(tmp_path):
    run_summary.write(tmp_path, RunSummary({"start": {"agreement": 48.0}}))
    assert cells(render(tmp_path)[0], "Agreement (%)") == ["48.0"]


def test_values_that_are_not_finite_do_not_stop_it(tmp_path):
    write_stage(tmp_path, "grpo", 25, loss=0.0, reward=np.nan, kl=np.inf, grad_norm=1.0)
    run_summary.write(tmp_path, RunSummary({"grpo": {"agreement": 50.0, "reward": np.nan}}))
    text, page = render(tmp_path)
    assert [alt.split(";")[0] for alt in page.alts] == [
        "Held-out comparisons (%)",
        "GRPO gradient norm",
    ]
    assert "nan" not in re.sub('base64,[^"]*', "", text)


def test_the_page_stands_alone_and_user_text_stays_text(tmp_path):
    write_grpo(tmp_path)
    (tmp_path / "config.yaml").write_text(f"run:\n  dir: {EVIL}\n")
    text, page = render(tmp_path)
    assert "script" not in page.tags and "link" not in page.tags
    assert not re.search(r"https?://", text) and "@import" not in text
    assert set(re.findall(r'(?:src|srcset|href)="([^,"]*)', text)) == {"data:image/png;base64"}
    assert EVIL not in text and "&lt;script&gt;alert(&#x27;x&#x27;)" in text
    images = [base64.b64decode(image) for image in re.findall(r'base64,([^"]*)"', text)]
    images.append((tmp_path / "report.png").read_bytes())
    assert len(images) == 1 + 2 * len(page.alts)
    assert all(image.startswith(b"\x89PNG") for image in images)


def test_sampled_judgements_mix_outcomes_and_show_gold_beside_the_verdict(tmp_path):
    write_grpo(tmp_path)
    text, page = render(tmp_path)
    headings = re.findall(r'<h3 class="(\w+)">', text)
    assert len(headings) == 8 == page.tags.count("article")
    assert {headings.count(outcome) for outcome in ("right", "wrong", "unparsed")} == {2, 3}
    assert "<th>Gold<td>8<td>3.5<tr><th>Verdict<td>9<td>2<" in text
    assert "<th>Verdict<td>–<td>–<" in text and "malformed" in text
    assert "<th>relation<td>-1.50" in text and "<th>total<td>-0.50" in text


def test_judgements_of_different_prompts_come_first_and_of_the_last_step(tmp_path):
    write_sft(tmp_path)
    write_grpo(tmp_path, 2)
    settings: dict[str, Any] = dict(tensorboard=False, wandb_project="", config={}, is_writer=True)
    with tracking.Tracker(tmp_path, stage="grpo", num_steps=9, first_step=2, **settings) as tracker:
        rows = [{"id": f"p{i // 4}", "label": 2, "verdict": [1, 2]} for i in range(12)]
        tracker.log_completions(9, rows)
    text, _ = render(tmp_path)
    assert "GRPO, step 9" in text
    assert re.findall(r"<small>(\w+)", text) == ["p0", "p1", "p2", "p0", "p1", "p2", "p0", "p1"]


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


def test_smoothing_keeps_level_and_length():
    assert np.allclose(run_page._running_mean(np.full(40, 3.0)), 3.0)
    noisy = np.random.default_rng(0).normal(size=300)
    smooth = run_page._running_mean(noisy)
    assert smooth.shape == noisy.shape and smooth.std() < 0.5 * noisy.std()


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
