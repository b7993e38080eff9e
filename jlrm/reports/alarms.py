"""What goes wrong when a judge is trained, as its metrics show it, and which settings help.

`Alarms` sees a run's rows one by one, as `metrics.jsonl` holds them. A run says on the console what
they show while it trains, and its page says it again from the file; those of `run.stop_on` end it.
The limits told good from bad stretches of runs of a 135M and a 0.5B judge (README, "When it does
not learn"); that of the KL divergence is ten times what the toy's runs reach.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from jlrm.config import UsageError, nearest

Row = Mapping[str, Any]
Rule = Callable[[Sequence[Row]], str]
SILENT_STEPS = 5  # without a verdict
SHORT, LONG = 5, 10  # steps that a mean is taken over
LOST = 20.0  # points of the parse rate below the best so far
LEANING = 50.0  # points between the shares of the two places, twice in a row
ALONE = 90.0  # the same, once
UNIFORM = 0.9  # share of groups whose rewards are equal
LEARNED = 90.0  # percent of agreement above which equal rewards and certainty are what is wanted
CERTAIN = 0.01  # nats per token
BY_HEART = 15.0  # points of agreement between training and held-out pairs
CUT = 0.5  # share of completions
FAR = 1.0  # nats per token between the policy and the reference
LONGER = 2.0  # times the completions of the first steps


class Alarm(NamedTuple):
    """What was wrong after a step of a stage."""

    stage: str
    step: int
    name: str  # of its rule
    text: str
    is_over: bool = False  # it no longer held when the held-out pairs were last judged


class Alarms:
    """Watch the rows of a run; each rule speaks once a stage."""

    def __init__(self) -> None:
        self._rows: list[Row] = []  # of the stage under way
        self._has_spoken: set[str] = set()

    def see(self, row: Row) -> list[Alarm]:
        """Take the next row; return what has gone wrong with it."""
        if self._rows and self._rows[-1]["stage"] != row["stage"]:
            self._rows, self._has_spoken = [], set()
        self._rows.append(row)
        raised = []
        for name, rule in RULES.items():
            if name not in self._has_spoken and (text := rule(self._rows)):
                self._has_spoken.add(name)
                raised.append(Alarm(row["stage"], row["step"], name, text))
        return raised


def check_names(names: Sequence[str]) -> None:
    """Refuse what is the name of no alarm, as UsageError."""
    for name in names:
        if name not in RULES:
            raise UsageError(f"run.stop_on: no alarm {name!r}. {nearest(name, RULES)}")


def alarms(rows: Sequence[Row]) -> list[Alarm]:
    """Return all that a run's rows show to be wrong, and whether it passed."""
    watch = Alarms()
    raised = [alarm for row in rows for alarm in watch.see(row)]
    return [alarm._replace(is_over=_is_over(alarm, rows)) for alarm in raised]


def _is_over(alarm: Alarm, rows: Sequence[Row]) -> bool:
    own = [row for row in rows if row["stage"] == alarm.stage]
    judged = [
        i for i, row in enumerate(own) if "eval/agreement" in row and row["step"] > alarm.step
    ]
    return bool(judged) and not RULES[alarm.name](own[: judged[-1] + 1])


# --- Rules: rows of a stage, the newest last -> what is wrong, "" if nothing is or can be told ---


def _silent(rows: Sequence[Row]) -> str:
    parsed = _last(rows, "judge/parse_rate", SILENT_STEPS)
    if not parsed or any(parsed):
        return ""
    cut = 100 * rows[-1].get("completions/clipped_ratio", 0.0)
    return (
        f"no completion of the last {SILENT_STEPS} steps holds a verdict, and so none is paid for "
        f"one. What helps: SFT first (sft.steps), longer completions ({cut:.0f} % were cut at "
        "sampling.max_new_tokens), or a larger model."
    )


def _loses_its_form(rows: Sequence[Row]) -> str:
    now = _mean(_last(rows, "judge/parse_rate", SHORT))
    if now >= 100.0 - LOST:  # the usual case, without a look at all that was before
        return ""
    parsed = _all(rows, "judge/parse_rate")
    earlier = range(max(len(parsed) - 2 * SHORT + 1, 0))
    best = max((_mean(parsed[i : i + SHORT]) for i in earlier), default=0.0)
    return _if(
        0 < now < best - LOST,
        f"judgements lose their form: {now:.0f} % can be read, {best:.0f} % could. What helps: a "
        "lower grpo.optimizer.learning_rate, or grpo.loss.kl_weight.",
    )


def _leans(rows: Sequence[Row]) -> str:
    if not rows[-1].get("eval/parse_rate"):
        return ""
    leans = _all([row for row in rows if row.get("eval/parse_rate")], "eval/delta_bias")
    lean = leans[-1] if leans else 0.0
    return _if(
        lean >= ALONE or (len(leans) > 1 and min(leans[-2:]) >= LEANING),
        f"held-out verdicts follow the place of the answer (lean {lean:.0f} %), not what it says. "
        "What helps: data.orders=both, in which a place earns nothing; an SFT that is shorter or "
        "has a lower learning rate; grpo.loss.entropy_weight, if it is already certain.",
    )


