"""The saved steps of a run: which there are, which are whole, and which one `RUN@STEP` names.

A step is a directory `checkpoints/<stage>/<step>`. It is whole when its save has finished, all its
items are there, its files have the sizes that they had when it was saved (file_list.py), and its
JSON says what was written. What files and arrays hold is checked where they are read
(checkpoint.py). Steps of older programs list no files and carry no digests, and are taken as they
are.
"""

from __future__ import annotations

import json
import logging
from typing import Any

from etils import epath

from jlrm.config import UsageError, stage_titles
from jlrm.runtime.settings import from_dict, parse_yaml
from jlrm.weights import digests, file_list

log = logging.getLogger(__name__)

IMPORTED = "import"  # the series of weights that came from elsewhere
COMMITTED = "commit_success.txt"  # Orbax writes it last
ABOUT = "_CHECKPOINT_METADATA"
JSON_FILES = {"meta": "metadata", "metrics": "metrics", "digests": "metadata"}  # of items


def split(source: str) -> tuple[str, str]:
    """Return a run's directory and what is wanted of it, of `RUN` or `RUN@...`.

    A directory may have an @ in its name: one that exists is meant as a whole.

    Raises:
      UsageError: nothing stands behind the @ of a run.
    """
    run, at, wanted = source.rpartition("@")
    is_whole = not run or (epath.Path(source).expanduser() / "checkpoints").is_dir()
    if at and not wanted and not is_whole and is_run(run):
        raise UsageError(f"{source} names no step. Name one, or best, or leave out the @.")
    return (source, "") if is_whole else (run, wanted)


def is_run(source: str) -> bool:
    """Return whether `source` names a run directory, with or without @STEP."""
    return (epath.Path(split(source)[0]).expanduser() / "checkpoints").is_dir()


def absolute(path: epath.PathLike) -> epath.Path:
    """Return a path that does not depend on where the program was started."""
    wanted = epath.Path(path)
    return wanted if "://" in str(path) else wanted.expanduser().absolute()


def saved_steps(run: epath.Path) -> dict[str, list[int]]:
    """Return the steps of every series, that of the newest weights first, whole or not."""
    saved = {}
    for stage in (*reversed(stage_titles()), IMPORTED):
        directory = run / "checkpoints" / stage
        # A save under way carries a temporary suffix, so its name is no number. In a store it has
        # its final name, and lacks the file that is written last.
        steps = [int(entry.name) for entry in directory.glob("*") if entry.name.isdigit()]
        steps = sorted(step for step in steps if not is_unfinished(directory / str(step)))
        if steps:
            saved[stage] = steps
    return saved


def find(source: str) -> epath.Path:
    """Return the directory of one saved step for `RUN`, `RUN@STEP`, `RUN@STAGE/STEP` or `RUN@best`.

    Without a step: the newest whole one of the last stage that ran. Newer ones are named.

    Raises:
      UsageError: no such run or step, or it is not whole.
    """
    text, wanted = split(source)
    run = epath.Path(text).expanduser()
    saved = saved_steps(run)
    if not saved:
        raise UsageError(
            f"{run} holds no checkpoints (wanted a run directory with checkpoints/ in it)."
        )
    stage, _, step = wanted.rpartition("/")
    stage = stage or next(iter(saved))
    series = run / "checkpoints" / stage
    known = ", ".join(f"{name}/{number}" for name, steps in saved.items() for number in steps)
    if stage in saved and step in ("", "best"):
        whole = whole_steps(series, saved[stage])
        return series / str(_best_step(run, stage, whole) if step else whole[-1])
    if stage not in saved or not step.isdigit() or int(step) not in saved[stage]:
        raise UsageError(f"{run} has no checkpoint '{wanted}'. Saved: {known}.")
    return find_step(series, int(step))


def pinned(source: str) -> str:
    """Return a run as RUN@STAGE/STEP, since its newest step may soon be another; others as given.

    Raises:
      UsageError: no such run or step, or it is not whole.
    """
    if not is_run(source):
        return source
    step = find(source)
    return f"{split(source)[0]}@{step.parent.name}/{step.name}"


def find_step(series: epath.Path, step: int) -> epath.Path:
    """Return the directory of a step.

    Raises:
      UsageError: there is none, or it is not whole.
    """
    directory = series / str(step)
    if not directory.is_dir():
        raise UsageError(f"{series} has no checkpoint of step {step}.")
    if reason := damage(directory):
        raise UsageError(f"{directory} is damaged: {reason}. {_others(series, step)}")
    return directory


