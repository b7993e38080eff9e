"""From completions to a step's batch: baselines, what is out of the loss, choices, columns."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
import types
from collections.abc import Sequence
from typing import Any, cast

import jax
import numpy as np
import pytest

from jlrm.config import RunError
from jlrm.data.batches import Example, Examples
from jlrm.data.tokenizer import encode, load_tokenizer
from jlrm.data.worlds import toy
from jlrm.judgement import plugins
from jlrm.judgement.notes import TrainerState
from jlrm.runtime.mesh import create_mesh, training_layout
from jlrm.runtime.settings import from_dict
from jlrm.training import rollouts
from jlrm.training.packing import Group
from jlrm.training.programs import Known, grpo_programs, pack_minibatch
from jlrm.training.recipes.grpo import less_divergence
from jlrm.training.rollouts import Sampled, Started, StepBatch
from jlrm.training.scoring import mean_logged
from jlrm.training.setup import Run, RunData, initial_params, open_run

BEGIN = TrainerState()
ROWS = toy.comparisons(seed=2, num_rows=8)
PAY = (
    "import json\n"
    "def pay(completions, **columns):\n"
    "    return [json.loads(text) for text in completions]\n"
    "def pay_again(completions, **columns):\n"
    "    return [1.0 if text == 'null' else None for text in completions]\n"
    "def notes(completions, trainer_state, log_metric, log_extra, **columns):\n"
    "    log_metric('seen', len(completions))\n"
    "    log_metric('step', trainer_state.global_step)\n"
    "    log_extra('length', [len(text) for text in completions])\n"
    "    log_extra('mixed', [len(text) if text == 'null' else text for text in completions])\n"
    "    return [0.0] * len(completions)\n"
    "def clash(completions, log_metric, log_extra):\n"
    "    log_metric('reward', 1)\n"
    "    log_extra('status', completions)\n"
    "    return [0.0] * len(completions)\n"
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    toy.save_tokenizer(folder)
    return load_tokenizer(folder)


@pytest.fixture
def opened(tokenizer):
    """Return a function: settings of GRPO -> a run that pays what completions say, as JSON."""
    module = types.ModuleType("paying_rewards")
    exec(PAY, module.__dict__)
    sys.modules[module.__name__] = module

    def run(
        *names: str, orders: str = "given", mode: str = "none", overlong: float = 0, **grpo: Any
    ) -> Run:
        weights = {f"paying_rewards:{name}": 1.0 for name in names or ("pay",)}
        config = from_dict(
            {
                "run": {"dir": "unused"},
                "model": {"preset": "toy", "tokenizer": "toy"},
                "data": {"train": "toy", "prompt": "toy", "orders": orders},
                "sampling": {"max_new_tokens": 16},
                "reward": {"mode": mode, "plugins": weights, "overlong": overlong},
                "grpo": {"steps": 1, "prompts": 2, "rollouts": 3, **grpo},
            }
        )
        policy = types.SimpleNamespace(tokenizer=tokenizer)
        examples = cast(Examples, ROWS)
        data = RunData(examples, examples, plugins.load(weights), [])
        return Run(config, cast(Any, None), cast(Any, policy), data)

    return run


def drawn(run: Run, *batches: Sequence[Any], state: TrainerState = BEGIN) -> StepBatch:
    """Draw a step whose completions, of one batch after the other, are these values as JSON."""

    def started(position: int) -> Started:
        tokenizer = run.policy.tokenizer
        ids = [list(each) for each in encode(tokenizer, [json.dumps(v) for v in batches[position]])]
        lengths = np.array([len(each) for each in ids])
        logps = np.full((len(ids), 16), -float(position + 1), np.float32)
        sampled = Sampled(ids, logps, lengths, np.ones(len(ids), bool))
        first = position * run.config.grpo.prompts
        rows = [(first + i) % len(ROWS) for i in range(run.config.grpo.prompts)]
        prompts = [Example(ROWS[row], "prompt", [1, 2]) for row in rows]
        together = 2 if run.config.data.orders == "both" else 1
        return Started(position, rows[::together], prompts, lambda: sampled)

    return rollouts.draw(run, started, started(0), lambda _: contextlib.nullcontext(), state)


def advantages(*groups: Sequence[float | None], eps: float = 1e-6) -> np.ndarray:
    """Return advantages in float64, group by group, from what was paid."""
    found = []
    for group in groups:
        paid = np.array([value for value in group if value is not None], float)
        deviation = paid.std(ddof=1) + eps if len(paid) > 1 else 1.0
        found += [
            0.0 if value is None or len(paid) < 2 else (value - paid.mean()) / deviation
            for value in group
        ]
    return np.array(found)


def test_a_completion_that_no_reward_applies_to_is_out_of_the_baseline_and_of_the_loss(opened):
    values = [1.0, None, 3.0, 2.0, 4.0, 9.0]
    step = drawn(opened(), values)
    wanted = advantages(values[:3], values[3:])
    np.testing.assert_allclose(step.batch.advantages, wanted, rtol=1e-5)
    assert step.is_learned.tolist() == [True, False, True, True, True, True]
    assert step.metrics["completions/unpaid_ratio"] == pytest.approx(1 / 6)
    assert step.metrics["reward"] == pytest.approx(np.mean([1, 3, 2, 4, 9]))
    assert step.metrics["reward_std"] == pytest.approx(np.std([1, 3, 2, 4, 9], ddof=1))
    assert step.metrics["rewards/pay/mean"] == pytest.approx(np.mean([1, 3, 2, 4, 9]))
    assert step.metrics["frac_reward_zero_std"] == 0
    assert [row["reward"] for row in rollouts.table_rows(step.batch)] == values


def test_one_none_among_several_rewards_leaves_the_others_to_pay(opened):
    """As TRL: a row's reward is the sum of those that apply."""
    step = drawn(opened("pay", "pay_again"), [4.0, None, 3.0, None, None, 0.0])
    assert step.is_learned.all()
    wanted = advantages([4.0, 1.0, 3.0], [1.0, 1.0, 0.0])
    np.testing.assert_allclose(step.batch.advantages, wanted, rtol=1e-5)


