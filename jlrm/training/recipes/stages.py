"""The stages of a run: one row each.

A stage's settings and its title are the section of the config that has its name, and the sections
stand in the order of the stages. What a new stage takes: that section, a file with its recipe, its
programs as in programs.py, and a row here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

from jlrm.config import Config
from jlrm.sampling.policy import Network
from jlrm.training.calls import Call
from jlrm.training.heldout import EvaluateFn
from jlrm.training.programs import grpo_calls, sft_calls
from jlrm.training.recipes.grpo import grpo
from jlrm.training.recipes.pair_programs import dpo_calls, reward_calls
from jlrm.training.recipes.preference import dpo
from jlrm.training.recipes.reward_model import reward_model
from jlrm.training.recipes.sft import sft
from jlrm.training.setup import Run
from jlrm.training.stage import StageResult


class StageRow(NamedTuple):
    """What runs a stage, and the programs that it runs, by name."""

    recipe: Callable[[Run, EvaluateFn], StageResult]
    calls: Callable[[Config, Network, int], dict[str, Call]]  # int: the longest prompt, in tokens


STAGES: Mapping[str, StageRow] = MappingProxyType(
    {
        "sft": StageRow(sft, sft_calls),
        "dpo": StageRow(dpo, dpo_calls),
        "grpo": StageRow(grpo, grpo_calls),
        "reward_model": StageRow(reward_model, reward_calls),
    }
)
