"""Train a judge: `python -m jlrm.train --config FILE [section.key=value ...]`.

SFT, where asked for, imitates written judgements (training/recipes/sft.py); DPO and reward models
are stages of their own (preference.py and reward_model.py beside it). Each step of GRPO
(training/recipes/grpo.py) does this:

 1. Take P comparisons: a function of the seed and of the number of batches drawn before.
 2. Lay the weights out for decoding and sample R judgements of each, with their log-probabilities.
 3. Read the verdicts and pay the rewards, term by term.
 4. Advantage: a judgement's reward against the others of its group (1 to 4: training/rollouts.py).
 5. Log-probabilities: of the frozen reference, and of the policy when the sampler's own can't serve
    as the old ones.
 6. One or more optimiser steps on the clipped policy loss with KL and entropy terms.
 7. Log the step. At intervals, judge the held-out set and save.

Where this differs from JudgeLRM as published (each is a setting): rewards treat both answers alike
and read the completion alone; token means are global instead of per device; the loss is not divided
by an accumulation count without accumulation; overlong prompts are skipped instead of raising. With
one optimiser step per rollout the old log-probabilities are the sampler's own, so the ratio
corrects for whatever the two programs differ by; that gap is logged as `rollout/logprob_gap`.
"""

from __future__ import annotations

import argparse
import json
import logging
import pathlib
from collections.abc import Sequence
from typing import Any

from jlrm.config import Config, stages_of
from jlrm.judgement import rewards
from jlrm.planning import slice_plan
from jlrm.reports import run_page, run_summary, tables
from jlrm.reports.run_summary import RunSummary
from jlrm.runtime import cluster, commands, hosts
from jlrm.runtime.settings import load, to_dict
from jlrm.runtime.settings_help import add_settings
from jlrm.training import replay
from jlrm.training.heldout import make_evaluation
from jlrm.training.recipes.stages import STAGES
from jlrm.training.setup import Run, open_run

log = logging.getLogger(__name__)


def train(config: Config, devices: Sequence[Any] | None = None) -> dict[str, Any]:
    """Run every stage that the config asks for, going on from where the run directory stands.

    Returns:
      The content of `summary.json`: held-out metrics per stage, and what the run cost.
    """
    with open_run(config, devices) as run:
        if hosts.is_main():
            _tell_doubts(run)
        evaluate, names = make_evaluation(run), stages_of(config)
        results = {name: STAGES[name].recipe(run, evaluate) for name in names}
        start = results[names[0]].start
        stages = {name: result.evaluation for name, result in results.items()}
        summary = RunSummary(
            stages={"start": start, **stages} if start else stages,
            steps=sum(result.num_steps for result in results.values()),
            seconds=round(sum(result.seconds for result in results.values()), 1),
            tokens=sum(result.num_tokens for result in results.values()),
        )
        if hosts.is_main():
            run_summary.write(run.directory.path, summary)
            run_page.write_report(run.directory.path)
            run.directory.mirror.push()
    return summary.as_json()


def _tell_doubts(run: Run) -> None:
    """Warn of what is going to go wrong, before anything is computed."""
    doubts = rewards.doubts(run.config.reward) if run.config.grpo.steps else []
    memory = slice_plan.doubt(run.config, run.policy.model, run.policy.mesh)
    for doubt in [*doubts, *([memory] if memory else [])]:
        log.warning(doubt)


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(
        prog="python -m jlrm.train", description=(__doc__ or "").split("\n")[0]
    )
    add_settings(parser, is_required=False)
    parser.add_argument(
        "--json", action="store_true", help="print summary.json on stdout at the end"
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="change a setting"
    )
    cluster.add_arguments(parser)
    parser.add_argument(
        "--replay", type=pathlib.Path, metavar="FILE", help="run a step that was not applied alone"
    )
    args = parser.parse_intermixed_args(argv)
    if args.replay:
        print("\n".join(replay.replay(args.replay)))
        return
    if not args.config:
        parser.error("the following arguments are required: --config")
    config = load(args.config, args.overrides)
    with hosts.joined(args, to_dict(config), config.run.host_timeout):
        summary = train(config)
    if not hosts.is_main():
        return
    if args.json:
        print(json.dumps(summary))
        return
    columns = ["stage", "agreement", "parse_rate", "swap_consistency", "reward", "mean_length"]
    rows = [{"stage": name, **summary[name]} for name in stages_of(config)]
    print(tables.table(rows, columns))
    # The same seconds as in summary.json and on the page: the stages' own, over all starts.
    took = tables.duration(summary["seconds"])
    print(f"Trained in {took}. Report: {config.run.dir}/report.html")


if __name__ == "__main__":
    commands.finish(main)
