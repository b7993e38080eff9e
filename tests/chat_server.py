"""An OpenAI-compatible server that misbehaves on request; run as a process of its own.

    python chat_server.py LOG [--port N] [--delay S] [--key KEY] [--fault NUMBER=NAME ...]
        [--rate N/SECONDS --rate-shape K] [--no-system STATUS] [--refuse FIELD --refuse-shape K]
        [--usage JSON]

It prints its port. A fault is chosen by the request's number, or by the prompt: `FAULT:half` in it
for ever, `FAULT:half*2` for the first two times that the same request comes. Every request is a
line of LOG when it arrives, and another one when it was answered as it should be.
"""

from __future__ import annotations

import argparse
import email.utils
import gzip
import hashlib
import json
import os
import re
import socket
import threading
import time
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

FAULT = re.compile(r"FAULT:([a-z_0-9]+)(?:\*(\d+))?")
COMPLETION_TOKENS = 20
STATUSES = {  # name: status, code, Retry-After
    "s400": (400, "context_length_exceeded", None),
    "s401": (401, "invalid_api_key", None),
    "s403": (403, "", None),
    "s404": (404, "model_not_found", None),
    "s408": (408, "", None),
    "s409": (409, "", None),
    "s413": (413, "", None),
    "s429": (429, "rate_limit_exceeded", None),
    "s500": (500, "", None),
    "s503": (503, "", None),
    "redirect": (307, "", None),
    "setting": (400, "unsupported_value", None),
    "quota": (429, "insufficient_quota", None),
    "seconds": (429, "", "1"),
    "date": (503, "", "date"),
    "tomorrow": (429, "", "86400"),
    "filter_code": (422, "content_filter", None),
    "moderated": (403, "moderation_blocked", None),
}
MESSAGES = {  # name: status and the text of an error without a code
    "azure_filter": (400, "The response was filtered, see our content management policy."),
    "flagged": (403, "Your input was flagged as harmful."),
    "oversized": (429, "Request too large for m on tokens per min: Limit 5, Requested 9."),
    "no_system": (400, "System role not supported"),
}
ENDINGS = {  # name: what a choice is changed to
    "upstream": {"finish_reason": "error", "error": {"code": 502, "message": "upstream died"}},
    "beside": {"error": {"message": "cut off by the gateway"}},
    "blank": {"message": {"content": " \n"}},
    "no_tokens": {"message": {"content": ""}, "finish_reason": None},
    "aborted": {"finish_reason": "abort"},
    "cut": {"finish_reason": "length"},
    "filter": {"finish_reason": "content_filter"},
    "wont": {"message": {"content": None, "refusal": "I won't judge this."}},
    "wont_part": {"message": {"content": [{"type": "refusal", "refusal": "I won't judge this."}]}},
}
REFUSALS = (  # of a field, as servers word it
    lambda name: (422, {"detail": [{"type": "extra_forbidden", "loc": ["body", name]}]}),
    lambda name: (400, {"error": {"message": f"Unsupported value: '{name}'", "param": name}}),
    lambda name: (400, {"error": f"Unrecognized request argument supplied: {name}"}),
)
RATES = (  # headers and text of a refusal that knows how long it lasts
    lambda wait: ({"retry-after-ms": f"{1000 * wait:.0f}"}, ""),
    lambda wait: ({"Retry-After": f"{wait:.3f}"}, ""),
    lambda wait: (
        {"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": f"{wait:.3f}s"}
        | {"x-ratelimit-remaining-tokens": "9", "x-ratelimit-reset-tokens": "6m0s"},
        "",
    ),
    lambda wait: ({}, f"Please try again in {wait:.3f}s."),
    lambda wait: ({}, f"Rate limited, retry after {1000 * wait:.0f} ms"),
)


def text_of(body: dict[str, Any]) -> str:
    """Return the prompt of a request."""
    return body.get("prompt") or "".join(each["content"] for each in body["messages"])


