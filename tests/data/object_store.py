"""A stand-in for Google's and Amazon's storage: one HTTP server over a local folder.

It speaks the few requests that `array_record`'s gs:// reader, tensorstore's gcs and s3 drivers and
pyarrow's file systems make: an object, whole or a range of it, what it is, and the list of a
folder. Buckets are folders of `root`.
"""

import json
import re
import threading
from datetime import UTC, datetime
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

CUT = -1


class ObjectStore(ThreadingHTTPServer):
    """Attributes:
    root: the folder whose subfolders are the buckets.
    requests: (path, range) of every request so far.
    broken: path of an object → statuses that its next requests get; CUT: half the answer.
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
        if key and google and "alt" not in query:
            self._about(bucket, unquote(key))
        elif key:
            self._object(f"{bucket}/{unquote(key)}")
        else:
            inside = (query.get("startOffset", ""), query.get("endOffset", "\x7f"))
            names = [n for n in self._names(bucket) if inside[0] <= n < inside[1]]
            self._list(bucket, names, query.get("prefix", ""), query.get("delimiter"), google)

    do_HEAD = do_GET

    def _names(self, bucket: str) -> list[str]:
        root = self.server.root / bucket
        return sorted(str(p.relative_to(root)) for p in root.rglob("*") if p.is_file())

    def _list(self, bucket: str, names: list[str], prefix: str, stop: str | None, google) -> None:
        names = [name for name in names if name.startswith(prefix)]
        ends = {name: name.find(stop, len(prefix)) + 1 if stop else 0 for name in names}
        folders = sorted({name[:end] for name, end in ends.items() if end})
        names = [name for name, end in ends.items() if not end]
        if google:
            items = [self._known(bucket, name) for name in names]
            self._answer(200, json.dumps({"items": items, "prefixes": folders}).encode())
            return
        xml = f"<KeyCount>{len(names) + len(folders)}</KeyCount><IsTruncated>false</IsTruncated>"
        for name in names:
            known = self._known(bucket, name)
            xml += f"<Contents><Key>{escape(name)}</Key><Size>{known['size']}</Size>"
            xml += f"<LastModified>{known['updated']}</LastModified></Contents>"
        for name in folders:
            xml += f"<CommonPrefixes><Prefix>{escape(name)}</Prefix></CommonPrefixes>"
        xml = f"<ListBucketResult>{xml}</ListBucketResult>"
        self._answer(200, xml.encode(), type="application/xml")

    def _known(self, bucket: str, key: str) -> dict:
        stat = (self.server.root / bucket / key).stat()
        updated = datetime.fromtimestamp(stat.st_mtime, UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        known = {"kind": "storage#object", "bucket": bucket, "name": key, "generation": "1"}
        return known | {"size": str(stat.st_size), "timeCreated": updated, "updated": updated}

    def _about(self, bucket: str, key: str) -> None:
        if self._fails(f"{bucket}/{key}"):
            return
        if (self.server.root / bucket / key).is_file():
            self._answer(200, json.dumps(self._known(bucket, key)).encode())
        else:
            self._answer(404, b"")

    def _object(self, name: str) -> None:
        path = self.server.root / name
        if self._fails(name):
            return
        if not path.is_file():
            self._answer(404, b"")
            return
        data = path.read_bytes()
        known = {"etag": '"1"', "last_modified": formatdate(path.stat().st_mtime, usegmt=True)}
        asked = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("range", ""))
        if not asked:
            self._answer(200, data, self._cuts(name), **known)
            return
        first, last = asked.groups()
        start = int(first) if first else max(0, len(data) - int(last))
        stop = min(len(data), int(last) + 1) if first and last else len(data)
        if start >= len(data):
            self._answer(416, b"")
            return
        place = f"bytes {start}-{stop - 1}/{len(data)}"
        self._answer(206, data[start:stop], self._cuts(name), content_range=place, **known)

    def _fails(self, name: str) -> bool:
        """Whether the object's next request is to fail; it has been answered then."""
        failures = self.server.broken.get(name)
        if not failures or failures[0] == CUT:
            return False
        self._answer(failures.pop(0), b"")
        return True

    def _cuts(self, name: str) -> bool:
        failures = self.server.broken.get(name)
        cuts = self.command == "GET" and bool(failures)
        if cuts:
            failures.pop(0)
        return cuts

    def _answer(self, status: int, body: bytes, cut: bool = False, **headers: str) -> None:
        self.send_response(status)
        self.send_header("content-length", str(len(body)))
        self.send_header("x-goog-generation", "1")
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: len(body) // 2] if cut else body)
        self.close_connection |= cut

    def log_message(self, *_) -> None:
        pass
