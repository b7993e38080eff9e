"""What a server means when it does not answer: whose fault it is, and how long to wait.

Servers word the same thing in many ways. What is known of them stands here as data: codes, words of
messages, names of headers. The HTTP status decides about all other errors: the request is sent
again, or its game is lost.
"""

from __future__ import annotations

import contextlib
import datetime
import email.utils
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from jlrm.config import RunError, UsageError

LONGEST_PAUSE = 600.0  # seconds; a server that asks for more has a limit per day
READ = 20_000  # characters of a body in which a wait or a field's name is looked for
QUOTED = 400  # characters in which a key or a model is looked for
LIMITED = 429

_OF_ONE_GAME = (400, 413, 422)  # most often a prompt that is too long
_MAY_PASS = (408, 409, 424, 425, LIMITED, 498, 499)  # and all from 500 on
_IS_LIMIT = (LIMITED, 498)  # Groq's word for a tier without room
_OF_THE_SETTINGS = {"unsupported_parameter", "unsupported_value", "model_not_found"}
_NEVER_PASSES = {"insufficient_quota", "billing_hard_limit_reached"}
_OF_THE_KEY = re.compile(r"api[ _-]?key|unauthori[sz]ed|authenticat|credentials", re.IGNORECASE)
_OF_THE_MODEL = re.compile(
    r"(invalid|unknown|no such|unsupported) model|not a valid model"
    r"|\bmodel\b.{0,60}(not found|not exist|not available)",
    re.IGNORECASE,
)
_OF_THE_PROMPT = ("messages", "prompt", "model")  # fields that nobody can leave out

