"""A stand-in for an OpenAI-compatible server, over loopback, that fails as it is told."""

import json
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TEXTS = {
    "desc": ["a red apple lies on a table."],
    "neg_desc": ["a green pear lies on a chair."],
    "tags": ["red apple", "table"],
    "neg_tags": ["green pear", "chair"],
}
SECONDS, DATE_SECONDS = 7, 9  # what the two forms of Retry-After ask
PROMPT_TOKENS, OUTPUT_TOKENS = 100, 20
KINDS = {
    "429": "http_429", "429-seconds": "http_429", "429-date": "http_429", "500": "http_5xx",
    "502": "http_5xx", "503": "http_5xx", "503-seconds": "http_5xx", "504": "http_5xx",
    "408": "timeouts", "hang": "timeouts", "drip": "timeouts", "drop": "connection_errors",
    "reset": "connection_errors", "cut": "half_answers", "no_json": "half_answers",
    "html": "half_answers", "list": "half_answers", "no_choices": "half_answers",
    "null": "half_answers",
}  # fmt: skip
"""Faults that are worth another try, and the counter that each belongs to."""


def caption_of(body: dict) -> str:
    """What a request's text says, all of it."""
    return " ".join(part.get("text", "") for part in body["messages"][0]["content"])


def is_probe(body: dict) -> bool:
    return 1 in (body.get("max_tokens"), body.get("max_completion_tokens"))


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256