def test_our_own_terms_pay_a_row_that_a_plug_in_leaves_out(opened):
    step = drawn(opened(mode="judgelrm_symmetric"), [1.0, None, 3.0, 2.0, 4.0, 9.0])
    assert step.is_learned.all() and "completions/unpaid_ratio" not in step.metrics
    paid = [judgement.reward for judgement in step.batch.judgements]
    assert paid == [0.0, -1.0, 2.0, 1.0, 3.0, 8.0]  # -1: malformed


def test_a_batch_that_nothing_is_paid_for_is_out_of_the_loss(opened):
    for choice in ("keep", "skip", "resample"):
        step = drawn(opened(zero_variance=choice, max_draws=1), [None] * 6)
        assert not step.is_learned.any() and not step.batch.advantages.any()
        assert "reward" not in step.metrics and "reward_std" not in step.metrics
        assert step.metrics["completions/unpaid_ratio"] == step.metrics["frac_reward_zero_std"] == 1


@pytest.mark.parametrize("choice", ["keep", "skip"])
def test_a_group_with_one_reward_has_nothing_to_compare_it_with(opened, choice):
    step = drawn(opened(zero_variance=choice), [None, 5.0, None, 2.0, 4.0, 9.0])
    np.testing.assert_allclose(step.batch.advantages[:3], 0.0)
    kept = [False, choice == "keep", False]
    assert step.is_learned.tolist() == [*kept, True, True, True]
    assert step.metrics["frac_reward_zero_std"] == 0.5


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_resampling_scales_by_the_groups_it_chose(opened, scale):
    run = opened(zero_variance="resample", advantage={"scale": scale})
    uniform, first, second, third = [7.0] * 3, [0.0, 1.0, 5.0], [40.0, 10.0, None], [0.0, 90.0, 3.0]
    step = drawn(run, uniform + first, uniform + uniform, second + third)
    assert step.num_draws == 3 and step.is_learned.tolist() == [True] * 5 + [False]
    chosen = np.array([0.0, 1.0, 5.0, 40.0, 10.0])
    deviation = {"group": None, "batch": chosen.std(ddof=1) + 1e-6, "none": 1.0}[scale]
    wanted = advantages(first, second)
    if deviation is not None:
        wanted = np.array([-2.0, -1.0, 3.0, 15.0, -15.0, 0.0]) / deviation
    np.testing.assert_allclose(step.batch.advantages, wanted, rtol=1e-5)
    assert step.batch.sampled.logps[:, 0].tolist() == [-1.0] * 3 + [-3.0] * 3