def whole_steps(series: epath.Path, steps: list[int]) -> list[int]:
    """Return which of the steps are whole, and name those that are newer than the newest of them.

    Raises:
      UsageError: none is.
    """
    reasons = {step: damage(series / str(step)) for step in steps}
    whole = [step for step in steps if not reasons[step]]
    if not whole:
        listed = "; ".join(f"{step}: {reason}" for step, reason in reasons.items())
        raise UsageError(
            f"No checkpoint in {series} is whole ({listed}). Bring the files back, or remove "
            "the directory: then the stage begins anew."
        )
    for step in steps:
        if step > whole[-1]:
            log.warning(
                "%s is damaged: %s. Taken instead: step %d. Bring its files back, or remove it.",
                *(series / str(step), reasons[step], whole[-1]),
            )
    return whole


def is_unfinished(directory: epath.Path) -> bool:
    """Return whether the save of a step was cut short before its end."""
    if (directory / COMMITTED).exists():
        return False
    # A local save is renamed when it is complete. One that has the file in its items was copied
    # from a store, or made there.
    return "://" in str(directory) or any(directory.glob(f"*/{COMMITTED}"))


def damage(directory: epath.Path) -> str:
    """Return what keeps a step from being whole; empty: nothing that shows without reading arrays.

    Never raises for anything that the files may hold.
    """
    if is_unfinished(directory):
        return f"its save did not finish, for it has no {COMMITTED}"
    try:
        about = _read(directory / ABOUT) if (directory / ABOUT).exists() else {}
        handlers = about.get("item_handlers")  # by older programs, the name of a class
        names = {"params", "meta", *(handlers if isinstance(handlers, dict) else ())}
        if not (directory / ABOUT).exists() and (directory / "digests").exists():
            return f"{ABOUT} is missing"
    except (ValueError, AttributeError, TypeError):
        return f"{ABOUT} can't be read"
    for name in sorted(names):
        if not (directory / name).is_dir() or not any((directory / name).iterdir()):
            return f"its item '{name}' is missing or empty"
    return file_list.damage(directory) or _wrong_json(directory, names)


def read_digests(directory: epath.Path) -> dict[str, Any]:
    """Return the digests of a whole step; empty: an older program saved it, which is said."""
    if not (directory / "digests").is_dir():
        log.warning("%s carries no digests: what it holds can't be checked.", directory)
        return {}
    return _read(directory / "digests" / JSON_FILES["digests"])


def meta_of(directory: epath.Path) -> dict[str, Any]:
    """Return what is said of a step; empty: it is damaged."""
    return {} if damage(directory) else read_meta(directory)


def wanted_step(run: epath.Path, stage: str, resume: str) -> str:
    """Return what `run.resume` says of a stage: "" (nothing), "previous" or a step.

    Raises:
      UsageError: it says nothing that can be understood.
    """
    where, _, step = resume.rpartition("/")
    is_known = where in ("", *stage_titles()) and (step.isdigit() or resume in ("", "previous"))
    if not is_known:
        raise UsageError(f"run.resume={resume} is none of: STEP, STAGE/STEP, previous.")
    if not step.isdigit():
        return resume
    return step if stage == (where or next(iter(saved_steps(run)), "")) else ""


def clear(series: epath.Path, wanted: str, resume: str) -> None:
    """Set aside what a stage can't or shall not go on from, so that its newest step is whole.

    Args:
      wanted: of `wanted_step`.
      resume: `run.resume`. A step that was saved under the same is newer than what it asks for.

    Raises:
      UsageError: the newest step is damaged, and nothing says that another shall be taken.
    """
    names = [entry.name for entry in series.glob("*") if entry.name.isdigit()]
    numbers: list[int] = sorted(map(int, names))
    reasons = {step: damage(series / str(step)) for step in numbers}
    is_local = "://" not in str(series)
    unfinished = [step for step in reasons if is_unfinished(series / str(step))]
    committed = [step for step in reasons if step not in unfinished]
    whole = [step for step in committed if not reasons[step]]
    gone = [step for step in committed if reasons[step]]
    if wanted.isdigit() and not (whole and _was_asked(series / str(whole[-1]), resume)):
        find_step(series, int(wanted))
        gone += [step for step in whole if step > int(wanted)]
    elif committed and reasons[committed[-1]] and not (wanted == "previous" and whole):
        raise UsageError(refusal(series, committed[-1], reasons[committed[-1]], whole))
    # In a store Orbax removes what is unfinished; it can't tell it elsewhere.
    for step in (*gone, *(unfinished if is_local else ())):
        reason = reasons[step] or f"run.resume={resume}"
        log.warning("Step %d is set aside (%s): %s", step, reason, set_aside(series, step))


