"""Who judges: the options of each backend, what of them shapes the responses, and how one is made.

Backends are imported when they are made, so that recorded verdicts need no accelerator.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import pathlib
import re
import urllib.request
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jlrm.config import MeshConfig, UsageError
from jlrm.evaluation import heuristics
from jlrm.evaluation.games import Backend
from jlrm.evaluation.prompting import AsTrained, as_trained, prompting
from jlrm.judges import requests

log = logging.getLogger(__name__)

BATCHES = "batches.json"
JLRM, OPENAI, VERDICTS, HEURISTIC = "jlrm", "openai", "verdicts", "heuristic"
BACKENDS = (JLRM, OPENAI, VERDICTS, HEURISTIC)


class Option(NamedTuple):
    """A flag of some backends; `is_shaping`: another value may give another response."""

    backends: tuple[str, ...]
    default: Any
    help: str
    is_shaping: bool = True
    settings: Mapping[str, Any] = {}


BOTH = (JLRM, OPENAI)
OPTIONS: dict[str, Option] = {
    "prompt": Option(BOTH, "", "prompt template, or a file of one's own (jlrm; of a run: its own)"),
    "scale": Option(
        BOTH,
        [],
        "lowest and highest score (1 10; of a run: its own)",
        settings={"nargs": 2, "metavar": ("MIN", "MAX")},
    ),
    "max_prompt_tokens": Option((JLRM,), 4096, "longest prompt; fewer if there are no positions"),
    "max_new_tokens": Option(BOTH, 2048, "longest judgement; fewer if there are no positions"),
    "temperature": Option(BOTH, 0.0, "of sampling (0: the likeliest token)"),
    "top_p": Option(BOTH, 1.0, "share of probability sampled from"),
    "votes": Option(BOTH, 1, "judgements per game, whose scores are averaged"),
    "num_beams": Option((JLRM,), 1, "beams of a beam search; 1: none"),
    "repetition_penalty": Option((JLRM,), 1.0, "of tokens that were written already; 1: none"),
    "stop": Option((JLRM,), True, "end after the second score, or go on"),
    "compute_dtype": Option((JLRM,), "bfloat16", "precision of activations: bfloat16 or float32"),
    "batch_size": Option((JLRM,), 32, "games decoded together; fewer if there are fewer", False),
    "fit_batches": Option(
        (JLRM,),
        False,
        "smaller batches for few games: sooner done, but each size is one more program",
        False,
    ),
    "refill": Option(
        (JLRM,),
        False,
        "games begin where others have ended, not batch by batch: sooner done, but what is written "
        "may depend on the others where two tokens are as good as tied",
        False,
    ),
    "mesh": Option(
        (JLRM,),
        [],
        "how devices are used, e.g. fsdp=4 tensor=2",
        False,
        {"nargs": "+", "metavar": "AXIS=N"},
    ),
    "apart": Option(
        (JLRM,),
        False,
        "of several hosts: each has the whole model, and takes games as it is done with others",
        False,
    ),
    "base_url": Option((OPENAI,), "https://api.openai.com/v1", "address of the endpoint"),
    "system": Option(
        (OPENAI,),
        "auto",
        "where the system text goes: a message of its own, or before the user's text; auto: own, "
        "unless the server refuses it",
        settings={"choices": requests.SYSTEM},
    ),
    "request": Option(
        (OPENAI,),
        {},
        "more fields of a request, e.g. top_k=5; seed=null leaves one out",
        settings={"nargs": "+", "action": "extend", "type": str, "metavar": "KEY=JSON"},
    ),
    "neutral": Option((OPENAI,), True, "break control tokens inside the texts to be judged"),
    "api_key_env": Option((OPENAI,), "OPENAI_API_KEY", "variable that holds the key", False),
    "concurrency": Option((OPENAI,), 8, "requests at a time", False),
    "requests_per_minute": Option(
        (OPENAI,), 0.0, "most requests sent in a minute (0: no limit)", False
    ),
    "timeout": Option((OPENAI,), 300.0, "seconds for one reply", False),
    "max_retries": Option((OPENAI,), 6, "tries after a request that failed", False),
    "cache": Option((OPENAI,), "", "directory of replies that evaluations share", False),
    "prices": Option(
        (OPENAI,),
        [],
        "dollars per million tokens read and written",
        False,
        {"nargs": 2, "metavar": ("IN", "OUT")},
    ),
    "budget": Option((OPENAI,), 0.0, "dollars at which to stop (0: none)", False),
    "batch": Option((OPENAI,), False, "ask by batch files: half the price, within a day", False),
}
# Of a model of ours these are left open until the model and the games are known (`settled`).
OPEN = ("max_prompt_tokens", "max_new_tokens", "batch_size")
# Older journals do not name these; with their defaults they shape nothing.
ADDED = ("system", "request")
AT_LEAST_ONE = (
    "max_prompt_tokens",
    "max_new_tokens",
    "votes",
    "num_beams",
    "batch_size",
    "concurrency",
)


def add_options(parser: argparse.ArgumentParser, names: Sequence[str] = ()) -> None:
    """Add a flag for every option, or for those named, of one backend; not given, it is None."""
    for name, option in OPTIONS.items():
        if names and name not in names:
            continue
        kind = type(option.default)
        element = {"prices": float, "scale": int, "mesh": str}.get(name, kind)
        settings: dict[str, Any] = {"type": element, **option.settings}
        if kind is bool:
            settings = {"action": argparse.BooleanOptionalAction}
        note = f" ({option.default})" if kind is not bool and option.default else ""
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            default=None,
            help=("" if names else f"{'/'.join(option.backends)}: ") + option.help + note,
            **settings,
        )


def options(args: argparse.Namespace) -> dict[str, Any]:
    """Return the options of the backend, each with its value; None for those that are `OPEN`.

    Raises:
      UsageError: an option was given that the backend does not have, a value out of range, or a
        heuristic that there is not.
    """
    chosen = {}
    for name, option in OPTIONS.items():
        value, flag = getattr(args, name), f"--{name.replace('_', '-')}"
        if args.backend in option.backends:
            is_open = args.backend == JLRM and name in OPEN
            chosen[name] = option.default if value is None and not is_open else value
        elif value is not None:
            raise UsageError(f"{flag} has no effect with --backend {args.backend}.")
        if name in AT_LEAST_ONE and value is not None and value < 1:
            raise UsageError(f"{flag}={value} is too small: at least 1.")
        _check_finite(flag, value)
    if chosen.get("request"):
        chosen["request"] = requests.parsed_fields(chosen["request"])
    if args.backend == HEURISTIC:
        heuristics.judge(args.model)  # an unknown one is refused before any data is read
    if args.backend in BOTH:
        own = _as_trained(args.backend, args.model)
        chosen["prompt"] = chosen["prompt"] or own.prompt
        chosen["scale"] = list(chosen["scale"] or own.scale)
        if chosen["scale"][0] >= chosen["scale"][1]:
            raise UsageError(f"--scale {chosen['scale']}: the first must be below the second.")
    return chosen


def _check_finite(flag: str, value: Any) -> None:
    numbers = value if isinstance(value, list) else [value]
    if any(isinstance(number, float) and not math.isfinite(number) for number in numbers):
        raise UsageError(f"{flag}: wanted a finite number, got {value}.")


def judging_of(args: argparse.Namespace) -> str:
    """Return how a judge is asked, by `data.judging`: as a flag says, or as a run was trained.

    Raises:
      UsageError: `--single` or `--at-once` with a backend that can't, or a judge of single answers.
    """
    for name in ("single", "at_once"):
        if getattr(args, name) and args.backend not in BOTH:
            flag = name.replace("_", "-")
            raise UsageError(f"--{flag} has no effect with --backend {args.backend}.")
    own = judging(args.backend, args.model)
    if args.single and args.at_once:
        raise UsageError("--single and --at-once are two ways to ask. Name one of them.")
    if own == "single" and args.at_once:
        raise UsageError(f"{seen_no_pairs(args.model)} Leave out --at-once.")
    if args.single or args.at_once:
        return "single" if args.single else "lists"
    return "pairs" if args.at_once is False and own == "lists" else own


def judging(backend: str, model: str) -> str:
    """Return what a run, or an export, was trained to judge, by `data.judging`; else "pairs"."""
    return _as_trained(backend, model).judging


def seen_no_pairs(model: str) -> str:
    """Return what to say of a judge of single answers that is to compare."""
    return (
        f"{model} was trained to judge each answer alone (data.judging=single), and has seen no "
        "pairs."
    )


def refuse_pairs(backend: str, model: str) -> None:
    """Refuse to ask a judge of single answers about pairs.

    Raises:
      UsageError: with what else to do.
    """
    if judging(backend, model) == "single":
        raise UsageError(
            f"{seen_no_pairs(model)} Give rows of one answer, with --single; jlrm evaluate, "
            "Judge.compare and jlrm judge serve score both answers of a pair."
        )


def _as_trained(backend: str, model: str) -> AsTrained:
    """Return how a model is asked that nobody says more of."""
    return (as_trained(model) if backend == JLRM else None) or AsTrained()


def as_folder(name: str) -> str:
    """Return a judge's name as one of a folder."""
    return re.sub(r"[^\w.-]+", "-", name).strip("-.") or "judge"


