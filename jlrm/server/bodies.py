"""The bodies of requests: JSON from anybody, read field by field into frozen forms.

A field that there is not, has another type or lies outside its range is refused by name, and so is
a setting that the server could not keep to.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jlrm.config import UsageError, nearest
from jlrm.evaluation.rubrics import Rubric, rubric
from jlrm.judgement.prompts import MOST_LISTED
from jlrm.serving.asked import ORDERS, Listed, Pair, Single, alone

MOST_VOTES = 16
MOST_DOCUMENTS = 16  # of a ranking: each is compared with each
MOST_PAIRS = 256  # of one request
MOST_STOPS = 4
FIELDS_OF_PAIR = {"question", "answer_1", "answer_2", "id", "reference"}
FIELDS_OF = {  # of the forms of /v1/judge, by the field that tells them
    "answer_1": FIELDS_OF_PAIR,
    "pairs": {"pairs"},
    "answer": {"question", "answer", "id", "reference"},
    "answers": {"question", "answers", "reference", "at_once"},
}
IGNORED = {  # of OpenAI's form: they say who asks, or how it is paid for
    *("user", "store", "metadata", "service_tier", "safety_identifier", "prompt_cache_key"),
    *("stream_options", "parallel_tool_calls"),
}
NEUTRAL: Mapping[str, Any] = {  # fields of OpenAI's form that must have the value of none
    "top_p": 1,
    "frequency_penalty": 0,
    "presence_penalty": 0,
    "logit_bias": {},
    "logprobs": False,
    "top_logprobs": 0,
    "tools": [],
    "tool_choice": "none",
    "response_format": {"type": "text"},
    "chat_template_kwargs": {"enable_thinking": True},
}


NEUTRAL_OF_TEXT: Mapping[str, Any] = {  # the same of a text
    **{name: NEUTRAL[name] for name in ("top_p", "frequency_penalty", "presence_penalty")},
    **{"logit_bias": {}, "logprobs": 0, "echo": False, "best_of": 1, "suffix": ""},
}


class UnknownModel(UsageError):
    """Another model is asked for than the one that is served."""


@dataclass(frozen=True)
class Drawing:
    """How judgements are drawn."""

    votes: int
    temperature: float
    max_new_tokens: int
    seed: int
    is_streamed: bool


@dataclass(frozen=True)
class JudgeBody:
    """Pairs to judge, answers to one question to be ranked, or one answer to be scored."""

    pairs: tuple[Pair, ...]
    is_one_pair: bool  # which is answered by itself, and not in a list
    single: Single | None
    listed: Listed | None
    orders: str
    drawing: Drawing
    at_once: bool = False  # one judgement of all answers of a ranking, and not of each pair


@dataclass(frozen=True)
class ChatBody:
    """A conversation to be continued, in OpenAI's form."""

    messages: tuple[tuple[str, str], ...]  # role and text
    stops: tuple[str, ...]
    has_usage: bool  # in the last event of a stream
    drawing: Drawing


@dataclass(frozen=True)
class RerankBody:
    """Documents to be ranked as answers to a query."""

    query: str
    documents: tuple[str, ...]
    top_n: int
    has_documents: bool  # in the reply
    drawing: Drawing
    at_once: bool = False  # as of `JudgeBody`


@dataclass(frozen=True)
class Defaults:
    """What a request gets that says nothing else, and the most that it may ask for."""

    model: str
    temperature: float
    votes: int
    max_new_tokens: int
    seed: int
    rubric: Rubric | None = None
    judging: str = "pairs"  # `data.judging` of its training


def parse(content: bytes) -> dict[str, Any]:
    """Return a body's object.

    Raises:
      UsageError: it is no JSON object.
    """
    try:
        body = json.loads(content)
    except (ValueError, RecursionError):
        raise UsageError("The body is no JSON.") from None
    if not isinstance(body, dict):
        raise UsageError(f"The body must be a JSON object, got {type(body).__name__}.")
    return body