_FILTERS = {
    *("content_filter", "content_policy_violation", "responsibleaipolicyviolation"),
    *("data_inspection_failed", "datainspectionfailed", "invalid_prompt", "moderation_blocked"),
    *("content_filtered", "content_filter_error", "content_blocked", "prohibited_content"),
}
_FILTERED = re.compile(
    r"content[ _](management |moderation |safety )?(policy|filter)|usage polic"
    r"|safety (system|polic)|flagged|inappropriate content|ResponsibleAI|requires moderation"
    r"|blocked.{0,40}(safety|prohibited|moderat|guardrail)|prohibited[ _]content|unsafe content"
    r"|content exists risk|considered high risk|sensitive (content|word|information)|敏感",
    re.IGNORECASE,
)
_NO_SYSTEM = re.compile(
    r"system (role|message|prompt|instruction)|system['\"] role|\brole.{0,60}(system|alternate)"
    r"|only user,? (and )?assistant|developer instruction|['\"`]system['\"`]"
    r"|(first message|start|begin).{0,40}\buser",
    re.IGNORECASE | re.DOTALL,
)
_UNWANTED = re.compile(
    r"unsupported|not support|unrecogni[sz]ed|unknown|extra[_ ]|not permitted|unexpected"
    r"|not allowed|forbidden|invalid (argument|parameter|field)|find field|deprecated"
    r"|incompatible|only the default|only \S+ is allowed|must be (strictly )?positive"
    r"|cannot (both )?be (specified|used|set)",
    re.IGNORECASE,
)
_UNITS = {"ms": 0.001, "milli": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_PART = (
    r"(\d+(?:\.\d+)?)\s*(ms|milli|s|m|h|d)"
    r"(?:seconds?|econds?|ecs?|inutes?|ins?|ours?|rs?|ays?)?(?![a-z])"
)
_TITLE = re.compile("<title[^>]*>([^<]*)", re.IGNORECASE)
_DURATION = re.compile(rf"\s*(?:{_PART}\s*)+", re.IGNORECASE)
_TOLD = re.compile(rf"(?:again|retry|wait|reset)[^\d\n]{{0,40}}((?:{_PART}\s*)+)", re.IGNORECASE)


_RETRY_AFTER = re.compile(
    r"\"retry[_-]?after(?:[_-]?(?:seconds?|(ms)))?\"\s*:\s*\"?(\d{1,9}(?:\.\d{1,9})?)[\"\s,}]",
    re.IGNORECASE,
)


class Received(NamedTuple):
    """What came back for a request."""

    status: int  # of HTTP
    headers: Mapping[str, str]  # names in lower case
    content: bytes


class Passing(Exception):
    """A failure that may pass. `wait`: seconds that the server asked for."""

    def __init__(
        self,
        reason: str,
        *,
        wait: float | None = None,
        is_unreachable: bool = False,
        is_limit: bool = False,  # too many requests; this one has done no wrong
    ) -> None:
        super().__init__(reason)
        self.wait, self.is_unreachable, self.is_limit = wait, is_unreachable, is_limit


class Declined(Exception):
    """The server does not answer this game, but may answer others. `is_content`: for its texts."""

    def __init__(self, reason: str, *, is_content: bool = False) -> None:
        super().__init__(reason)
        self.is_content = is_content


class Complaint(NamedTuple):
    """A server's error. `status`: of HTTP, where the body names one; 0 elsewhere."""

    message: str
    codes: frozenset[str] = frozenset()  # its code, type and inner code, in lower case
    field: str = ""  # of the request, that it names
    kind: str = ""  # of a fault of a field, as validators call it
    status: int = 0


def read(body: bytes) -> Complaint:
    """Read an error in whatever form it has."""
    text = body.decode(errors="replace")
    try:
        content = json.loads(body)
    except (ValueError, RecursionError):
        title = _TITLE.search(text[:READ])
        return Complaint(f"a web page, '{title[1].strip()}'" if title else text)
    return of_object(content, text)


def of_object(content: Any, text: str) -> Complaint:
    """Return the error that a JSON value holds; text: what is said where none is found."""
    if isinstance(content, list) and content:  # Gemini's come in a list
        content = content[0]
    error = content.get("error") or content if isinstance(content, dict) else content
    if not isinstance(error, dict):
        return Complaint(error if isinstance(error, str) else text)
    message = error.get("message") or error.get("detail")
    inner = error.get("innererror")
    codes = [error.get("code"), error.get("type"), isinstance(inner, dict) and inner.get("code")]
    known = frozenset(code.lower() for code in codes if code and isinstance(code, str))
    field, kind = next(_faults(error), (error.get("param"), ""))
    return Complaint(
        message if isinstance(message, str) else text,
        known,
        _field(field),
        kind,
        _status(error, known) if isinstance(content, dict) and content.get("error") else 0,
    )


def _field(place: Any) -> str:
    """Return the field in "seed", "body.seed" or "messages[0].role"."""
    names = re.split(r"[.\[]", place) if isinstance(place, str) else [""]
    return next((name for name in names if name != "body"), "")


def _status(error: Mapping[str, Any], codes: frozenset[str]) -> int:
    code = str(error.get("code"))
    if re.fullmatch("[45][0-9][0-9]", code):
        return int(code)
    return 400 if codes & _FILTERS else 0


def _faults(error: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield (field, kind) of what a validator found, `{"detail": [{"type", "loc", "msg"}]}`."""
    message = error.get("message")
    for holder in (error, message if isinstance(message, dict) else {}):
        faults = holder.get("detail")
        for fault in faults if isinstance(faults, list) else ():
            place = fault.get("loc") if isinstance(fault, dict) else None
            names = [name for name in place or () if isinstance(name, str) and name != "body"]
            if names:
                yield names[0], str(fault.get("type", ""))


def failure(
    received: Received,
    sent: Mapping[str, Any],
    quote: Callable[[str], str],
    url: str,
    is_first: bool,
) -> Exception:
    """Return what a status other than 200 means.

    sent: the body of the request. quote: makes a server's text fit for a log. is_first: the server
    has answered no such request yet, so that the settings may be what it does not like.
    """
    status, complaint = received.status, read(received.content)
    text = f"HTTP {status}: {quote(complaint.message)}"
    if is_filtered(status, complaint):
        return Declined(text, is_content=True)
    if advice := advised(status, complaint, sent):
        text = f"{text.rstrip('.')}. {advice}"
        return UsageError(f"{url} answered {text}") if is_first else Declined(text)
    if status == LIMITED and "too large" in complaint.message.lower():
        return Declined(text)  # larger than all that a minute allows: no wait helps
    if status >= 500 or (status in _MAY_PASS and not complaint.codes & _NEVER_PASSES):
        wait = wait_told(received, datetime.datetime.now(datetime.UTC))
        if wait is not None and wait > LONGEST_PAUSE:
            return RunError(
                f"{url} answered {text}. It asks to wait for {wait / 60:.0f} minutes: run"
                " this again then, responses so far are kept."
            )
        return Passing(text, wait=wait, is_limit=status in _IS_LIMIT)
    is_of_game = status in _OF_ONE_GAME and not complaint.codes & _OF_THE_SETTINGS
    if is_of_game and not (is_first and _suspects(status, complaint)):
        return Declined(text)
    if target := received.headers.get("location"):
        text += f" It points to {quote(target)}."
    suspects = _suspects(status, complaint) or "the model, base_url and settings"
    return UsageError(f"{url} answered {text.rstrip('. ')}. Check {suspects}.")


def _suspects(status: int, complaint: Complaint) -> str:
    """Return what a server most likely does not like, if it is nothing of one game."""
    text = complaint.message[:QUOTED]  # behind it, servers echo what they were sent
    if status == 402 or complaint.codes & _NEVER_PASSES:
        return "the account's balance"
    if status in (401, 403) or _OF_THE_KEY.search(text):
        return "the API key"
    return "the model" if _OF_THE_MODEL.search(text) else ""


def is_filtered(status: int, complaint: Complaint) -> bool:
    """Return whether a server refuses what stands in the prompt."""
    if complaint.codes & _FILTERS:
        return status >= 400 and status != LIMITED
    return status in (400, 403, 422, 451) and bool(_FILTERED.search(complaint.message))


def is_about_system(status: int, complaint: Complaint) -> bool:
    """Return whether a server, or its chat template, knows no system role."""
    return status in (400, 422, 500, 501) and bool(_NO_SYSTEM.search(complaint.message[:READ]))


def advised(status: int, complaint: Complaint, sent: Mapping[str, Any]) -> str:
    """Return the flag that helps where a server refuses a part of the request; else ""."""
    roles = [each["role"] for each in sent.get("messages", ())]
    if "system" in roles and is_about_system(status, complaint):
        return "--system user puts the system text before the user's."
    if status in (400, 422) and (name := refused_field(complaint, sent)):
        flags = f"--request {name}=null leaves it out"
        if name == "max_tokens" and "max_completion_tokens" in complaint.message:
            flags = "--request max_tokens=null max_completion_tokens=N renames it"
        return f"It refuses the field '{name}': {flags}."
    return ""


def refused_field(complaint: Complaint, sent: Mapping[str, Any]) -> str:
    """Return the name of a field of ours that a server does not want; else ""."""
    text = complaint.message[:READ]
    if not _UNWANTED.search(f"{complaint.kind} {' '.join(complaint.codes)} {text}"):
        return ""
    ours = sorted(name for name in sent if name not in _OF_THE_PROMPT)
    if complaint.field in sent:
        return complaint.field if complaint.field in ours else ""
    return next((n for n in ours if re.search(rf"(?<![\w.]){re.escape(n)}(?!\w)", text)), "")


# -------------------------------------------------------------------------------------- waits


def wait_told(received: Received, now: datetime.datetime) -> float | None:
    """Return the seconds that a server asks to wait; None where it does not say.

    The most exact one counts: `retry-after-ms`, `Retry-After`, the text ("try again in 1.5s"), a
    number in the body (`retry_after`), the `x-ratelimit-reset-*` of what is used up, the least of
    the others.
    """
    headers = received.headers
    told = _TOLD.search(_beginning(received))
    resets = dict(_resets(headers, now))
    used_up = [wait for kind, wait in resets.items() if _is_used_up(headers, kind)]
    candidates = (
        _milliseconds(headers.get("retry-after-ms")),
        moment(headers.get("retry-after"), now),
        duration(told[1]) if told else None,
        _in_body(received),
        max(used_up, default=None),
        min(resets.values(), default=None),
    )
    return next((wait for wait in candidates if wait), None)


def _beginning(received: Received) -> str:
    return received.content[: 4 * READ].decode(errors="replace")[:READ]


def _in_body(received: Received) -> float | None:
    """Return the seconds in a field such as `"retry_after": 12`."""
    if not (match := _RETRY_AFTER.search(_beginning(received))):
        return None
    return float(match[2]) * (0.001 if match[1] else 1.0)


def duration(text: str) -> float | None:
    """Return the seconds of "1s", "6m0s", "1h 2 minutes", "500ms"; None of other texts."""
    if not _DURATION.fullmatch(text):
        return None
    parts = re.findall(_PART, text, re.IGNORECASE)
    seconds = math.fsum(float(number) * _UNITS[unit.lower()] for number, unit in parts)
    return seconds if math.isfinite(seconds) else None


def moment(text: str | None, now: datetime.datetime) -> float | None:
    """Return the seconds until a time in a header, at least 0; None where it is none.

    A duration, a number of seconds, a time in seconds or milliseconds since 1970, an HTTP date or
    an ISO one.
    """
    if not text:
        return None
    if (told := duration(text)) is not None:
        return told
    with contextlib.suppress(ValueError):
        number = float(text)
        if not math.isfinite(number):
            return None
        for since_1970, unit in ((1e11, 1e-3), (1e9, 1.0)):
            if number > since_1970:
                number = number * unit - now.timestamp()
                break
        return max(number, 0.0)
    for parse in (email.utils.parsedate_to_datetime, datetime.datetime.fromisoformat):
        with contextlib.suppress(ValueError, OverflowError):
            date = parse(text)
            return max((date.replace(tzinfo=date.tzinfo or datetime.UTC) - now).total_seconds(), 0)
    return None


def _milliseconds(text: str | None) -> float | None:
    with contextlib.suppress(ValueError):
        if text and math.isfinite(number := float(text)):
            return max(number / 1000.0, 0.0)
    return None


def _resets(headers: Mapping[str, str], now: datetime.datetime) -> Iterator[tuple[str, float]]:
    """Yield (kind of limit, seconds) of every header such as `x-ratelimit-reset-tokens`."""
    for name, value in headers.items():
        is_reset = "ratelimit" in name.replace("-", "") and "reset" in name
        if is_reset and (wait := moment(value, now)) is not None:
            yield name, wait


def _is_used_up(headers: Mapping[str, str], reset: str) -> bool:
    return headers.get(reset.replace("reset", "remaining"), "").strip() in ("0", "0.0")
