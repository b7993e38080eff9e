"""From the confidence that a judge states to how often it is right: a monotone map, fitted.

`isotonic` regression for many rows; Platt's logistic curve (Platt 1999, with his targets) for few.
How well a map does is measured on questions that it was not fitted on.
"""

from __future__ import annotations

import logging
import pathlib
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float
from scipy import optimize, special

from jlrm.config import UsageError
from jlrm.evaluation.statistics.diagnostics import calibration_error
from jlrm.reports import contracts

log = logging.getLogger(__name__)

NAME, VERSION = "calibration.json", 1
FEW_ROWS = 200  # below these a step function has too few rows a step
NUM_FOLDS = 5
LEAST_ROWS = 20
EDGE = 1e-6  # logits of 0 and 1 are infinite


@dataclass(frozen=True)
class ConfidenceMap:
    """The content of `calibration.json`; `at` and `is_right` are the corners, linear between.

    ece, brier: expected calibration error in points and mean square error, before the map and
    after it, the latter on questions that the map used there had not seen.
    tie_below: verdicts that state no more confidence are ties; 0.5: equal scores alone are.
    agreement: of verdicts with labels, in percent, without and with such ties, likewise; None where
    no label is a tie.
    """

    method: str  # "isotonic" or "platt"
    at: tuple[float, ...]
    is_right: tuple[float, ...]
    rows: int
    accuracy: float
    ece: tuple[float, float]
    brier: tuple[float, float]
    tie_below: float = 0.5
    agreement: tuple[float, float] | None = None
    version: int = VERSION

    def __call__(self, confidence: float) -> float:
        """Return how often verdicts of this confidence were right."""
        return float(np.interp(confidence, self.at, self.is_right))


def fit(
    confidence: Sequence[float], right: Sequence[bool], groups: Sequence[Hashable]
) -> ConfidenceMap:
    """Fit a map, and measure it by cross-validation over groups.

    Raises:
      UsageError: fewer than 20 rows, or rows of fewer than five groups.
    """
    x, y = np.asarray(confidence, float), np.asarray(right, float)
    numbers = {name: number for number, name in enumerate(dict.fromkeys(groups))}
    if len(x) < LEAST_ROWS or len(numbers) < NUM_FOLDS:
        raise UsageError(
            f"--calibrate needs {LEAST_ROWS} rows of {NUM_FOLDS} questions at least, with a "
            f"confidence, a verdict and a label that names an answer; got {len(x)} of "
            f"{len(numbers)}."
        )
    method = "platt" if len(x) < FEW_ROWS else "isotonic"
    fold = np.array([numbers[name] % NUM_FOLDS for name in groups])
    unseen = np.empty_like(x)
    for number in range(NUM_FOLDS):
        corners = _corners(method, x[fold != number], y[fold != number])
        unseen[fold == number] = np.interp(x[fold == number], *corners)
    at, is_right = _corners(method, x, y)
    return ConfidenceMap(
        method,
        tuple(map(float, at)),
        tuple(map(float, is_right)),
        len(x),
        100 * float(y.mean()),
        (calibration_error(x, y), calibration_error(unseen, y)),
        (float(((x - y) ** 2).mean()), float(((unseen - y) ** 2).mean())),
    )


def fit_ties(
    confidence: Sequence[float],
    judged: Sequence[int],
    labels: Sequence[int],
    groups: Sequence[Hashable],
) -> tuple[float, tuple[float, float]]:
    """Return the confidence up to which verdicts are best called ties, and what that changes.

    Args:
      confidence, judged: of each row with a verdict (1, 2 or 0), what it states; 0.5 for a tie.
      labels: 1, 2 or 0.

    Returns:
      `tie_below`, and agreement with the labels in percent without it and, by cross-validation over
      groups, with it.
    """
    x, said, right = np.asarray(confidence, float), np.asarray(judged), np.asarray(labels)
    numbers = {name: number for number, name in enumerate(dict.fromkeys(groups))}
    fold = np.array([numbers[name] % NUM_FOLDS for name in groups])

    def best(rows: np.ndarray) -> float:
        bounds = np.unique(np.append(x[rows], 0.5))
        scores = [_agreement(x[rows], said[rows], right[rows], bound) for bound in bounds]
        return float(bounds[int(np.argmax(scores))])  # the first of equals: the fewest ties

    unseen = np.empty(len(x))
    for number in set(fold.tolist()):
        unseen[fold == number] = best(fold != number) if (fold != number).any() else 0.5
    before = _agreement(x, said, right, 0.5)
    return best(np.ones(len(x), bool)), (before, _agreement(x, said, right, unseen))


