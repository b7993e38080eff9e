"""The batch API of OpenAI as a service: begin a batch of requests, wait for it, read its results.

Batches under way are kept in a file from the moment at which their requests are on the server. A
batch of that file is looked for before another is begun, in case the server began one whose name
never came back.
"""

from __future__ import annotations

import asyncio
import json
import logging
import pathlib
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import httpx2

from jlrm.config import RunError, UsageError
from jlrm.judges import complaints, protocol
from jlrm.judges.complaints import Declined, Passing, Received
from jlrm.judges.pace import Pace
from jlrm.judges.paid import Spending
from jlrm.judges.protocol import NoReply, Reply
from jlrm.judges.requests import EndpointSettings
from jlrm.judges.transport import Server
from jlrm.runtime.storage import write_atomically

FIRST_POLL, LONGEST_POLL = 5.0, 60.0  # seconds between two looks at a batch
MOST_PAGES = 50  # of a list of batches
ENDED = ("completed", "expired", "cancelled", "canceled", "failed")

log = logging.getLogger(__name__)
T = TypeVar("T")
Results = dict[str, Reply | NoReply]  # by the names of requests


class Gone(Exception):
    """The server has no such file or batch, or no longer."""


class Job(NamedTuple):
    """A batch: its file on the server, its id once it is known, and the names of its requests."""

    file: str
    id: str
    requests: tuple[str, ...]