def test_what_became_of_each_row_is_told(opened):
    uniform, first, second, third = [7.0] * 3, [0.0, 1.0, 5.0], [40.0, 10.0, 2.0], [0.0, 9.0, 3.0]
    again = drawn(opened(zero_variance="resample"), uniform + uniform, first + uniform, second * 2)
    told = again.draws(again.is_learned)
    assert told.of == len(ROWS) and told.rows == [[0, 1], [2, 3], [4, 5]]
    assert told.fates == [["discarded"] * 2, ["trained", "discarded"], ["trained", "discarded"]]

    skipped = drawn(opened(zero_variance="skip"), uniform + third)
    assert skipped.draws(skipped.is_learned).fates == [["skipped", "trained"]]
    assert skipped.draws(skipped.is_learned).unapplied().fates == [["skipped", "not_applied"]]

    pair = drawn(opened(orders="both"), first + third)
    assert pair.draws(pair.is_learned) == (len(ROWS) // 2, [[0]], [["trained"]])


def test_a_group_that_only_fills_up_counts_in_no_deviation(opened):
    run = opened(zero_variance="resample", advantage={"scale": "batch"}, max_draws=2)
    step = drawn(run, [7.0] * 3 + [0.0, 1.0, 5.0], [9.0] * 6)
    assert step.is_learned.tolist() == [False] * 3 + [True] * 3
    wanted = np.array([0, 0, 0, -2, -1, 3]) / (np.std([0, 1, 5], ddof=1) + 1e-6)
    np.testing.assert_allclose(step.batch.advantages, wanted, rtol=1e-5)


def test_both_orders_share_a_baseline_without_what_is_not_paid(opened):
    values = [1.0, None, 3.0, 2.0, 4.0, 9.0]
    step = drawn(opened(orders="both"), values)
    np.testing.assert_allclose(step.batch.advantages, advantages(values), rtol=1e-5)
    assert step.is_learned.tolist() == [True, False, True, True, True, True]


def test_a_completion_near_the_limit_is_punished_whoever_pays_but_that_alone_is_no_pay(opened):
    """Completions are of 16 tokens at most, one for each sign: 13 begin the last fifth."""
    values = [1.0, 123456789012.0, 10000000000001.0, None, 100.0, 1.0]
    run = opened(overlong=-1.0)
    step = drawn(run, values)
    lengths = step.batch.sampled.lengths
    assert lengths.tolist() == [3, 14, 16, 4, 5, 3]
    paid = [judgement.terms["overlong"] for judgement in step.batch.judgements]
    np.testing.assert_allclose(paid, [0, -(14 - 12.8) / 3.2, -1, 0, 0, 0], atol=1e-6)
    assert step.is_learned.tolist() == [True, True, True, False, True, True]
    assert step.batch.judgements[3].reward is None


def test_of_two_orders_each_is_compared_with_itself_and_with_the_other(opened):
    """EIS-GRPO: the sum of both advantages."""
    values = [4.0, 1.0, 3.0, 0.0, 2.0, 2.0]
    step = drawn(opened(orders="both", advantage={"orders": "summed"}), values)
    wanted = advantages(values) + advantages(values[:3], values[3:])
    np.testing.assert_allclose(step.batch.advantages, wanted, rtol=1e-5)


def test_terms_are_compared_apart_each_with_its_weight(opened):
    settings = {"terms": "apart", "term_weights": {"pay_again": 3.0}}
    values = [4.0, None, 3.0, 5.0, None, 0.0]
    step = drawn(opened("pay", "pay_again", advantage=settings), values)
    # pay_again pays 1 where the text is null, and nothing else: it has nothing to compare.
    np.testing.assert_allclose(step.batch.advantages, advantages(values[:3], values[3:]), rtol=1e-5)
    assert step.is_learned.all()
    step = drawn(opened("pay", "notes", advantage=settings | {"term_weights": {"pay": 3}}), values)
    wanted = 3 * advantages(values[:3], values[3:])
    np.testing.assert_allclose(step.batch.advantages, wanted, rtol=1e-5)


def test_what_fills_up_a_resampled_batch_counts_in_no_whitening(opened):
    run = opened(zero_variance="resample", advantage={"whiten": "rows"}, max_draws=2)
    first, second = [1.0, 2.0, 6.0], [5.0, 5.0, 5.0]
    step = drawn(run, first + second, second + second)
    wanted = advantages(advantages(first).tolist())  # mean 0 already: only the deviation changes
    np.testing.assert_allclose(step.batch.advantages, [*wanted, 0, 0, 0], rtol=1e-5)
    assert step.is_learned.tolist() == [True] * 3 + [False] * 3


def test_rewards_are_lowered_by_the_sum_of_log_ratios_before_they_are_compared(opened):
    """As verl's k1 in the reward and TRL's RLOO: of all tokens of a completion."""
    run = opened(advantage={"kl_weight": 0.5}, minibatches=2)
    values = [1.0, None, 30.0, 2.0, 2.0, 2.0]
    step = drawn(run, values)
    layout = training_layout(create_mesh(run.config.mesh, jax.devices()[:1]))
    policy = types.SimpleNamespace(tokenizer=run.policy.tokenizer, training=layout, unit=1)
    run = dataclasses.replace(run, policy=cast(Any, policy))
    rng, parts, distance = np.random.default_rng(0), [], np.zeros(6)
    for number in (0, 1):
        chosen = np.arange(3 * number, 3 * number + 3)
        sampled = step.batch.sampled.take(chosen.tolist())
        group = Group([1, 2], sampled.ids)
        ref_logps = rng.normal(size=sampled.logps.shape).astype(np.float32)
        for i, ref, old, length in zip(
            chosen, ref_logps, sampled.logps, sampled.lengths, strict=True
        ):
            distance[i] = np.sum((old - ref)[:length])
        known = Known(
            sampled.logps, step.batch.advantages[chosen], step.is_learned[chosen], ref_logps
        )
        part = pack_minibatch(run.policy, [128], [group], known, "token_mean")
        parts.append(
            part._replace(completion=np.where(part.completion < 0, -1, chosen[part.completion]))
        )
    compared, after = less_divergence(run, parts, step)
    lowered = [v if v is None else v - 0.5 * d for v, d in zip(values, distance, strict=True)]
    wanted = advantages(lowered[:3], lowered[3:])
    np.testing.assert_allclose(after.batch.advantages, wanted, rtol=1e-5, atol=1e-6)
    assert after.metrics["rewards/kl/mean"] == pytest.approx(-0.5 * distance.mean(), rel=1e-5)
    for part in compared:
        placed, is_target = np.asarray(part.targets.advantages), part.completion >= 0
        np.testing.assert_allclose(placed[is_target], wanted[part.completion[is_target]], rtol=1e-5)
        assert not placed[~is_target].any()


def test_what_plug_ins_log_is_averaged_and_stands_in_the_table(opened):
    values = [1.0, None, 3.0, None, 4.0, 95.0]
    step = drawn(opened("pay", "notes"), values, state=TrainerState(4, 9))
    assert mean_logged(step.batch.logged, step.metrics) == {"seen": 6.0, "step": 4.0}
    assert [name for name, _ in step.batch.logged] == ["seen", "step"]
    table = rollouts.table_rows(step.batch)
    assert [row["length"] for row in table] == [3, 4, 3, 4, 3, 4]
    # Numbers and texts in one column become texts: a table has columns of one type.
    assert [row["mixed"] for row in table] == ["1.0", "4", "3.0", "4", "4.0", "95.0"]


def test_a_name_of_ours_is_refused_to_a_plug_in(opened):
    step = drawn(opened("clash"), [0.0] * 6)
    with pytest.raises(RunError, match="logs the metric 'reward', which a run logs itself"):
        mean_logged(step.batch.logged, step.metrics)
    with pytest.raises(RunError, match="logs the column 'status', which the table of completions"):
        rollouts.table_rows(step.batch)


def test_a_rows_own_columns_reach_a_plug_in(opened, monkeypatch):
    run = opened()
    seen = []

    def difficulty(completions: list[str], difficulty: list[float]) -> list[float]:
        seen.append(difficulty)
        return difficulty

    module = types.ModuleType("own_columns")
    module.difficulty = difficulty  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "own_columns", module)
    data = dataclasses.replace(run.data, plugins=plugins.load({"own_columns:difficulty": 2.0}))
    run = dataclasses.replace(run, data=data)
    rows = [dataclasses.replace(row, meta={"difficulty": i}) for i, row in enumerate(ROWS[:2])]
    sampled = Sampled([[1]] * 6, np.zeros((6, 16)), np.ones(6, int), np.ones(6, bool))
    started = Started(0, [0, 1], [Example(row, "p", [1]) for row in rows], lambda: sampled)
    step = rollouts.draw(run, lambda _: started, started, lambda _: contextlib.nullcontext(), BEGIN)
    assert seen == [[0, 0, 0, 1, 1, 1]]
    assert [each.reward for each in step.batch.judgements] == [0.0] * 3 + [2.0] * 3


