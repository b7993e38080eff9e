"""A VM that Google Cloud takes back: its metadata's word is a SIGTERM, and nothing else is."""

from __future__ import annotations

import http.server
import signal
import threading
import time

import pytest

from jlrm.runtime import google, preemption


class Metadata(http.server.BaseHTTPRequestHandler):
    """Answers in turn; the last answer stays."""

    answers: list[tuple[int, bytes]]
    asked: list[tuple[str, str | None]]

    def do_GET(self) -> None:
        self.asked.append((self.path, self.headers["Metadata-Flavor"]))
        code, body = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        self.send_response(code)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def metadata(monkeypatch):
    """Serve such answers, ask every hundredth of a second, and catch SIGTERM."""
    handler = type("Handler", (Metadata,), {"answers": [], "asked": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("GCE_METADATA_HOST", f"127.0.0.1:{server.server_port}")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # which nobody answers
    monkeypatch.setattr(preemption, "EVERY", 0.01)
    handler.signals = []
    before = signal.signal(signal.SIGTERM, lambda signum, _: handler.signals.append(signum))
    yield handler
    signal.signal(signal.SIGTERM, before)
    server.shutdown()
    server.server_close()


def wait_for(is_true) -> None:
    end = time.monotonic() + 20
    while not is_true() and time.monotonic() < end:
        time.sleep(0.01)
    assert is_true()


def threads() -> list[threading.Thread]:
    return [each for each in threading.enumerate() if each.name == "preemption"]


def test_the_notice_is_a_sigterm_once(metadata, capsys):
    metadata.answers += [(200, b"FALSE"), (503, b""), (200, b"FALSE"), (200, b"TRUE")]
    preemption.watch()
    wait_for(lambda: metadata.signals)
    wait_for(lambda: not threads())  # it has no more to say
    assert metadata.signals == [signal.SIGTERM]
    assert metadata.asked == [("/computeMetadata/v1/instance/preempted", "Google")] * 4
    assert "taking this VM back" in capsys.readouterr().err


def test_where_nothing_is_known_of_it_nobody_goes_on_asking(metadata):
    metadata.answers += [(404, b"")]
    preemption.watch()
    wait_for(lambda: metadata.asked and not threads())
    assert not metadata.signals


def test_elsewhere_nobody_is_asked(monkeypatch, tmp_path):
    monkeypatch.delenv("GCE_METADATA_HOST", raising=False)
    monkeypatch.setattr(google, "VENDOR", tmp_path / "none")
    preemption.watch()
    assert not threads()
    (tmp_path / "vendor").write_text("Google Compute Engine\n")
    monkeypatch.setattr(google, "VENDOR", tmp_path / "vendor")
    monkeypatch.setattr(preemption, "_wait", lambda: time.sleep(0.2))
    preemption.watch()
    assert threads()


def test_the_time_allowed_is_the_schedulers_word_or_googles(monkeypatch, tmp_path):
    monkeypatch.delenv("GCE_METADATA_HOST", raising=False)
    monkeypatch.setattr(google, "VENDOR", tmp_path / "none")
    assert preemption.seconds_allowed() is None
    monkeypatch.setenv("GCE_METADATA_HOST", "127.0.0.1:1")
    assert preemption.seconds_allowed() == 30
    monkeypatch.setenv("JLRM_GRACE_SECONDS", "300")
    assert preemption.seconds_allowed() == 300
