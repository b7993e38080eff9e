"""The stages of a run: one row each, in the order in which a run has them.

A stage's settings, and its title, are the section of the config that has its name. What a new one
takes: that section, a file with its recipe, and a row here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from jlrm.training.grpo import grpo
from jlrm.training.heldout import EvaluateFn
from jlrm.training.setup import Run
from jlrm.training.sft import sft
from jlrm.training.stage import StageResult

Recipe = Callable[[Run, EvaluateFn], StageResult]
STAGES: Mapping[str, Recipe] = MappingProxyType({"sft": sft, "grpo": grpo})