def pinned(backend: str, model: str) -> str:
    """Return a run at its step (`steps.pinned`); the model of another backend as given."""
    if backend != JLRM:
        return model
    from jlrm.weights import steps

    return steps.pinned(model)


def settled(
    backend: str, model: str, chosen: Mapping[str, Any], num_games: int = 0
) -> dict[str, Any]:
    """Return the options with those that are `OPEN`, as far as they are not given.

    A prompt and a judgement are as long as the model has positions for, but no longer than usual.
    A batch is as large as the games are many, 0 if that is not known, up to the usual size. These
    are all games of a command, so that those left after a stop are judged by the same programs.
    """
    if backend != JLRM:
        return dict(chosen)
    usual = OPTIONS["max_prompt_tokens"].default, OPTIONS["max_new_tokens"].default
    given = chosen["max_prompt_tokens"], chosen["max_new_tokens"]
    positions = num_positions(model) if None in given else 0
    longest = limits(positions, given, usual)
    told = zip(given, longest, usual, strict=True)
    if any(own is None and mine < most for own, mine, most in told):
        log.warning(
            "%s has %d positions: prompts of up to %d tokens and judgements of up to %d "
            "(max_prompt_tokens, max_new_tokens).",
            *(model, positions, *longest),
        )
    batch_size = OPTIONS["batch_size"].default
    if num_games:
        batch_size = min(1 << (num_games - 1).bit_length(), batch_size)
    sizes: dict[str, int] = dict(zip(OPEN, (*longest, batch_size), strict=True))
    return {name: sizes[name] if value is None else value for name, value in chosen.items()}