def judge_body(body: Mapping[str, Any], defaults: Defaults) -> JudgeBody:
    """Read a body of /v1/judge: a pair, `pairs`, or a `question` with `answer` or `answers`.

    Raises:
      UsageError: what is wrong with it.
    """
    settings = {"model", "orders", "votes", "temperature", "max_new_tokens", "seed", "stream"}
    settings |= {"rubric", "expected_scores"}
    _refuse_unknown(body, settings.union(*FIELDS_OF.values()))
    orders = _one_of(body, "orders", ORDERS, "both")
    drawing = _drawing(body, defaults, "votes", ("max_new_tokens",))
    told = rubric(body.get("rubric")) or defaults.rubric, _flag(body, "expected_scores")
    _check_model(body, defaults)
    forms = [
        name for name in ("pairs", "answer", "answers", "answer_1") if body.get(name) is not None
    ]
    if len(forms) != 1:
        raise UsageError(
            "Wanted one of: question, answer_1 and answer_2; pairs, a list of these; question "
            "and answers, a list of texts; question and answer. "
            f"Got {', '.join(forms) or 'none of them'}."
        )
    for name in sorted(body.keys() - settings - FIELDS_OF[forms[0]]):
        if body[name] is not None:
            raise UsageError(f"{name} has no place beside {forms[0]}.")
    if forms == ["pairs"]:
        rows = _list(body, "pairs", 1, MOST_PAIRS)
        pairs = tuple(_pair(row, f"pairs[{i}]", told) for i, row in enumerate(rows))
        return JudgeBody(pairs, False, None, None, orders, drawing)
    if forms == ["answer"]:
        question, reference = _required(body, "question"), body.get("reference")
        single = Single(question, body["answer"], _identity(body, ""), reference, *told)
        return JudgeBody((), False, single, None, orders, drawing)
    if forms == ["answer_1"]:
        texts = {name: body[name] for name in FIELDS_OF_PAIR & body.keys()}
        return JudgeBody((_pair(texts, "", told),), True, None, None, orders, drawing)
    answers = _list(body, "answers", 2, MOST_DOCUMENTS)
    listed = Listed(_required(body, "question"), answers, body.get("reference"), *told)
    at_once = _at_once(body, defaults, defaults.judging == "lists")
    return JudgeBody((), False, None, listed, orders, drawing, at_once)


def chat_body(body: Mapping[str, Any], defaults: Defaults) -> ChatBody:
    """Read a body of /v1/chat/completions.

    Raises:
      UsageError: what is wrong with it.
    """
    _refuse_others(body, defaults, "messages", ("max_completion_tokens", "max_tokens"), NEUTRAL)
    messages = tuple(
        _message(each, f"messages[{i}]") for i, each in enumerate(_list(body, "messages", 1, 1000))
    )
    return _written(body, defaults, messages, ("max_completion_tokens", "max_tokens"))


def completion_body(body: Mapping[str, Any], defaults: Defaults) -> ChatBody:
    """Read a body of /v1/completions: one text, which is continued as it stands.

    Raises:
      UsageError: what is wrong with it.
    """
    _refuse_others(body, defaults, "prompt", ("max_tokens",), NEUTRAL_OF_TEXT)
    prompt = _required(body, "prompt")
    if isinstance(prompt, list) and len(prompt) == 1:
        (prompt,) = prompt
    if not isinstance(prompt, str) or not prompt:
        raise UsageError(f"prompt: wanted one text, got {prompt!r:.60}.")
    return _written(body, defaults, (("", prompt),), ("max_tokens",))


def _refuse_others(
    body: Mapping[str, Any],
    defaults: Defaults,
    asked: str,
    limits: Sequence[str],
    neutral: Mapping[str, Any],
) -> None:
    known = {"model", asked, "n", "temperature", "seed", "stream", "stop", *limits}
    _refuse_unknown(body, known | IGNORED | neutral.keys())
    _check_model(body, defaults)
    for name, value in neutral.items():
        if body.get(name) not in (None, value):
            raise UsageError(f"{name}={body[name]!r:.60} can't be had here: leave it out.")