def _agreement(x: np.ndarray, judged: np.ndarray, labels: np.ndarray, bound: Any) -> float:
    return 100 * float(np.mean(np.where(x <= bound, 0, judged) == labels))


def isotonic(
    x: Float[np.ndarray, " N"], y: Float[np.ndarray, " N"]
) -> tuple[Float[np.ndarray, " M"], Float[np.ndarray, " M"]]:
    """Return the corners of the least-squares non-decreasing function of x, one for each value."""
    at, places = np.unique(x, return_inverse=True)
    weights = np.bincount(places).astype(float)
    means = np.bincount(places, y) / weights
    return at, optimize.isotonic_regression(means, weights=weights).x


def platt(x: Float[np.ndarray, " N"], y: Float[np.ndarray, " N"]) -> tuple[float, float]:
    """Return a and b of 1 / (1 + exp(-(a logit(x) + b))); a is not negative."""
    num_right, num_wrong = y.sum(), len(y) - y.sum()
    targets = np.where(y > 0, (num_right + 1) / (num_right + 2), 1 / (num_wrong + 2))
    logits = special.logit(np.clip(x, EDGE, 1 - EDGE))

    def loss(theta: np.ndarray) -> tuple[float, np.ndarray]:
        z = theta[0] * logits + theta[1]
        value = np.logaddexp(0, z) - targets * z
        slope = special.expit(z) - targets
        return float(value.sum()), np.array([(slope * logits).sum(), slope.sum()])

    bounds = [(0.0, None), (None, None)]
    found = optimize.minimize(loss, np.array([1.0, 0.0]), jac=True, bounds=bounds)
    return float(found.x[0]), float(found.x[1])


def _corners(
    method: str, x: Float[np.ndarray, " N"], y: Float[np.ndarray, " N"]
) -> tuple[np.ndarray, np.ndarray]:
    if method == "isotonic":
        return isotonic(x, y)
    slope, offset = platt(x, y)
    at = np.linspace(0.5, 1.0, 51)
    logits = special.logit(np.clip(at, EDGE, 1 - EDGE))
    return at, special.expit(slope * logits + offset)


def write(path: pathlib.Path, found: ConfidenceMap) -> None:
    """Write `calibration.json`."""
    contracts.write(path, found)


def find(named: str, model: str) -> ConfidenceMap | None:
    """Return the map of a judge's confidence: of a file, or beside the model, which is told.

    Args:
      named: a file, "none", or "" for calibration.json of the run or directory.
      model: RUN[@STEP] or a directory; others have none.

    Raises:
      UsageError: the file is none.
    """
    if named == "none":
        return None
    if named:
        path = pathlib.Path(named).expanduser()
        if not path.is_file():
            raise UsageError(f"calibration {named}: there is no such file.")
        return read(path)
    places = [model, model.rpartition("@")[0]]  # weights/steps.py takes it apart, with JAX
    files = (pathlib.Path(place).expanduser() / NAME for place in places if place)
    found = next((file for file in files if file.is_file()), None)
    if found is None:
        return None
    log.warning("%s: confidences go through this map", found)
    return read(found)


def read(path: pathlib.Path) -> ConfidenceMap:
    """Read a `calibration.json`. Raises UsageError for a file that is none, or no map."""
    content = contracts.read(path, VERSION, "Fit it again: jlrm judge check FILE --calibrate.")
    found = contracts.decode(ConfidenceMap, {**content, "version": VERSION}, str(path))
    at, is_right = np.array(found.at), np.array(found.is_right)
    is_map = len(at) == len(is_right) > 0 and bool(np.all(np.diff(at) > 0))
    if not is_map or not np.all((is_right >= 0) & (is_right <= 1)):  # NaN is neither
        raise UsageError(
            f"{path} is no map of a confidence: `at` must ascend, and `is_right` hold a share for "
            "each. Fit it again: jlrm judge check FILE --calibrate."
        )
    return found