def num_positions(model: str) -> int:
    """Return the number of tokens that a model has positions for."""
    from jlrm.weights import hf_config, source

    return hf_config.read_config(source.model_files(model)).max_position_embeddings


def limits(
    positions: int, given: tuple[int | None, int | None], usual: tuple[int, int]
) -> tuple[int, int]:
    """Return the most tokens of a prompt and of a judgement; what is given stays."""
    prompt, new = given
    if new is None:
        new = min(usual[1], positions // 2 if prompt is None else max(positions - prompt, 1))
    return min(usual[0], max(positions - new, 1)) if prompt is None else prompt, new


def identity(backend: str, model: str, chosen: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """Return everything that shapes the responses of a judge, apart from what it is asked."""
    if backend == VERDICTS:
        return {"backend": backend}
    shaping = {
        name: value
        for name, value in chosen.items()
        if OPTIONS[name].is_shaping and not (name in ADDED and value == OPTIONS[name].default)
    }
    if "prompt" in shaping:
        shaping["prompt"] = prompting(shaping["prompt"]).identity
    if backend == JLRM:
        from jlrm.weights import source

        model = source.fingerprint(model)
    return {"backend": backend, "model": model, **shaping, "seed": seed}


def make(
    backend: str, model: str, chosen: Mapping[str, Any], seed: int, out: pathlib.Path | None
) -> Backend:
    """Load the model, or prepare to call it. out: where batches under way are kept."""
    if backend == HEURISTIC:
        return heuristics.judge(model)
    given = dict(chosen)
    scale = tuple(given.pop("scale"))
    if backend == JLRM:
        from jlrm.evaluation import scored
        from jlrm.judges import asking, local
        from jlrm.sampling import writer
        from jlrm.weights import source

        grid, stops = mesh(given.pop("mesh")), local.STOP if given.pop("stop") else {}
        own = ("prompt", "max_prompt_tokens", "compute_dtype", "apart")
        others = {name: given.pop(name) for name in own}
        if source.num_labels(model):
            size = given["batch_size"]
            judge = scored.make(model, scale=scale, batch_size=size, mesh=grid, **others)
            return asking.in_blocks(judge, size) if others["apart"] else judge
        decoding = writer.DecodingSettings(**given, seed=seed, stop_strings=stops)
        return local.make(model, scale=scale, decoding=decoding, mesh=grid, **others)
    from jlrm.judges import batch, openai

    variable, cache = given.pop("api_key_env"), given.pop("cache")
    prices, budget = given.pop("prices"), given.pop("budget")
    settings = openai.EndpointSettings(
        model=model,
        api_key=os.environ.get(variable),
        cache=pathlib.Path(cache).expanduser() if cache else None,
        prices=tuple(prices) if prices else None,
        budget=budget or None,
        batch=out / BATCHES if given.pop("batch") and out else None,
        **given,
        scale=scale,
        seed=seed,
    )
    return openai.Endpoint(settings) if settings.batch is None else batch.BatchEndpoint(settings)


def mesh(pairs: Sequence[str]) -> MeshConfig:
    """Return the mesh that pairs AXIS=N ask for.

    Raises:
      UsageError: another axis, or no number.
    """
    sizes: dict[str, int] = {}
    for pair in pairs:
        axis, _, size = pair.partition("=")
        if axis not in ("data", "fsdp", "tensor") or not re.fullmatch(r"-?\d+", size):
            raise UsageError(f"--mesh {pair}: wanted data=N, fsdp=N or tensor=N.")
        sizes[axis] = int(size)
    return MeshConfig(**sizes)


def only_model(url: str, key: str = "") -> str:
    """Return the name of an endpoint's model; `key` is what it wants to see, if anything.

    Raises:
      UsageError: no such server, or it serves several.
    """
    address = f"{url.rstrip('/')}/models"
    try:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        request = urllib.request.Request(address, headers=headers)
        with urllib.request.urlopen(request, timeout=30) as reply:
            names = [each["id"] for each in json.load(reply)["data"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"{address} names no model ({error}). Give its name, and the address as base_url."
        ) from None
    if len(names) != 1:
        raise UsageError(
            f"{url} serves {', '.join(names) or 'nothing'}: name one of them, and the address as "
            "base_url."
        )
    return names[0]