@pytest.mark.slow  # compiles a sampler
def test_a_row_that_stands_twice_in_a_batch_is_drawn_twice(tmp_path):
    """And each place of a batch is drawn alike, whatever stands beside it and on many devices."""
    config = from_dict(
        {
            "run": {"dir": str(tmp_path / "r")},
            "model": {"preset": "toy", "tokenizer": "toy", "compute_dtype": "float32"},
            "data": {"train": "toy", "prompt": "toy", "max_prompt_tokens": 48, "eval_rows": 8},
            "sampling": {"max_new_tokens": 8},
            "grpo": {"steps": 1, "prompts": 4, "rollouts": 3},
        }
    )
    written = {}
    for num_devices in (1, 4):
        with open_run(config, jax.devices()[:num_devices]) as run:
            width, _ = run.data.train.longest
            sample = rollouts.make_sampler(config, run.policy, width, config.grpo.rollouts)
            programs = grpo_programs(config, run.policy, width)
            weights = programs.lay_out(initial_params(run, "grpo"))
            (row, other) = run.data.train.take([0, 1])
            twice = sample(weights, [row, row, other, row], 0)().ids
            beside = sample(weights, [row, other, row, other], 0)().ids
            later = sample(weights, [row, row, other, row], 1)().ids
        written[num_devices] = twice, beside, later
        groups = [twice[i : i + 3] for i in (0, 3, 9)]
        texts = [tuple(ids) for group in groups for ids in group]
        assert len(set(texts)) == 9, "random weights: no two of nine completions are alike"
        assert beside[:3] == twice[:3] and later[:3] != twice[:3]
    assert written[1] == written[4]