def _written(
    body: Mapping[str, Any],
    defaults: Defaults,
    messages: tuple[tuple[str, str], ...],
    limits: Sequence[str],
) -> ChatBody:
    """Return how messages, or a text without a role, are to be continued."""
    stops = [] if body.get("stop") is None else body["stop"]
    stops = [stops] if isinstance(stops, str) else stops
    is_list = isinstance(stops, list) and all(isinstance(each, str) and each for each in stops)
    if not is_list or len(stops) > MOST_STOPS:
        raise UsageError(f"stop: wanted a text or at most {MOST_STOPS}, got {stops!r:.60}.")
    options = body.get("stream_options") or {}
    has_usage = isinstance(options, Mapping) and bool(options.get("include_usage"))
    return ChatBody(messages, tuple(stops), has_usage, _drawing(body, defaults, "n", limits))


def rerank_body(body: Mapping[str, Any], defaults: Defaults) -> RerankBody:
    """Read a body of /v1/rerank, in the form of Cohere and Jina.

    Raises:
      UsageError: what is wrong with it.
    """
    known = {"model", "query", "documents", "top_n", "return_documents", "max_tokens_per_doc"}
    _refuse_unknown(body, known | {"at_once"})
    _check_model(body, defaults)
    if body.get("max_tokens_per_doc") is not None:
        raise UsageError("max_tokens_per_doc can't be had here: no text is cut.")
    query = _required(body, "query")
    if not isinstance(query, str):
        raise UsageError(f"query: wanted a text, got {query!r:.60}.")
    documents = []
    for i, each in enumerate(_list(body, "documents", 1, MOST_DOCUMENTS)):
        text = each.get("text") if isinstance(each, Mapping) else each
        if not isinstance(text, str):
            raise UsageError(f"documents[{i}]: wanted a text or {{'text': ...}}, got {each!r:.60}.")
        documents.append(text)
    top_n = _whole(body, "top_n", len(documents), 1, 10**6)
    has_documents = _flag(body, "return_documents")
    drawing = Drawing(
        defaults.votes, defaults.temperature, defaults.max_new_tokens, defaults.seed, False
    )
    # A judge of lists compares each with each where one judgement can't hold so many.
    fits = defaults.judging == "lists" and len(documents) <= MOST_LISTED
    at_once = _at_once(body, defaults, fits)
    top_n = min(top_n, len(documents))
    return RerankBody(query, tuple(documents), top_n, has_documents, drawing, at_once)


def _at_once(body: Mapping[str, Any], defaults: Defaults, usual: bool) -> bool:
    at_once = _flag(body, "at_once", usual)
    if at_once and defaults.judging == "single":
        raise UsageError(alone(defaults.model))
    return at_once


def _drawing(
    body: Mapping[str, Any], defaults: Defaults, votes: str, limits: Sequence[str]
) -> Drawing:
    num = _whole(body, votes, defaults.votes if votes == "votes" else 1, 1, MOST_VOTES)
    temperature = _number(body, "temperature", defaults.temperature, 0, 10)
    if temperature == 0 and num > 1:
        raise UsageError(f"{votes}={num} at temperature 0 would be one text {num} times.")
    named = next((name for name in limits if body.get(name) is not None), limits[0])
    # In OpenAI's form it is a bound, and a text that meets ours ends by "length".
    most = defaults.max_new_tokens if named == "max_new_tokens" else 10**9
    most = min(_whole(body, named, defaults.max_new_tokens, 1, most), defaults.max_new_tokens)
    seed = _whole(body, "seed", defaults.seed, -(2**63), 2**63 - 1)
    return Drawing(num, temperature, most, seed % 2**31, _flag(body, "stream"))


