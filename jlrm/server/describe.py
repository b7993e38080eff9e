"""The routes described: as OpenAPI for programs, and as a page for people."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping
from typing import Any

from jlrm.judgement.prompts import MOST_LISTED
from jlrm.server.bodies import MOST_DOCUMENTS, MOST_PAIRS, MOST_VOTES, Defaults
from jlrm.serving.asked import ORDERS

TEXT = {"type": "string"}
NUMBER = {"type": "number"}
FLAG = {"type": "boolean"}
CONVERSATION = {
    "oneOf": [TEXT, {"type": "array", "items": {"$ref": "#/components/schemas/Message"}}],
    "description": "a text, or a list of messages",
}
PAIR = {
    "question": CONVERSATION,
    "answer_1": CONVERSATION,
    "answer_2": CONVERSATION,
    "id": {**TEXT, "description": "comes back with the verdict"},
    "reference": {**CONVERSATION, "description": "an answer that the judge is shown as right"},
}
OPTIONAL_TEXT, OPTIONAL_WHOLE = {"type": ["string", "null"]}, {"type": ["integer", "null"]}
JUDGED_PAIR = {
    "winner": {**OPTIONAL_WHOLE, "description": "1 or 2, 0 a tie, null no verdict"},
    "scores": {"type": ["array", "null"], "items": NUMBER},
    "confidence": {
        "type": ["number", "null"],
        "description": "probability that the winner is better",
    },
    "is_consistent": {"type": ["boolean", "null"]},
    "reason": TEXT,
    "status": {**TEXT, "description": "ok, or why there is no verdict"},
    "games": {"type": "array", "items": {"type": "object"}},
    "num_tokens": OPTIONAL_WHOLE,
    "id": TEXT,
    "error": OPTIONAL_TEXT,
    "is_calibrated": FLAG,
    "criteria": {"type": "object", "description": "with a rubric: the scores by criterion"},
    "expected_scores": {"type": "array", "items": NUMBER, "description": "where wanted"},
    "model": TEXT,
    "usage": {"type": "object"},
}
SCORED_ANSWER = {
    "score": {"type": ["number", "null"], "description": "null where no vote gives one"},
    "texts": {"type": "array", "items": TEXT, "description": "what the judge wrote, by vote"},
    "expected_score": {"type": ["number", "null"], "description": "where wanted"},
    **{
        name: JUDGED_PAIR[name]
        for name in ("reason", "status", "num_tokens", "id", "error", "criteria", "model", "usage")
    },
}
RESULTS = {
    "results": {"type": "array", "items": {"$ref": "#/components/schemas/JudgedPair"}},
    "model": TEXT,
    "usage": {"type": "object"},
}
NUMBERS = {"type": "array", "items": NUMBER}
RANKING = {
    "order": {
        "type": "array",
        "items": {"type": "integer"},
        "description": "numbers of the answers, counted from 1, the best first",
    },
    "strengths": {**NUMBERS, "description": "of each answer, by its pairs; none where at once"},
    "intervals": {"type": "array", "items": NUMBERS},
    "wins": NUMBERS,
    "pairs": {"type": "array", "items": {"$ref": "#/components/schemas/JudgedPair"}},
    "scores": {
        "type": "array",
        "items": {"type": ["number", "null"]},
        "description": "where at once, or each alone: the mean of each answer",
    },
    "judgements": {
        "type": "array",
        "items": {"type": "object"},
        "description": "where at once, or each alone: what was said of all answers",
    },
    "expected_scores": {
        "type": "array",
        "items": {"type": ["number", "null"]},
        "description": "where wanted, at once or each alone; they part answers of equal scores",
    },
    "model": TEXT,
    "usage": {"type": "object"},
}
ERROR = {"message": TEXT, "type": TEXT, "code": OPTIONAL_TEXT}
STATUSES = {
    "400": "the body is wrong; the message names the field",
    "401": "a key is wanted",
    "404": "another model is asked for than the one that is served",
    "408": "the body did not come in time",
    "413": "the body is too large",
    "429": "too many requests wait; Retry-After says for how long",
    "503": "the server is stopping, or its engine has failed",
}


def openapi(defaults: Defaults) -> dict[str, Any]:
    """Return the description of the routes in the form of OpenAPI 3.1."""
    return {
        "openapi": "3.1.0",
        "info": {"title": f"jlrm: {defaults.model}", "version": "1"},
        "paths": {
            "/v1/judge": _post(
                "Judge pairs, score an answer, or rank answers",
                "JudgeRequest",
                *("JudgedPair", "Results", "ScoredAnswer", "Ranking"),
            ),
            "/v1/chat/completions": _post("Continue a conversation", "ChatRequest"),
            "/v1/completions": _post("Continue a text", "CompletionRequest"),
            "/v1/rerank": _post("Rank documents as answers to a query", "RerankRequest"),
            "/v1/models": _get("The model that is served"),
            "/healthz": _get("Whether judgements can be had"),
            "/metrics": _get("Metrics, in the text form of Prometheus"),
        },
        "components": {
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
            "schemas": _schemas(defaults),
        },
        "security": [{}, {"key": []}],
    }


def page(defaults: Defaults, address: str) -> str:
    """Return the description as a page of HTML; address: where the page was asked for."""
    described, schemas = openapi(defaults), _schemas(defaults)
    sections = []
    for path, methods in described["paths"].items():
        for method, about in methods.items():
            heading = f"<h2><code>{method.upper()} {path}</code></h2><p>{about['summary']}.</p>"
            body = about.get("requestBody", {}).get("content", {}).get("application/json", {})
            name = body.get("schema", {}).get("$ref", "").rpartition("/")[2]
            rows = [
                f"<tr><th scope='row'><code>{field}</code></th>"
                f"<td>{html.escape(_said(of))}</td></tr>"
                for field, of in schemas.get(name, {}).get("properties", {}).items()
            ]
            sections.append(heading + (f"<table>{''.join(rows)}</table>" if rows else ""))
    errors = "".join(
        f"<tr><th scope='row'>{status}</th><td>{what}</td></tr>"
        for status, what in STATUSES.items()
    )
    question = {"question": "How many legs has a spider?"}
    pair = json.dumps(question | {"answer_1": "Eight.", "answer_2": "Six."})
    listed = json.dumps(question | {"answers": ["Six.", "Eight.", "Ten."], "at_once": True})
    return (
        "<!doctype html><html lang='en'><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width'>"
        f"<title>{html.escape(described['info']['title'])}</title>"
        "<link rel='stylesheet' href='/page.css'><main><h1>Routes</h1>"
        "<p>The same for programs: <a href='/openapi.json'>openapi.json</a>. "
        "A first request:</p>"
        f"<pre>curl -s {html.escape(address)}/v1/judge -H 'Content-Type: application/json' \\\n"
        f"  -d '{html.escape(pair)}'</pre>"
        f"<p>A ranking by one judgement of all answers, in place of one of each pair:</p>"
        f"<pre>  -d '{html.escape(listed)}'</pre>"
        f"{''.join(sections)}<h2>Errors</h2><table>{errors}</table></main></html>"
    )


def _said(field: Mapping[str, Any]) -> str:
    kind = field.get("type") or ("text or messages" if "oneOf" in field else "object")
    default = f"; by default {field['default']}" if "default" in field else ""
    return f"{kind}. {field.get('description', '')}{default}".rstrip(". ")


def _post(summary: str, body: str, *answers: str) -> dict[str, Any]:
    reference = {"schema": {"$ref": f"#/components/schemas/{body}"}}
    given: dict[str, Any] = {"description": "done"}
    if answers:
        schema = {"oneOf": [{"$ref": f"#/components/schemas/{each}"} for each in answers]}
        given["content"] = {"application/json": {"schema": schema}, "text/event-stream": {}}
    return {
        "post": {
            "summary": summary,
            "requestBody": {"required": True, "content": {"application/json": reference}},
            "responses": {"200": given, **_errors()},
        }
    }


def _get(summary: str) -> dict[str, Any]:
    return {"get": {"summary": summary, "responses": {"200": {"description": "done"}}}}


def _errors() -> dict[str, Any]:
    return {
        status: {
            "description": what,
            "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}},
        }
        for status, what in STATUSES.items()
    }


def _object(properties: Mapping[str, Any], *required: str) -> dict[str, Any]:
    return {"type": "object", "properties": dict(properties), "required": list(required)}


def _whole(least: int, most: int, **more: Any) -> dict[str, Any]:
    return {"type": "integer", "minimum": least, "maximum": most, **more}


def _schemas(defaults: Defaults) -> dict[str, Any]:
    return {
        "Message": _object({"role": TEXT, "content": TEXT}, "role", "content"),
        "Pair": _object(PAIR, "question", "answer_1", "answer_2"),
        "JudgeRequest": _judge_request(defaults),
        "JudgedPair": _object(JUDGED_PAIR, "winner", "status"),
        "ScoredAnswer": _object(SCORED_ANSWER, "score", "status"),
        "Results": _object(RESULTS, "results"),
        "Ranking": _object(RANKING, "order"),
        "ChatRequest": _chat_request(defaults),
        "CompletionRequest": _completion_request(defaults),
        "RerankRequest": _rerank_request(defaults),
        "Error": _object({"error": _object(ERROR, "message")}, "error"),
    }


def _drawing(defaults: Defaults) -> dict[str, Any]:
    """Return the fields that requests of judgements and conversations share."""
    return {
        "model": {**TEXT, "default": defaults.model},
        "temperature": {**NUMBER, "minimum": 0, "maximum": 10, "default": defaults.temperature},
        "seed": {"type": "integer", "default": defaults.seed},
        "stream": {**FLAG, "description": "server-sent events as tokens come", "default": False},
    }


def _limit(defaults: Defaults) -> dict[str, Any]:
    return _whole(1, defaults.max_new_tokens, default=defaults.max_new_tokens)


def _judge_request(defaults: Defaults) -> dict[str, Any]:
    ranked = "in place of two: all are compared with each other, or judged at once, and ranked"
    at_once = f"one judgement of all answers, 2 to {MOST_LISTED}, as given and in reverse"
    return _object(
        {
            **PAIR,
            "pairs": {
                "type": "array",
                "items": {"$ref": "#/components/schemas/Pair"},
                "maxItems": MOST_PAIRS,
                "description": "in place of one pair",
            },
            "answer": {**CONVERSATION, "description": "in place of two: it alone is scored"},
            "answers": {
                "type": "array",
                "items": CONVERSATION,
                "minItems": 2,
                "maxItems": MOST_DOCUMENTS,
                "description": ranked,
            },
            "at_once": {**FLAG, "description": at_once, "default": defaults.judging == "lists"},
            "rubric": {
                "type": ["string", "object"],
                "description": "a text, or criteria: by name a description, or one with a weight",
            },
            "expected_scores": {
                **FLAG,
                "description": "add those that the probabilities of all scores come to",
                "default": False,
            },
            "orders": {**TEXT, "enum": list(ORDERS), "default": "both"},
            "votes": _whole(1, MOST_VOTES, default=defaults.votes),
            "max_new_tokens": _limit(defaults),
            **_drawing(defaults),
        }
    )


def _chat_request(defaults: Defaults) -> dict[str, Any]:
    return _object(
        {
            "messages": {
                "type": "array",
                "items": {"$ref": "#/components/schemas/Message"},
                "description": "of system, user and assistant; text only",
            },
            "n": _whole(1, MOST_VOTES, default=1),
            "max_completion_tokens": {**_limit(defaults), "description": "or max_tokens"},
            "stop": {"description": "a text, or up to four"},
            **_drawing(defaults),
        },
        "messages",
    )


def _completion_request(defaults: Defaults) -> dict[str, Any]:
    return _object(
        {
            "prompt": {**TEXT, "description": "continued as it stands"},
            "n": _whole(1, MOST_VOTES, default=1),
            "max_tokens": _limit(defaults),
            "stop": {"description": "a text, or up to four"},
            **_drawing(defaults),
        },
        "prompt",
    )


def _rerank_request(defaults: Defaults) -> dict[str, Any]:
    return _object(
        {
            "query": TEXT,
            "documents": {
                "type": "array",
                "items": {"oneOf": [TEXT, _object({"text": TEXT}, "text")]},
                "maxItems": MOST_DOCUMENTS,
            },
            "top_n": {"type": "integer", "minimum": 1},
            "return_documents": {**FLAG, "default": False},
            "at_once": {**FLAG, "default": defaults.judging == "lists"},
            "model": {**TEXT, "default": defaults.model},
        },
        "query",
        "documents",
    )