def test_a_rollout_comes_back_from_a_checkpoint_as_it_was(opened):
    run = opened()
    ids = [[5, 6, 7], [8], [9, 10], [11], [12], [13]]
    logps = np.zeros((6, 16), np.float32)
    for row, each in enumerate(ids):
        logps[row, : len(each)] = -np.pi / (1 + row)
    lengths, is_finished = np.array([3, 1, 2, 1, 1, 1]), np.array([True, False] * 3)
    sampled = Sampled(ids, logps, lengths, is_finished)
    run = dataclasses.replace(run, data=dataclasses.replace(run.data, train=cast(Any, Rows())))
    numbers, prompts = rollouts._prompts(run, 3, 1)
    content = json.loads(json.dumps(rollouts.saved(Started(3, numbers, prompts, lambda: sampled))))
    again = rollouts.restored(run, content, 1)
    assert (again.position, again.rows, again.prompts) == (3, numbers, prompts)
    found = again.collect()
    assert found.ids == ids and found.logps.dtype == np.float32
    for before, after in zip(sampled[1:], found[1:], strict=True):
        np.testing.assert_array_equal(before, after)


class Rows:
    """Examples that are their numbers."""

    def __len__(self) -> int:
        return len(ROWS)

    def take(self, rows: Any) -> list[int]:
        return list(rows)