class Endpoint:
    """A server that runs inside a `with`.

    Args:
        plan: what to do with a request, by its number and body: "ok", one of KINDS, a status such
            as "400", or "length", "filter", "refusal", "no_usage", "new_name", "quota".
        answer: the text of an answer, by the request's body.

    Attributes:
        bodies: of the requests, as they came; `headers` beside them, their names in lower case.
        at: when they came, in seconds of `time.monotonic`.
        did: how often what was done.
        most: requests that were in it at the same time.
    """

    def __init__(
        self,
        plan: Callable[[int, dict], str] = lambda number, body: "ok",
        answer: Callable[[dict], str] = lambda body: json.dumps(TEXTS),
    ) -> None:
        self.plan, self.answer = plan, answer
        self.bodies: list[dict] = []
        self.headers: list[dict] = []
        self.at: list[float] = []
        self.did: Counter[str] = Counter()
        self.inside = self.most = 0
        self.lock = threading.Lock()
        self.closing = threading.Event()
        self._port = 0
        self._open: set[socket.socket] = set()
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}/v1"

    def start(self) -> None:
        """Listens, after a `stop` on the same port."""
        self._server = _Server(("127.0.0.1", self._port), _handler(self))
        self._port = self._server.server_port
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()

    def stop(self) -> None:
        """Dies: connections break, new ones are refused."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
        with self.lock:
            for connection in self._open:
                _hang_up(connection)

    def __enter__(self) -> "Endpoint":
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        self.stop()

    def probes(self) -> int:
        return sum(map(is_probe, self.bodies))


def _hang_up(connection: socket.socket) -> None:
    with suppress(OSError):  # the other side may have been faster
        connection.shutdown(socket.SHUT_RDWR)


def _handler(endpoint: Endpoint) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = -1  # headers and body in one packet: two would wait for each other
        disable_nagle_algorithm = True

        def log_message(self, *_: object) -> None:
            pass

        def setup(self) -> None:
            super().setup()
            with endpoint.lock:
                endpoint._open.add(self.connection)

        def finish(self) -> None:
            with endpoint.lock:
                endpoint._open.discard(self.connection)
            with suppress(OSError):  # the client may have gone
                super().finish()

        def handle(self) -> None:
            with suppress(OSError):
                super().handle()

        def do_POST(self) -> None:
            sent = self.rfile.read(int(self.headers["Content-Length"]))
            if len(sent) < int(self.headers["Content-Length"]):
                return  # the server died meanwhile
            body = json.loads(sent)
            with endpoint.lock:
                number = len(endpoint.bodies)
                endpoint.bodies.append(body)
                endpoint.at.append(time.monotonic())
                endpoint.headers.append({k.lower(): v for k, v in self.headers.items()})
                what = endpoint.plan(number, body)
                endpoint.did[what] += 1
                endpoint.inside += 1
                endpoint.most = max(endpoint.most, endpoint.inside)
            try:
                self.act(what, body)
            finally:
                with endpoint.lock:
                    endpoint.inside -= 1

        def act(self, what: str, body: dict) -> None:
            status, _, form = what.partition("-")
            if status.isdigit():
                self.fail(int(status), form)
            elif what == "quota":
                self.fail(429, code="insufficient_quota")
            elif what == "new_name" and "max_tokens" in body:
                self.fail(400, code="unsupported_parameter", param="max_tokens")
            elif what == "hang":
                self.connection.recv(1)  # until the client hangs up
                self.close_connection = True
            elif what == "drip":
                self.drip()
            elif what == "drop":
                self.close_connection = True
            elif what == "reset":
                linger = struct.pack("ii", 1, 0)
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                self.connection.close()
                self.close_connection = True
            elif what == "cut":
                self.send(200, self.completion(body)[:40], length=1000)
                self.wfile.flush()
                _hang_up(self.connection)
                self.close_connection = True
            elif what == "no_json":
                self.send(200, self.completion(body)[:40])
            elif what == "html":
                self.send(200, b"<html>under construction</html>", kind="text/html")
            elif what == "list":
                self.send(200, b"[1, 2]")
            else:
                self.send(200, self.completion(body, what))

        def completion(self, body: dict, what: str = "ok") -> bytes:
            message: dict = {"role": "assistant", "content": endpoint.answer(body)}
            ending = {"length": "length", "filter": "content_filter"}.get(what, "stop")
            if what in ("null", "refusal"):
                message["content"] = None
            if what == "refusal":
                message["refusal"] = "I'm sorry, I can't help with that."
            if what == "length":
                message["content"] = message["content"][:30]
            answer = {
                "id": "1", "object": "chat.completion", "created": 1, "model": body["model"],
                "choices": [{"index": 0, "message": message, "finish_reason": ending}],
                "usage": {
                    "prompt_tokens": PROMPT_TOKENS,
                    "completion_tokens": OUTPUT_TOKENS,
                    "total_tokens": PROMPT_TOKENS + OUTPUT_TOKENS,
                },
            }  # fmt: skip
            if what == "no_choices":
                answer["choices"] = []
            if what == "no_usage":
                del answer["usage"]
            return json.dumps(answer).encode()

        def fail(self, status: int, form: str = "", code: str = "bad", param: str = "") -> None:
            """Answers with an error that says the key, as some servers do."""
            said = f"no {status} for you with {self.headers['Authorization']}, " + "x" * 2000
            error = {"message": said, "code": code, "param": param or None, "type": "error"}
            extra = {}
            if form == "seconds":
                extra["Retry-After"] = str(SECONDS)
            if form == "date":  # of a server whose clock is wrong
                extra["Date"] = formatdate(1_000_000_000, usegmt=True)
                extra["Retry-After"] = formatdate(1_000_000_000 + DATE_SECONDS, usegmt=True)
            self.send(status, json.dumps({"error": error}).encode(), extra=extra)

        def drip(self) -> None:
            """A byte now and then, so that no single read takes long."""
            self.send(200, b"", length=100_000)
            while not endpoint.closing.wait(0.02):
                self.wfile.write(b" ")
                self.wfile.flush()

        def send(
            self,
            status: int,
            data: bytes,
            kind: str = "application/json",
            length: int | None = None,
            extra: dict[str, str] | None = None,
        ) -> None:
            self.send_response_only(status)
            headers = {"Content-Type": kind, "Content-Length": str(length or len(data))}
            for name, value in (headers | (extra or {})).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)

    return Handler