def _nothing_to_compare(rows: Sequence[Row]) -> str:
    equal, right = _before_it_is_learned(rows, "frac_reward_zero_std")
    return _if(
        equal >= UNIFORM,
        f"{100 * equal:.0f} % of the groups of the last {LONG} steps earn equal rewards, and so "
        f"teach nothing, while {right:.0f} % of the verdicts are right. What helps: "
        "data.orders=both, which compares the two orders of a pair; grpo.zero_variance=resample; "
        "more grpo.rollouts; a higher sampling.temperature or grpo.loss.entropy_weight.",
    )


def _certain(rows: Sequence[Row]) -> str:
    entropy, right = _before_it_is_learned(rows, "entropy")
    return _if(
        entropy < CERTAIN,
        f"the judge writes the same whatever is drawn (entropy {entropy:.4f} nats per token), "
        f"while {right:.0f} % of the verdicts are right: it explores no more. What helps: to begin "
        "again with a higher grpo.loss.entropy_weight or a lower grpo.optimizer.learning_rate, "
        "from this run's best checkpoint.",
    )


def _by_heart(rows: Sequence[Row]) -> str:
    heldout = rows[-1].get("eval/agreement")
    right = _last(rows, "judge/agreement", LONG)
    if heldout is None or not right:
        return ""
    return _if(
        _mean(right) - heldout >= BY_HEART,
        f"{_mean(right):.0f} % of the training verdicts are right and {heldout:.0f} % of the "
        "held-out ones: pairs are learned by heart. What helps: more pairs, and more varied ones, "
        "or fewer steps (the best checkpoint is kept).",
    )


def _cut(rows: Sequence[Row]) -> str:
    cut = _last(rows, "completions/clipped_ratio", SHORT)
    if not cut or not rows[-1].get("judge/parse_rate"):  # else `_silent` says it
        return ""
    return _if(
        _mean(cut) >= CUT,
        f"{100 * _mean(cut):.0f} % of the completions are cut before they end. What helps: a "
        "larger sampling.max_new_tokens, reward.length, or reward.limit=-1.0.",
    )


def _far(rows: Sequence[Row]) -> str:
    kl = _mean(_last(rows, "kl", SHORT))
    return _if(
        kl >= FAR,
        f"the policy is far from its reference (KL divergence {kl:.2f} nats per token). What "
        "helps: a higher grpo.loss.kl_weight, or a lower grpo.optimizer.learning_rate.",
    )


def _reward_falls(rows: Sequence[Row]) -> str:
    reward, spread = _all(rows, "reward"), _all(rows, "reward_std")
    if len(reward) < 2 * LONG or len(spread) != len(reward):
        return ""
    now, at_first = _mean(reward[-LONG:]), _mean(spread[:LONG])
    best = max(_mean(reward[i : i + LONG]) for i in range(len(reward) - 2 * LONG + 1))
    return _if(
        best - now > at_first,
        f"the reward has fallen from {best:.2f} to {now:.2f} (means of {LONG} steps), more than it "
        f"varied at the beginning ({at_first:.2f}). What helps: to begin again from this run's "
        "best checkpoint with a lower grpo.optimizer.learning_rate or a higher "
        "grpo.loss.kl_weight.",
    )


def _grows(rows: Sequence[Row]) -> str:
    length, right = _all(rows, "completions/mean_length"), _all(rows, "judge/agreement")
    if len(length) < 2 * LONG or len(right) != len(length):
        return ""
    first, now = _mean(length[:LONG]), _mean(length[-LONG:])
    return _if(
        now >= LONGER * first and _mean(right[-LONG:]) <= _mean(right[:LONG]),
        f"completions grow from {first:.0f} to {now:.0f} tokens, and no more verdicts are right. "
        "What helps: reward.length, reward.limit=-1.0, or a smaller sampling.max_new_tokens.",
    )


RULES = {
    "no_verdict": _silent,
    "form": _loses_its_form,
    "place": _leans,
    "zero_variance": _nothing_to_compare,
    "entropy": _certain,
    "overfit": _by_heart,
    "clipped": _cut,
    "kl": _far,
    "reward": _reward_falls,
    "length": _grows,
}


def _if(is_so: bool, text: str) -> str:
    return text if is_so else ""


def _all(rows: Sequence[Row], name: str) -> list[float]:
    return [row[name] for row in rows if math.isfinite(row.get(name, math.nan))]


def _last(rows: Sequence[Row], name: str, count: int) -> list[float]:
    """Return a metric of so many newest rows; nothing where not all of them have it."""
    values = _all(rows[-count:], name)
    return values if len(values) == count else []


def _before_it_is_learned(rows: Sequence[Row], name: str) -> tuple[float, float]:
    """Return the means of a metric and of agreement; NaN of both once the judge is mostly right."""
    value = _mean(_last(rows, name, LONG))
    right = _mean(_last(rows, "judge/agreement", LONG))
    return (value, right) if right < LEARNED else (math.nan, math.nan)


def _mean(values: Sequence[float]) -> float:
    """Return the mean, NaN of nothing: no comparison with it is true."""
    return sum(values) / len(values) if values else math.nan
