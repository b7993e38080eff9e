"""What is asked of an OpenAI-compatible server: its address, the fields of a request, the prompt.

Prompts. `jlrm` goes to /chat/completions as a system and a user message, or as one user message
where a model has no system role. The raw templates (`prompts.PAIR_TEMPLATES`) go to /completions
byte for byte: they are text with ChatML's control tokens in it, for servers of the judges that were
trained on them, and any other model would read the tokens as text. The server turns control tokens
into ids wherever they stand, in the answers to be judged too; `neutral` breaks those of Qwen's
tokenizers there, and the tags of judgements.
"""

from __future__ import annotations

import hashlib
import json
import math
import pathlib
import urllib.parse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from jlrm.config import UsageError
from jlrm.evaluation.games import Game
from jlrm.evaluation.prompting import Prompting, prompting
from jlrm.judgement import prompts

OVERHEAD = 256  # tokens that a chat template may add to a prompt
SYSTEM = ("auto", "own", "user")
LIMITS = ("max_tokens", "max_completion_tokens")  # names of the limit of generated tokens
VERSION = "api-version"  # Azure's, in the query of an address
# Fields that are what is asked, or without which a reply could not be read.
FIXED = ("messages", "prompt", "model", "stream", "n")

NO_PROBABILITIES = (
    "Expected scores need the probabilities of all tokens, and an endpoint tells those of a few "
    "(logprobs, top_logprobs) or none: name the model itself, a run or a directory."
)

# The added tokens of Qwen2.5 and Qwen3, and the tags that our parser reads.
CONTROL_TOKENS = frozenset(
    f"<|{name}|>"
    for name in (
        *("endoftext", "im_start", "im_end", "object_ref_start", "object_ref_end", "box_start"),
        *("box_end", "quad_start", "quad_end", "vision_start", "vision_end", "vision_pad"),
        *("image_pad", "video_pad", "fim_prefix", "fim_middle", "fim_suffix", "fim_pad"),
        *("repo_name", "file_sep"),
    )
) | {
    *("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"),
    *prompts.THINK_TAGS,
}


class Template(NamedTuple):
    """A prompt, and how the texts of others are written into it."""

    prompting: Prompting
    quote: Callable[[str], str]

    @classmethod
    def of(cls, name: str, scale: tuple[int, int], neutral: bool) -> Template:
        """Return the prompt of a name, or of a file. Raises UsageError for neither."""
        quote = partial(prompts.quote, name=name, control_tokens=CONTROL_TOKENS)
        if not neutral:
            quote = partial(prompts.neutralise, control_tokens=())
        return cls(prompting(name, scale), quote)

    def check(self, games: Sequence[Game]) -> None:
        """Refuse games that can't be asked about, before anything is paid for.

        Raises:
          UsageError: if so.
        """
        for game in games:
            self.prompting.text(game)
            if game.item.is_expected:
                raise UsageError(NO_PROBABILITIES)

    def fill(self, game: Game, is_apart: bool = True) -> dict[str, Any]:
        """Return the part of a request's body that holds the prompt.

        is_apart: the system text is a message of its own; else it begins the user's.
        """
        system, template = self.prompting.text(game)
        text = self.prompting.fill(template, game, self.quote)
        if system is None:
            return {"prompt": text}
        roles = {"system": system, "user": text} if system else {"user": text}
        if system and not is_apart:
            roles = {"user": f"{system}\n\n{text}"}
        return {"messages": [{"role": role, "content": text} for role, text in roles.items()]}