class BatchService:
    """The batches of one server, and of one file in which those under way are kept.

    Raises:
      UsageError: there is such a file that holds something else.
    """

    def __init__(self, settings: EndpointSettings, spent: Spending) -> None:
        assert settings.batch is not None
        self._settings, self._server = settings, Server(settings)
        self._address = settings.address("/batches")
        self._pace = Pace(self._address, settings.max_retries, settings.requests_per_minute, spent)
        self._path, self.jobs = settings.batch, _read_jobs(settings.batch)
        self.client, self.quotable = self._server.client, self._server.quotable

    async def begun(self, client: httpx2.AsyncClient, bodies: Mapping[str, Any]) -> Job:
        """Send requests, by their names, as a file, and begin a batch of it.

        Raises:
          UsageError, RunError: the server does not take them.
        """
        lines = (_line(name, body, self._target) for name, body in bodies.items())
        files = {"file": ("requests.jsonl", b"".join(lines), "application/jsonl")}
        sent = await self._call(client, "POST", "/files", data={"purpose": "batch"}, files=files)
        job = Job(_id(sent, "file"), "", tuple(bodies))
        self._keep([*self.jobs, job])
        return await self._named(client, job, is_new=True)

    def forget(self, jobs: Sequence[Job]) -> None:
        """Take batches off the file: they have ended, and all that they gave is kept elsewhere."""
        files = {job.file for job in jobs}
        if files:
            self._keep([job for job in self.jobs if job.file not in files])

    @property
    def _target(self) -> str:
        return self._settings.path if self._settings.is_azure else f"/v1{self._settings.path}"

    async def _named(self, client: httpx2.AsyncClient, job: Job, is_new: bool) -> Job:
        """Begin the batch of a file, unless there is one already."""
        order = {
            "input_file_id": job.file,
            "endpoint": self._target,
            "completion_window": "24h",
        }

        async def send() -> Mapping[str, Any]:
            nonlocal is_new
            if not is_new and (known := await self._found(client, job.file)):
                return known
            is_new = False
            return await self._once(client, "POST", "/batches", json=order)

        named = job._replace(id=_id(await self._asked(send), "batch"))
        self._keep([named if each.file == job.file else each for each in self.jobs])
        return named

    async def _found(self, client: httpx2.AsyncClient, file: str) -> Mapping[str, Any] | None:
        after = ""
        for _ in range(MOST_PAGES):
            page = await self._once(client, "GET", "/batches", query=f"limit=100{after}")
            rows = page.get("data")
            rows = [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
            if known := next((row for row in rows if row.get("input_file_id") == file), None):
                return known
            if not page.get("has_more") or not rows:
                return None
            after = f"&after={_id(rows[-1], 'batch')}"
        return None

    async def ended(self, client: httpx2.AsyncClient, job: Job) -> Results:
        """Wait until a batch has ended, and return its results by the names of the requests.

        Raises:
          UsageError: the server refuses the file.
        """
        if not job.id:
            job = await self._named(client, job, is_new=False)
        wait, told = FIRST_POLL, ""
        while True:
            state = await self._state(client, job)
            status = state["status"].lower()
            if (now := f"{job.id}: {status}{_progress(state)}") != told:
                log.warning("%s", now)
                told = now
            if status in ENDED:
                break
            await asyncio.sleep(wait)
            wait = min(2 * wait, LONGEST_POLL)
        if status == "failed":
            self.forget([job])
            reason = self.quotable(_errors(state))
            raise UsageError(f"{self._address}: {job.id} failed: {reason}")
        results: Results = {}
        for key in ("error_file_id", "output_file_id"):  # where both name a request, it has a reply
            if state.get(key):
                file = _id(state, "file", key)
                try:
                    results |= await self._results(client, file, job, state)
                except Gone:
                    text = "%s: the server has no file %s any more; the next run asks its games."
                    log.warning(text, job.id, file)
        return results

    async def _state(self, client: httpx2.AsyncClient, job: Job) -> Mapping[str, Any]:
        """Return what the server says of a batch, whose `status` is text.

        Raises:
          UsageError: there is no such batch.
          RunError: it does not say what became of it.
        """
        advice = f"Remove {self._path} to ask, and pay for, its requests again"
        try:
            state = await self._call(client, "GET", f"/batches/{job.id}")
        except Gone:
            raise UsageError(f"{self._address} has no {job.id}. {advice}.") from None
        if not isinstance(state.get("status"), str):
            text = self.quotable(json.dumps(dict(state)))
            raise RunError(f"{self._address}: no status of {job.id} in {text}. {advice}.")
        return state

    async def _results(
        self, client: httpx2.AsyncClient, file: str, job: Job, state: Mapping[str, Any]
    ) -> Results:
        """Return what a file of replies, or of errors, says."""
        seconds = _seconds(state) / len(job.requests)
        names = set(job.requests)

        async def send() -> Results:
            results: Results = {}
            num_lines = 0

            def take(line: bytes) -> None:
                nonlocal num_lines
                num_lines += 1
                if num_lines > 2 * len(names) + 100:  # some are given twice, but not without end
                    raise Declined(f"the file {file} has more lines than there were requests")
                name, result = self._result(line, seconds)
                if name in names and not isinstance(results.get(name), Reply):
                    results[name] = result

            url = self._settings.address(f"/files/{file}/content")
            received = await self._server.lines(client, url, take)
            if received.status != 200:
                raise self._failure(received, url)
            if received.content.strip():
                take(received.content)
            return results

        return await self._asked(send)

    def _result(self, line: bytes, seconds: float) -> tuple[str, Reply | NoReply]:
        """Return the name of a request and its result, from a line of a file."""
        try:
            row = json.loads(line)
            name, error = str(row["custom_id"]), row.get("error")
        except (ValueError, RecursionError, TypeError, KeyError, AttributeError):
            return "", NoReply("")
        quote = self.quotable
        answer = row.get("response")
        answer = answer if isinstance(answer, dict) else {}
        body, status = answer.get("body"), answer.get("status_code")
        if isinstance(status, int) and 200 <= status < 300:
            try:
                return name, protocol.read_object(body, seconds)
            except (KeyError, IndexError, TypeError, AttributeError, RecursionError):
                text = f"no judgement in it: {json.dumps(body)}"
                if not (status := complaints.of_object(body, text).status):
                    return name, NoReply(quote(text))
        if isinstance(status, int) and body:
            received = Received(status, {}, json.dumps(body).encode())
            failure = complaints.failure(received, self._sent, quote, self._address, False)
            return name, NoReply(str(failure), getattr(failure, "is_content", False))
        return name, NoReply(quote(complaints.of_object({"error": error}, "no reply").message))

    @property
    def _sent(self) -> dict[str, Any]:
        """What a request of ours holds, as far as a complaint may name it."""
        fields = {"messages": [{"role": "system"}], **self._settings.fields(), "seed": 0}
        return {**fields, **self._settings.request}

    async def _call(
        self, client: httpx2.AsyncClient, method: str, path: str, **content: Any
    ) -> Mapping[str, Any]:
        return await self._asked(lambda: self._once(client, method, path, **content))

    async def _asked(self, send: Callable[[], Awaitable[T]]) -> T:
        try:
            return await self._pace.asked(send)
        except Declined as error:
            raise RunError(
                f"{self._address}: {error}. The same command goes on with the "
                f"batches in {self._path}."
            ) from None

    async def _once(
        self, client: httpx2.AsyncClient, method: str, path: str, query: str = "", **content: Any
    ) -> Mapping[str, Any]:
        url = self._settings.address(path)
        if query:
            url += f"{'&' if '?' in url else '?'}{query}"
        received = await self._server.exchange(client, method, url, **content)
        if received.status not in (200, 201):
            raise self._failure(received, path)
        try:
            value = json.loads(received.content)
        except (ValueError, RecursionError):
            value = None
        if not isinstance(value, dict):
            text = received.content[:1000].decode(errors="replace")
            raise Passing(f"no JSON object: {self.quotable(text)}")
        return value

    def _failure(self, received: Received, path: str) -> Exception:
        if received.status in (404, 410) and path.count("/") > 1:  # one that was there
            return Gone(path)
        return complaints.failure(received, {}, self.quotable, self._address, True)

    def _keep(self, jobs: Sequence[Job]) -> None:
        """Write which batches are under way: all of it or nothing."""
        self.jobs = list(jobs)
        rows = {"batches": [job._asdict() for job in self.jobs]}
        write_atomically(self._path, json.dumps(rows).encode())


def _read_jobs(path: pathlib.Path) -> list[Job]:
    try:
        rows = json.loads(path.read_bytes())["batches"]
        jobs = [Job(row["file"], row["id"], tuple(row["requests"])) for row in rows]
        if not all(isinstance(text, str) for j in jobs for text in (j.file, j.id, *j.requests)):
            raise TypeError
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise UsageError(
            f"{path} is no list of batches. Remove it; batches under way are then asked, and paid, "
            "again."
        ) from None
    return jobs


def _line(name: str, body: Mapping[str, Any], target: str) -> bytes:
    row = {"custom_id": name, "method": "POST", "url": target, "body": body}
    return json.dumps(row).encode() + b"\n"


def _id(row: Mapping[str, Any], kind: str, key: str = "id") -> str:
    """Return a server's name for something, which becomes part of an address."""
    if not isinstance(name := row.get(key), str) or not re.fullmatch(r"[\w.:-]{1,200}", name):
        raise RunError(f"The server gave no id of a {kind} that can be used: {str(name)[:100]!r}.")
    return name


def _progress(state: Mapping[str, Any]) -> str:
    counts = state.get("request_counts")
    if not isinstance(counts, dict) or protocol.count(counts.get("total")) in (None, 0):
        return ""
    done, failed = (protocol.count(counts.get(name)) or 0 for name in ("completed", "failed"))
    return f", {done + failed} of {counts['total']} requests" + (
        f" ({failed} failed)" if failed else ""
    )


def _errors(state: Mapping[str, Any]) -> str:
    errors = state.get("errors")
    rows = errors.get("data") if isinstance(errors, dict) else errors
    rows = [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
    texts = [str(row.get("message") or row.get("code")) for row in rows]
    return "; ".join(dict.fromkeys(texts)) or "the server does not say why"


def _seconds(state: Mapping[str, Any]) -> float:
    """Return the wall time of a batch; 0 where the server does not say."""
    times = [state.get(name) for name in ("created_at", "completed_at")]
    known = [float(t) for t in times if isinstance(t, int) and 0 <= t < 1e12]
    return max(known[1] - known[0], 0.0) if len(known) == 2 else 0.0
