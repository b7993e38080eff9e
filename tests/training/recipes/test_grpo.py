"""What a step of GRPO learns from and reports: minibatches without a gradient, merged metrics."""

from __future__ import annotations

import numpy as np
import pytest

from jlrm.config import LossConfig
from jlrm.training.programs import Known
from jlrm.training.recipes.grpo import has_gradient, merged

AGGREGATIONS = ("token_mean", "sequence_mean", "sequence_sum", "fixed_length")


def known(advantages: list[float], is_kept: list[bool]) -> Known:
    return Known(np.zeros((len(advantages), 2)), np.array(advantages), np.array(is_kept))


@pytest.mark.parametrize("terms", [{}, {"kl_weight": 0.1}, {"entropy_weight": 0.1}])
def test_a_minibatch_teaches_by_an_advantage_or_by_another_term_of_what_is_kept(terms):
    loss = LossConfig(**{"kl_weight": 0.0, "entropy_weight": 0.0, **terms})
    assert has_gradient(loss, known([1.0, -1.0], [True, True]))
    assert has_gradient(loss, known([0.0, -1.0], [False, True]))
    assert not has_gradient(loss, known([1.0, -1.0], [False, False]))
    assert has_gradient(loss, known([0.0, 0.0], [True, True])) == bool(terms)
    assert has_gradient(loss, known([2.0, 0.0], [False, True])) == bool(terms)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_metrics_of_minibatches_are_those_of_all_their_tokens(aggregation):
    rng = np.random.default_rng(0)
    entropy = [rng.random(size) for size in (3, 40, 7)]  # of each token of three minibatches
    reports = [
        {
            "loss": np.float32(i),
            "grad_norm": np.float32(i * i),
            "entropy": np.float32(tokens.mean()),
            "clip_ratio/low_mean": np.float32(np.mean(tokens < 0.3)),
        }
        for i, tokens in enumerate(entropy)
    ]
    found = merged(reports, [3, 40, 7], aggregation)
    every = np.concatenate(entropy)
    assert found.keys() == reports[0].keys()
    assert found["entropy"] == pytest.approx(every.mean(), rel=1e-6)
    assert found["clip_ratio/low_mean"] == pytest.approx(np.mean(every < 0.3), rel=1e-6)
    assert found["grad_norm"] == pytest.approx(5 / 3)
    by_token = (0 * 3 + 1 * 40 + 2 * 7) / 50
    assert found["loss"] == pytest.approx(by_token if aggregation == "token_mean" else 1.0)


def test_the_metrics_of_one_update_stay_to_the_bit_and_those_of_none_say_so():
    numbers = np.random.default_rng(1).normal(size=200).astype(np.float32)
    report = {f"m{i}": value for i, value in enumerate(numbers)}
    wanted = {name: float(value) for name, value in report.items()}
    assert merged([report], [12345], "token_mean") == wanted
    assert merged([], [], "token_mean") == {"loss": 0.0, "grad_norm": 0.0}