def _pair(row: Any, where: str, told: tuple[Rubric | None, bool]) -> Pair:
    if not isinstance(row, Mapping):
        raise UsageError(f"{where}: wanted an object, got {row!r:.60}.")
    _refuse_unknown(row, FIELDS_OF_PAIR, where)
    question, first, second = (
        _required(row, name, where) for name in ("question", "answer_1", "answer_2")
    )
    return Pair(question, first, second, _identity(row, where), row.get("reference"), *told)


def _identity(row: Mapping[str, Any], where: str) -> str:
    identity = "" if row.get("id") is None else row["id"]
    if not isinstance(identity, str | int) or isinstance(identity, bool):
        raise UsageError(f"{where}{'.' if where else ''}id: wanted a text, got {identity!r:.60}.")
    return str(identity)


def _message(value: Any, where: str) -> tuple[str, str]:
    """Return the role and the text of a message, whose content may be parts of text."""
    if not isinstance(value, Mapping) or not isinstance(value.get("role"), str):
        raise UsageError(f"{where}: wanted {{'role': ..., 'content': ...}}, got {value!r:.60}.")
    role, content = value["role"], value.get("content")
    content = "" if content is None and role == "assistant" else content
    if isinstance(content, list):
        texts = [each.get("text") if isinstance(each, Mapping) else None for each in content]
        if not all(isinstance(each, str) for each in texts):
            raise UsageError(f"{where}: only parts of type text can be read.")
        content = "".join(map(str, texts))
    if role not in ("system", "developer", "user", "assistant") or not isinstance(content, str):
        raise UsageError(
            f"{where}: wanted a role of system, user or assistant and a text, got {value!r:.60}."
        )
    return "system" if role == "developer" else role, content


def _refuse_unknown(body: Mapping[str, Any], known: set[str], where: str = "") -> None:
    if unknown := sorted(body.keys() - known):
        prefix = f"{where}." if where else ""
        name = repr(unknown[0])[1:60].strip("'")
        raise UsageError(f"No field '{prefix}{name}'. {nearest(name, sorted(known))}")


def _check_model(body: Mapping[str, Any], defaults: Defaults) -> None:
    model = body.get("model")
    if model not in (None, "", "default", defaults.model):
        raise UnknownModel(
            f"model={model!r:.80} is not served here: leave it out, or take '{defaults.model}'."
        )


def _required(body: Mapping[str, Any], name: str, where: str = "") -> Any:
    if body.get(name) is None:
        raise UsageError(f"{where}{'.' if where else ''}{name} is missing.")
    return body[name]


def _list(body: Mapping[str, Any], name: str, least: int, most: int) -> list[Any]:
    value = body.get(name)
    if not isinstance(value, list) or not least <= len(value) <= most:
        got = f"{len(value)}" if isinstance(value, list) else f"{value!r:.60}"
        raise UsageError(f"{name}: wanted a list of {least} to {most}, got {got}.")
    return value


def _whole(body: Mapping[str, Any], name: str, default: int, least: int, most: int) -> int:
    value = body.get(name)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise UsageError(
            f"{name}: wanted a whole number from {least} to {most}, got {value!r:.60}."
        )
    return value


def _number(body: Mapping[str, Any], name: str, default: float, least: float, most: float) -> float:
    value = body.get(name)
    value = default if value is None else value
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not least <= value <= most:  # NaN is neither
        raise UsageError(f"{name}: wanted a number from {least} to {most}, got {value!r:.60}.")
    return float(value)


def _flag(body: Mapping[str, Any], name: str, default: bool = False) -> bool:
    value = body.get(name)
    if value not in (None, True, False):
        raise UsageError(f"{name}: wanted true or false, got {value!r:.60}.")
    return default if value is None else bool(value)


def _one_of(body: Mapping[str, Any], name: str, values: Sequence[str], default: str) -> str:
    value = body.get(name)
    value = default if value is None else value
    if value not in values:
        raise UsageError(f"{name}: wanted one of {', '.join(values)}, got {value!r:.60}.")
    return value