def refusal(series: epath.Path, step: int, reason: str, whole: list[int]) -> str:
    """Return what to say of a damaged step from which a stage would go on."""
    said = f"{series / str(step)} is damaged: {reason}. Nothing was trained."
    if not whole:
        return (
            f"{said} No step before it is whole. Bring its files back, or remove {series}: then "
            "the stage begins anew."
        )
    return (
        f"{said} The newest whole step is {whole[-1]}: run.resume=previous (or run.resume="
        f"{series.name}/{whole[-1]}) goes on from there and sets the damaged one aside."
    )


def _was_asked(directory: epath.Path, resume: str) -> bool:
    """Return whether a whole step was saved under this very `run.resume`."""
    return read_meta(directory).get("config", {}).get("run", {}).get("resume") == resume


def read_meta(directory: epath.Path) -> dict[str, Any]:
    """Return what a step's `meta` holds."""
    return _read(directory / "meta" / JSON_FILES["meta"])


def set_aside(series: epath.Path, step: int) -> epath.Path:
    """Move a step out of its series, so that the series goes on without it; return where it is."""
    aside = series.parent / "set_aside"
    aside.mkdir(parents=True, exist_ok=True)
    target, number = aside / f"{series.name}-{step}", 1
    while target.exists():
        target, number = aside / f"{series.name}-{step}-{number}", number + 1
    (series / str(step)).rename(target)
    return target


def _others(series: epath.Path, step: int) -> str:
    steps = (int(entry.name) for entry in series.glob("*") if entry.name.isdigit())
    whole = sorted(each for each in steps if each != step and not damage(series / str(each)))
    listed = f"Whole: {', '.join(map(str, whole))}." if whole else "No other step is whole."
    return f"{listed} Bring its files back, or name another step."


def _wrong_json(directory: epath.Path, items: set[str]) -> str:
    """Return which JSON does not say what was saved."""
    content = {}
    for name in sorted(items & JSON_FILES.keys()):
        try:
            content[name] = _read(directory / name / JSON_FILES[name])
        except (OSError, ValueError):
            return f"its item '{name}' can't be read"
    wanted = content.pop("digests", None)
    if wanted is None:
        return ""
    if not digests.is_intact(wanted):
        return "its item 'digests' is not what was saved"
    if missing := {"params", "meta", "opt_state", "metrics"} & wanted.keys() - items:
        return f"its item '{min(missing)}' is missing"
    for name, held in content.items():
        if digests.of_json(held) != wanted.get(name):
            return f"its item '{name}' is not what was saved"
    return ""


def _read(file: epath.Path) -> Any:
    try:
        return json.loads(file.read_bytes())
    except RecursionError as error:
        raise ValueError(str(error)) from None


def _best_step(run: epath.Path, stage: str, steps: list[int]) -> int:
    """Return the step ranked highest by the run's own `run.best_metric`."""
    file = run / "config.yaml"
    text = file.read_text() if file.is_file() else ""
    if not text.strip():
        state = "an empty" if file.is_file() else "no"
        raise UsageError(f"{run} has {state} config.yaml, which says what is best. Name a step.")
    metric = from_dict(parse_yaml(text, str(file))).run.best_metric
    ranked = {}
    for step in steps:
        file = run / "checkpoints" / stage / str(step) / "metrics" / "metrics"
        if file.is_file():
            try:
                ranked[step] = float(json.loads(file.read_text())[metric])
            except (ValueError, TypeError, KeyError, RecursionError):
                raise UsageError(
                    f"{file} does not say the {metric} of its step. Name a step."
                ) from None
    if not ranked:
        raise UsageError(f"No {stage} checkpoint of {run} was saved with a held-out metric.")
    return max(ranked, key=lambda step: ranked[step])