def judgement(body: dict[str, Any]) -> str:
    """Return what the server answers: a function of everything that was asked."""
    name = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()[:12]
    return f"because {name}\n</think>\n<answer>7</answer><answer>3</answer>"


class Server(ThreadingHTTPServer):
    request_queue_size = 128
    daemon_threads = True

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__(("127.0.0.1", args.port), Handler)
        self.args = args
        self.faults = dict(each.split("=") for each in args.fault)
        self.lock = threading.Lock()
        self.log = open(args.log, "a")  # noqa: SIM115 (open as long as the process lives)
        self.num_requests, self.in_flight = 0, 0
        self.seen: dict[str, int] = {}
        self.window = (0.0, 0)  # when it began, requests in it

    def limited(self) -> float:
        """Count a request; return the seconds until the window ends where it is one too many."""
        most, seconds = (float(part) for part in self.args.rate.split("/"))
        with self.lock:
            now = time.monotonic()
            began, count = self.window
            if now - began >= seconds:
                began, count = now, 0
            self.window = (began, count + 1)
            return began + seconds - now if count >= most else 0.0

    def write(self, row: dict[str, Any]) -> None:
        self.log.write(json.dumps(row) + "\n")
        self.log.flush()

    def arrived(self, path: str, body: dict[str, Any], headers: Any) -> str:
        """Log a request and return the name of its fault."""
        auth = headers["Authorization"]
        with self.lock:
            self.num_requests += 1
            self.in_flight += 1
            name = judgement(body)
            self.seen[name] = self.seen.get(name, 0) + 1
            fault = self.faults.get(str(self.num_requests), self.faults.get("all", ""))
            found = FAULT.search(text_of(body))
            if found and self.seen[name] <= int(found[2] or 10**9):
                fault = found[1]
            if self.args.key and auth != f"Bearer {self.args.key}":
                fault = "s401"
            row = {"path": path, "body": body, "auth": auth, "fault": fault}
            row["api_key"] = headers["api-key"]
            self.write({**row, "in_flight": self.in_flight, "time": time.monotonic()})
            if fault == "die":  # under the lock: no answer is between being sent and being logged
                os._exit(1)
            return fault


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Server

    def log_message(self, *_: Any) -> None:
        pass

    def do_POST(self) -> None:
        size = int(self.headers["Content-Length"])
        sent = self.rfile.read(size)
        if len(sent) < size:  # the client has gone
            self.close_connection = True
            return
        body = json.loads(sent)
        fault = self.server.arrived(self.path, body, self.headers)
        try:
            time.sleep(self.server.args.delay)
            self.answer(body, fault)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True
        finally:
            with self.server.lock:
                self.server.in_flight -= 1

    def answer(self, body: dict[str, Any], fault: str) -> None:
        if self.is_refused(body) or self.is_endless(fault):
            return
        if fault in MESSAGES:
            status, message = MESSAGES[fault]
            self.send(status, {"error": {"message": message}})
            return
        if fault == "renamed":
            if "max_tokens" in body:
                message = "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens'."
                self.send(400, {"error": {"message": message, "code": "unsupported_parameter"}})
                return
            fault = ""
        if fault in STATUSES:
            status, code, after = STATUSES[fault]
            message = f"no for {self.headers['Authorization']}: {fault}"
            if after == "date":
                after = email.utils.formatdate(time.time() + 2.0, usegmt=True)
            headers = {"Retry-After": after} if after else {}
            self.send(status, {"error": {"message": message, "code": code}}, headers)
            return
        if fault == "late":
            time.sleep(5.0)
        bodies = {
            "not_json": b'{"choices": [{',
            "not_utf8": b"\xff\xfe\x00",
            "no_choices": b'{"choices": []}',
            "schema": b'{"choices": {"message": 1}}',
            "null": b'{"choices": [{"message": {"content": null}, "text": null}]}',
            "error": b'{"error": {"message": "upstream is down", "code": 502}}',
            "empty": b"",
        }
        payload = bodies.get(fault) or json.dumps(self.reply(body, fault)).encode()
        if fault == "empty":
            payload = b""
        if fault == "reset":
            self.request.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
        elif fault == "packed_half":
            self.packed(gzip.compress(payload)[:-9])
        elif fault == "brotli":
            self.packed(payload, "br")
        elif fault == "trickled_head":
            self.trickle(b"HTTP/1.1 200 OK\r\nX-A: " + b"a" * 10_000)
        elif fault in ("half", "trickle"):
            head = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(payload)
            self.wfile.write(head + payload[: len(payload) // 2])
            if fault == "trickle":
                self.trickle(payload[len(payload) // 2 :])
            self.close_connection = True
        else:
            with self.server.lock:  # sent and logged as one
                self.send_bytes(200, payload)
                if not fault or fault == "no_usage":
                    self.server.write({"served": judgement(body)})

    def reply(self, body: dict[str, Any], fault: str) -> dict[str, Any]:
        text = judgement(body)
        content = {"text": text} if "prompt" in body else {"message": {"content": text}}
        choice = {**content, "finish_reason": "stop", **ENDINGS.get(fault, {})}
        reply = {"choices": [choice]}
        if fault == "no_usage":
            return reply
        num_tokens = 0 if fault == "no_tokens" else COMPLETION_TOKENS
        usage = {"prompt_tokens": len(text_of(body)) // 4, "completion_tokens": num_tokens}
        return {**reply, "usage": usage, **self.server.args.usage}

    def is_refused(self, body: dict[str, Any]) -> bool:
        """Refuse what the flags say."""
        args = self.server.args
        if args.rate and (wait := self.server.limited()):
            headers, text = RATES[args.rate_shape](wait)
            self.send(429, {"error": {"message": f"Rate limit. {text}"}}, headers=headers)
        elif args.no_system and any(each["role"] == "system" for each in body["messages"]):
            self.send(args.no_system, {"error": {"message": "System role not supported"}})
        elif args.refuse and args.refuse in body:
            self.send(*REFUSALS[args.refuse_shape](args.refuse))
        else:
            return False
        return True

    def is_endless(self, fault: str) -> bool:
        """Send a body of gigabytes, whether it says so, is packed, or never ends."""
        status = 400 if fault == "endless_error" else 200
        piece, size = b" " * 2**20, 5 * 2**30
        if fault == "bomb":
            packer = zlib.compressobj(wbits=31)
            self.packed(b"".join(packer.compress(piece) for _ in range(128)) + packer.flush())
        elif fault in ("endless", "five_gigabytes", "endless_error"):
            self.send_response(status)
            if fault == "five_gigabytes":
                self.send_header("Content-Length", str(size))
            self.end_headers()
            for _ in range(size // len(piece)):
                self.wfile.write(piece)
            self.close_connection = True
        else:
            return False
        return True

    def packed(self, payload: bytes, encoding: str = "gzip") -> None:
        self.send_bytes(200, payload, {"Content-Encoding": encoding})

    def trickle(self, data: bytes) -> None:
        for place in range(len(data)):
            self.wfile.write(data[place : place + 1])
            time.sleep(0.1)

    def send(self, status: int, reply: Any, headers: dict[str, str] | None = None) -> None:
        self.send_bytes(status, json.dumps(reply).encode(), headers)

    def send_bytes(
        self, status: int, payload: bytes, headers: dict[str, str] | None = None
    ) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(payload)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(payload)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("log")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--delay", type=float, default=0.0)
    parser.add_argument("--key", default="")
    parser.add_argument("--fault", action="append", default=[])
    parser.add_argument("--rate", default="")
    parser.add_argument("--rate-shape", type=int, default=0)
    parser.add_argument("--no-system", type=int, default=0)
    parser.add_argument("--refuse", default="")
    parser.add_argument("--refuse-shape", type=int, default=0)
    parser.add_argument("--usage", default={}, type=lambda text: {"usage": json.loads(text)})
    server = Server(parser.parse_args())
    print(server.server_address[1], flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