@dataclass(frozen=True, kw_only=True)
class EndpointSettings:
    """What is asked of a server, and how.

    Raises:
      UsageError: a bad address, key, prompt or number.
    """

    model: str
    base_url: str
    api_key: str | None
    prompt: str
    scale: tuple[int, int]
    max_new_tokens: int
    temperature: float
    top_p: float
    votes: int
    system: str  # of SYSTEM: auto begins as own, and turns to user where there is no system role
    request: Mapping[str, Any]  # more fields of a request; None leaves one of ours out
    concurrency: int
    requests_per_minute: float  # 0: as many as there are
    timeout: float  # seconds for a whole reply
    max_retries: int
    cache: pathlib.Path | None
    prices: tuple[float, float] | None  # USD per million prompt and generated tokens
    # USD in the life of this process, never exceeded; games without room are unjudged.
    budget: float | None
    seed: int
    neutral: bool  # control tokens inside the texts to be judged are broken
    batch: pathlib.Path | None  # file of the batches under way; None: requests one by one

    def __post_init__(self) -> None:
        if not (self.key.isascii() and self.key.isprintable()) or " " in self.key:
            raise UsageError("The API key holds characters that no HTTP header can carry.")
        for name in ("votes", "concurrency", "max_new_tokens"):
            if (number := getattr(self, name)) < 1:
                raise UsageError(f"{name}={number} is too small: at least 1.")
        if not (0 < self.timeout < math.inf and self.max_retries >= 0):
            raise UsageError(
                f"timeout={self.timeout}, max_retries={self.max_retries}: wanted a time and a"
                " count."
            )
        for name in ("temperature", "top_p", "requests_per_minute"):
            if not 0 <= (number := getattr(self, name)) < math.inf:
                raise UsageError(f"{name}={number}: wanted a finite number, at least 0.")
        if self.system not in SYSTEM:
            raise UsageError(f"system={self.system}: wanted one of {', '.join(SYSTEM)}.")
        if self.is_raw and self.system != "auto":
            raise UsageError(
                f"system={self.system} has no effect: the prompt {self.prompt} is one text."
            )
        _check_money(self)

    @property
    def key(self) -> str:
        """The API key without white space around it; empty: none."""
        return (self.api_key or "").strip()

    @property
    def is_raw(self) -> bool:
        """Whether the prompt is one text, without a chat template."""
        return self.prompt in prompts.PAIR_TEMPLATES

    @property
    def path(self) -> str:
        """Where requests go, behind the base address."""
        return "/completions" if self.is_raw else "/chat/completions"

    @property
    def url(self) -> str:
        """Where requests go."""
        return self.address(self.path)

    @property
    def is_azure(self) -> bool:
        """Whether the address names a version, as Azure's do."""
        return bool(urllib.parse.urlsplit(self.base_url.strip()).query)

    def address(self, path: str) -> str:
        """Return the address of something on the server; the query stays behind the path."""
        parts = _checked_address(self.base_url)
        return parts._replace(path=parts.path.rstrip("/") + path).geturl()

    def fields(self) -> dict[str, Any]:
        """Return the fields that all requests share, but for those that --request changes."""
        fields: dict[str, Any] = {
            "model": self.model,
            "temperature": self.temperature,
            "max_tokens": self.max_new_tokens,
        }
        if self.top_p != 1.0:  # some models refuse it beside a temperature
            fields["top_p"] = self.top_p
        if self.is_raw:
            fields["stop"] = ["<|im_end|>"]  # a base model's own end token is another
        return fields

    def body(self, template: Template, game: Game, vote: int, is_apart: bool) -> dict[str, Any]:
        """Return the request of a vote."""
        lot = hashlib.sha256(f"{self.seed}:{game.id}:{vote}".encode(errors="surrogatepass"))
        seed = int.from_bytes(lot.digest()[:4]) >> 1
        fields = {**self.fields(), **template.fill(game, is_apart), "seed": seed, **self.request}
        return {name: value for name, value in fields.items() if value is not None}

    def most_tokens(self, body: Mapping[str, Any]) -> tuple[int, int]:
        """Return the most tokens that a request can use: of the prompt, and generated."""
        text = body.get("prompt") or "".join(each["content"] for each in body["messages"])
        # No byte-level tokenizer makes more tokens than there are bytes.
        added = len(json.dumps(dict(self.request)))
        limit = next((n for name in LIMITS if isinstance(n := body.get(name), int)), 0)
        return len(text.encode(errors="replace")) + added + OVERHEAD, limit


def parsed_fields(texts: Sequence[str]) -> dict[str, Any]:
    """Return fields of a request from texts such as `seed=null` or `top_k=5`.

    Raises:
      UsageError: no KEY=JSON, a key twice, or one that is not for this flag.
    """
    fields: dict[str, Any] = {}
    for text in texts:
        key, separator, value = text.partition("=")
        try:
            if not separator or not key:
                raise ValueError
            parsed = json.loads(value)
            json.dumps(parsed, ensure_ascii=False, allow_nan=False).encode()  # as it will be sent
        except (ValueError, RecursionError):
            raise UsageError(
                f"--request {text}: wanted KEY=JSON, e.g. seed=null, top_k=5 or"
                " 'reasoning_effort=\"low\"' (text in double quotes)."
            ) from None
        if key in FIXED:
            raise UsageError(f"--request {text}: '{key}' is not for this flag to change.")
        if key in fields:
            raise UsageError(f"--request names '{key}' twice.")
        fields[key] = parsed
    return fields


def _check_money(settings: EndpointSettings) -> None:
    prices, budget = settings.prices, settings.budget
    for price in prices or ():
        if not 0 <= price < math.inf:
            raise UsageError(f"prices={price:g}: wanted dollars per million tokens, at least 0.")
    if budget is None and prices is None:
        return
    if prices is None:
        raise UsageError("A budget needs prices: USD per million prompt and generated tokens.")
    if budget is not None and not 0 <= budget < math.inf:
        raise UsageError(f"budget={budget:g}: wanted dollars, at least 0.")
    fields = {**settings.fields(), **settings.request}
    limit = next((fields[name] for name in LIMITS if fields.get(name) is not None), None)
    if not isinstance(limit, int) or isinstance(limit, bool) or limit < 1:
        raise UsageError(
            "Prices need a limit of tokens, or a reply could cost anything: --max-new-tokens N, or"
            " --request max_completion_tokens=N."
        )


def _checked_address(base_url: str) -> urllib.parse.SplitResult:
    try:
        parts = urllib.parse.urlsplit(base_url.strip())
        is_address = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        query = urllib.parse.parse_qsl(parts.query, keep_blank_values=True)
    except ValueError:  # a port that is no number
        is_address, query = False, []
    if not is_address:
        raise UsageError("base_url is no address such as http://localhost:8000/v1.")
    if parts.path.rstrip("/").endswith("/completions"):
        raise UsageError("base_url is what stands before /chat/completions, or /completions.")
    if parts.username or parts.password or parts.fragment or {k for k, _ in query} - {VERSION}:
        # Not quoted: it may be a secret, and would be written to every log.
        raise UsageError(
            "base_url must hold no user, password or query, but for ?api-version=. Give the key as"
            " a key."
        )
    return parts
