"""A stand-in for Google's and Amazon's storage: one HTTP server over a local folder.

It speaks the few requests that `array_record`'s gs:// reader and tensorstore's gcs and s3 drivers
make: an object, whole or a range of it, and the list of a folder. Buckets are folders of `root`.
"""

import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape


class ObjectStore(ThreadingHTTPServer):
    """Attributes:
    root: the folder whose subfolders are the buckets.
    requests: (path, range) of every request so far.
    broken: path of an object → statuses that its next requests get.
    """

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.root = root
        self.requests: list[tuple[str, str]] = []
        self.broken: dict[str, list[int]] = {}
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request, client_address) -> None:
        pass  # the gs:// reader hangs up in the middle of an answer


class Handler(BaseHTTPRequestHandler):
    server: ObjectStore
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        split = urlsplit(self.path)
        query = {k: v[0] for k, v in parse_qs(split.query).items()}
        google = re.fullmatch(r"/storage/v1/b/([^/]+)/o(?:/(.+))?", split.path)
        bucket, key = google.groups() if google else split.path[1:].partition("/")[::2]
        self.server.requests.append((unquote(split.path), self.headers.get("range", "")))
        if key:
            self._object(f"{bucket}/{unquote(key)}")
        elif google:
            inside = (query.get("startOffset", ""), query.get("endOffset", "\x7f"))
            names = [n for n in self._names(bucket) if inside[0] <= n < inside[1]]
            self._answer(200, json.dumps({"items": [{"name": n} for n in names]}).encode())
        else:
            names = [n for n in self._names(bucket) if n.startswith(query.get("prefix", ""))]
            keys = "".join(f"<Contents><Key>{escape(n)}</Key></Contents>" for n in names)
            counted = f"<KeyCount>{len(names)}</KeyCount><IsTruncated>false</IsTruncated>"
            xml = f"<ListBucketResult>{counted}{keys}</ListBucketResult>"
            self._answer(200, xml.encode(), type="application/xml")

    do_HEAD = do_GET

    def _names(self, bucket: str) -> list[str]:
        root = self.server.root / bucket
        return sorted(str(p.relative_to(root)) for p in root.rglob("*") if p.is_file())

    def _object(self, name: str) -> None:
        path = self.server.root / name
        failures = self.server.broken.get(name)
        if failures:
            self._answer(failures.pop(0), b"")
        elif not path.is_file():
            self._answer(404, b"")
        else:
            data = path.read_bytes()
            asked = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("range", ""))
            if not asked:
                self._answer(200, data, etag='"1"')
                return
            first, last = asked.groups()
            start = int(first) if first else max(0, len(data) - int(last))
            stop = min(len(data), int(last) + 1) if first and last else len(data)
            if start >= len(data):
                self._answer(416, b"")
                return
            place = f"bytes {start}-{stop - 1}/{len(data)}"
            self._answer(206, data[start:stop], content_range=place, etag='"1"')

    def _answer(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        self.send_header("content-length", str(len(body)))
        self.send_header("x-goog-generation", "1")
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_) -> None:
        pass
