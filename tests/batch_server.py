"""OpenAI's batch API on loopback: files, batches, and a record of what was paid.

    python batch_server.py LOG [--polls N] [--fault NAME]

It prints its port. A batch has ended after it was looked at N times. Its replies are those of
chat_server.py: a request whose prompt holds `FAULT:s400` goes to the file of errors. Faults of the
service: `lost` (the first batch begins, but its name never comes back), `busy` (every third call
is a 503), `expired` (half of each batch is left), `failed`, `evil_id`, `many_lines`, `torn` (the
first download breaks off), `order` (a file's lines come backwards), `twice` (each line again, the
second time as an error, with lines of others), `no_file` (its files are gone), `no_status`.
"""

from __future__ import annotations

import argparse
import email
import itertools
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from chat_server import COMPLETION_TOKENS, ENDINGS, judgement, text_of

USAGE = {"prompt_tokens": 1000, "completion_tokens": COMPLETION_TOKENS}


def replied(row: dict[str, Any]) -> tuple[bool, dict[str, Any]]:
    """Return whether a request of a file failed, and the line that tells what came of it."""
    found = re.search(r"FAULT:(\w+)", text_of(row["body"]))
    fault = found[1] if found else ""
    line = {"id": "x", "custom_id": row["custom_id"], "error": None}
    if fault == "s400":
        body = {"error": {"message": "too long", "code": "context_length_exceeded"}}
        return True, {**line, "response": {"status_code": 400, "body": body}}
    if fault == "batch_expired":
        error = {"code": "batch_expired", "message": "not in time"}
        return True, {**line, "response": None, "error": error}
    choice = {"message": {"content": judgement(row["body"])}, "finish_reason": "stop"}
    body = {"choices": [{**choice, **ENDINGS.get(fault, {})}], "usage": USAGE}
    return False, {**line, "response": {"status_code": 200, "body": body}}


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.args, self.lock = args, threading.Lock()
        self.numbers, self.num_calls, self.num_lost, self.num_torn = itertools.count(), 0, 0, 0
        self.files: dict[str, bytes] = {}
        self.batches: dict[str, dict[str, Any]] = {}

    def log(self, row: dict[str, Any]) -> None:
        with open(self.args.log, "a") as file:
            file.write(json.dumps(row) + "\n")

    def begin(self, order: dict[str, Any]) -> dict[str, Any]:
        name = f"batch_{next(self.numbers)}"
        lines = self.files[order["input_file_id"]].splitlines()
        self.batches[name] = {
            **{"id": name, "object": "batch", "status": "validating", "created_at": 100},
            **{"left": self.args.polls, "total": len(lines), **order},
        }
        self.log({"begun": [json.loads(line) for line in lines], **order})
        return self.batches[name]

    def look(self, name: str) -> dict[str, Any]:
        batch = self.batches[name]
        batch["left"] -= 1
        if self.args.fault == "no_status":
            return {"id": name}
        counts = {"total": batch["total"], "completed": 0, "failed": 0}
        if batch["left"] >= 0 or batch["status"] == "completed":
            return {**batch, "status": batch["status"].replace("validating", "in_progress")}
        if self.args.fault == "failed":
            errors = {"data": [{"code": "x", "message": "the model is unknown", "line": 1}]}
            return {**batch, "status": "failed", "errors": errors}
        rows = list(map(json.loads, self.files[batch["input_file_id"]].splitlines()))
        if self.args.fault == "expired":
            rows = rows[::2]
        if self.args.fault == "order":
            rows = rows[::-1]
        for key, is_failed in (("output_file_id", False), ("error_file_id", True)):
            lines = [line for failed, line in map(replied, rows) if failed == is_failed]
            if lines:
                batch[key] = f"file-{next(self.numbers)}"
                self.files[batch[key]] = b"\n".join(json.dumps(line).encode() for line in lines)
        if self.args.fault == "no_file":
            self.files = {}
        counts["completed"] = len(rows)
        status = "expired" if self.args.fault == "expired" else "completed"
        batch.update(status=status, request_counts=counts, completed_at=160)
        return batch


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, *_: Any) -> None:
        pass

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        with self.server.lock:
            if self.is_busy():
                return
            path = self.path.partition("?")[0]
            if path == "/v1/files":
                self.send(200, self.upload(body))
            elif path == "/v1/batches":
                batch = self.server.begin(json.loads(body))
                if self.server.args.fault == "lost" and not self.server.num_lost:
                    self.server.num_lost += 1
                    self.close_connection = True
                    return
                evil = {"id": "../../files/x"} if self.server.args.fault == "evil_id" else {}
                self.send(200, {**batch, **evil})
            else:
                self.send(404, {"error": {"message": "Not Found"}})

    def do_GET(self) -> None:
        with self.server.lock:
            if self.is_busy():
                return
            path, _, query = self.path.partition("?")
            name = path.removeprefix("/v1/").split("/")
            if name[0] == "batches" and len(name) == 1:
                self.page(query)
            elif name[0] == "batches" and name[1] in self.server.batches:
                self.send(200, self.server.look(name[1]))
            elif name[0] == "files" and name[1] in self.server.files:
                self.download(self.server.files[name[1]])
            else:
                self.send(404, {"error": {"message": "Not Found"}})

    def page(self, query: str) -> None:
        """Send one batch a page, the newest first."""
        rows = list(self.server.batches.values())[::-1]
        after = query.partition("&after=")[2]
        if after:
            rows = rows[[row["id"] for row in rows].index(after) + 1 :]
        self.send(200, {"object": "list", "data": rows[:1], "has_more": len(rows) > 1})

    def upload(self, body: bytes) -> dict[str, Any]:
        kind = self.headers["Content-Type"].encode()
        parts = email.message_from_bytes(b"Content-Type: " + kind + b"\r\n\r\n" + body)
        fields = {
            part.get_param("name", header="content-disposition"): part.get_payload(decode=True)
            for part in parts.get_payload()
        }
        assert fields["purpose"] == b"batch"
        name = f"file-{next(self.server.numbers)}"
        self.server.files[name] = fields["file"]
        return {"id": name, "object": "file"}

    def download(self, content: bytes) -> None:
        if self.server.args.fault == "many_lines":
            content += b"\n{}" * 1000
        if self.server.args.fault == "twice":
            rows = [{**json.loads(line), "response": None} for line in content.splitlines()]
            rows += [{"custom_id": "another's", "response": None}]
            content += b"".join(b"\n" + json.dumps(row).encode() for row in rows)
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        is_torn = self.server.args.fault == "torn" and not self.server.num_torn
        self.server.num_torn += is_torn
        self.wfile.write(content[: len(content) // 2] if is_torn else content)
        self.close_connection = bool(is_torn)

    def is_busy(self) -> bool:
        self.server.num_calls += 1
        if self.server.args.fault != "busy" or self.server.num_calls % 3 != 1:
            return False
        self.send(503, {"error": {"message": "overloaded"}})
        return True

    def send(self, status: int, reply: Any) -> None:
        payload = json.dumps(reply).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("log")
    parser.add_argument("--polls", type=int, default=2)
    parser.add_argument("--fault", default="")
    server = Server(parser.parse_args())
    print(server.server_address[1], flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
