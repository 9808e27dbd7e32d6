"""A stand-in for the Hugging Face hub on this machine: it serves dataset repositories from local folders, and fails
when a test says so.

In one process (`huggingface_hub` and `datasets` read HF_ENDPOINT once, when they are imported, so `patch` sets what
they made of it):

    with HubStandIn({"owner/name": folder}) as hub:
        hub.patch(monkeypatch, tmp_path)             # the libraries now talk to `hub` and cache below tmp_path
        hub.fail("part-0.parquet", 503, times=2)     # the next two requests with this in their path
        ...
        assert hub.bytes_sent("part-0.parquet") < 1000

For a program of its own: `subprocess.run(..., env={**os.environ, **hub.environment(tmp_path)})`.

Served are the endpoints that reading needs, as huggingface_hub 2.4 and datasets 5.2 ask for them:

    GET  /api/datasets/ID[/revision/REV]               id and commit sha
    GET  /api/datasets/ID/tree/REV[/FOLDER]?recursive  files and folders
    POST /api/datasets/ID/paths-info/REV               the same for single paths
    HEAD, GET /datasets/ID/resolve/REV/PATH            a file, by range or whole

REV is `main` or the commit sha, `hub.sha[ID]`, a hash of the folder's content when the stand-in starts. A file's
resolve address also serves as an `http://` url that has nothing to do with the hub. `write_fineweb` makes a
repository like HuggingFaceFW/fineweb.
"""

import contextlib
import hashlib
import json
import random
import re
import socket
import threading
import urllib.parse
from collections.abc import Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

FINEWEB_CARD = """---
configs:
- config_name: default
  data_files:
  - split: train
    path: data/*/*
- config_name: sample-10BT
  data_files:
  - split: train
    path: sample/10BT/*
---
# FineWeb, a few rows of it
"""


@dataclass
class Request:
    """One answered request: `first` and `last` are the bytes asked for (None: the whole file), `sent` body bytes."""

    method: str
    path: str
    status: int = 0
    first: int | None = None
    last: int | None = None
    sent: int = 0


@dataclass
class _Fault:
    pattern: str
    kind: int | str
    times: int
    headers: Mapping[str, str]


class HubStandIn:
    """Serves `repositories` (id -> folder) on 127.0.0.1 while used as a context manager.

    endpoint: the address, for HF_ENDPOINT.   requests: every request answered so far, in order.
    """

    def __init__(self, repositories: Mapping[str, Path]) -> None:
        self.repositories = dict(repositories)
        self.sha = {name: _content_sha(folder) for name, folder in self.repositories.items()}
        self.requests: list[Request] = []
        self.lock = threading.Lock()
        self.silence = threading.Event()  # set when the stand-in ends, so that no answer outlives it
        self.connections: set[socket.socket] = set()
        self._faults: list[_Fault] = []

    def __enter__(self) -> "HubStandIn":
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.hub = self
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Die: open connections break, new ones are refused."""
        self.silence.set()
        self._server.shutdown()
        self._server.server_close()
        with self.lock:
            for connection in self.connections:
                _break(connection)

    def fail(self, pattern: str, kind: int | str, times: int = 1, headers: Mapping[str, str] | None = None) -> None:
        """Let the next `times` requests whose path and query match the regular expression `pattern` fail.

        kind: an HTTP status (answered with `headers`), "drop" (half of the body, then the connection breaks), "hang"
            (no answer until the stand-in ends) or "whole" (the range is ignored).
        """
        self._faults.append(_Fault(pattern, kind, times, headers or {}))

    def pending_faults(self) -> int:
        """Failures ordered but not yet met by a request."""
        return sum(fault.times for fault in self._faults)

    def take_fault(self, path: str) -> _Fault | None:
        with self.lock:
            for fault in self._faults:
                if fault.times and re.search(fault.pattern, path):
                    fault.times -= 1
                    return fault
        return None

    def ranges(self, pattern: str) -> list[tuple[int, int]]:
        """(first, last) byte of every range asked for, in paths that match `pattern`."""
        matching = (r for r in self.requests if re.search(pattern, r.path) and r.method == "GET")
        return [(r.first, r.last) for r in matching if r.first is not None and r.last is not None]

    def bytes_sent(self, pattern: str) -> int:
        """Body bytes sent so far for paths that match `pattern`."""
        return sum(request.sent for request in self.requests if re.search(pattern, request.path))

    def url(self, name: str, path: str) -> str:
        """The plain http address of a file."""
        return f"{self.endpoint}/datasets/{name}/resolve/main/{path}"

    def environment(self, home: Path, timeout: int = 1) -> dict[str, str]:
        """Environment variables that point a new process at this hub; caches go below `home`, reads time out after
        `timeout` seconds (whole ones, the library wants)."""
        return {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(home),
            "NO_PROXY": "127.0.0.1",
            "HF_HUB_OFFLINE": "0",
            "HF_DATASETS_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DOWNLOAD_TIMEOUT": str(timeout),
            "HF_HUB_ETAG_TIMEOUT": str(timeout),
        }

    def patch(self, monkeypatch: Any, home: Path, timeout: float = 1.0) -> None:
        """The same within this process, until `monkeypatch` undoes it."""
        import datasets
        from huggingface_hub import HfFileSystem, constants

        monkeypatch.setattr(constants, "ENDPOINT", self.endpoint)
        template = self.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "AGENT_HARNESSES_PATH", str(home / "agents.json"), raising=False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", timeout)
        monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", timeout)
        monkeypatch.setattr(datasets.config, "HF_ENDPOINT", self.endpoint)
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(
            datasets.config, "HUB_DATASETS_URL", self.endpoint + "/datasets/{repo_id}/resolve/{revision}/{path}"
        )
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", home / "datasets")
        monkeypatch.setattr(datasets.config, "DOWNLOADED_DATASETS_PATH", home / "datasets" / "downloads")
        HfFileSystem.clear_instance_cache()  # it remembers listings by endpoint, and ports are used again


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    hub: HubStandIn

    def handle_error(self, *_: object) -> None:
        pass  # clients hang up in the middle on purpose


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # connections stay open, as on the hub
    disable_nagle_algorithm = True  # else each answer waits 40 ms for an acknowledgement
    server: _Server

    def setup(self) -> None:
        super().setup()
        with self.server.hub.lock:
            self.server.hub.connections.add(self.connection)

    def finish(self) -> None:
        with self.server.hub.lock:
            self.server.hub.connections.discard(self.connection)
        super().finish()

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def _answer(self) -> None:
        hub = self.server.hub
        posted = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.record = Request(self.command, self.path)
        with hub.lock:
            hub.requests.append(self.record)
        fault = hub.take_fault(self.path)
        self.fault = fault.kind if fault else None
        if isinstance(self.fault, int):
            assert fault is not None
            return self._send(self.fault, b"", {"X-Error-Message": "ordered by the test", **fault.headers})
        if self.fault == "hang":
            hub.silence.wait(60)
        if self.fault == "hang" or hub.silence.is_set():
            return _break(self.connection)
        address = urllib.parse.urlsplit(self.path)
        path = urllib.parse.unquote(address.path)
        query = dict(urllib.parse.parse_qsl(address.query))
        for name, folder in hub.repositories.items():
            if path.startswith(f"/datasets/{name}/resolve/"):
                return self._file(name, folder, *path.removeprefix(f"/datasets/{name}/resolve/").partition("/")[::2])
            if path == f"/api/datasets/{name}" or path.startswith(f"/api/datasets/{name}/"):
                kind, _, rest = path.removeprefix(f"/api/datasets/{name}").strip("/").partition("/")
                return self._api(name, folder, kind, rest, query, posted)
        return self._missing("RepoNotFound", "Repository not found")

    def _api(self, name: str, folder: Path, kind: str, rest: str, query: dict[str, str], posted: bytes) -> None:
        sha = self.server.hub.sha[name]
        revision, _, path = rest.partition("/")
        if (revision or "main") not in ("main", sha):
            return self._missing("RevisionNotFound", f"Invalid rev id: {revision}")
        if kind in ("", "revision"):
            files = [file.relative_to(folder).as_posix() for file in sorted(folder.rglob("*")) if file.is_file()]
            return self._json({"id": name, "sha": sha, "siblings": [{"rfilename": file} for file in files]})
        if kind == "paths-info":
            wanted = json.loads(posted)["paths"]
            wanted = [wanted] if isinstance(wanted, str) else wanted
            return self._json([_entry(folder, folder / path) for path in wanted if (folder / path).exists()])
        if kind != "tree" or not (folder / path).is_dir():
            return self._missing("EntryNotFound", f"{path} does not exist")
        found = sorted((folder / path).glob("**/*" if query.get("recursive", "false").lower() == "true" else "*"))
        return self._json([_entry(folder, entry) for entry in found])

    def _file(self, name: str, folder: Path, revision: str, path: str) -> None:
        sha = self.server.hub.sha[name]
        if revision not in ("main", sha):
            return self._missing("RevisionNotFound", f"Invalid rev id: {revision}")
        if not (folder / path).is_file():
            return self._missing("EntryNotFound", "Entry not found", {"X-Repo-Commit": sha})
        body = (folder / path).read_bytes()
        size = len(body)
        headers = {"X-Repo-Commit": sha, "ETag": f'"{hashlib.sha1(body).hexdigest()}"', "Accept-Ranges": "bytes"}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not asked or self.fault == "whole":
            return self._send(200, body, headers)
        first, last = int(asked[1]), min(int(asked[2] or size - 1), size - 1)
        self.record.first, self.record.last = first, last
        if first >= size:
            return self._send(416, b"", {"Content-Range": f"bytes */{size}"})
        return self._send(206, body[first : last + 1], {**headers, "Content-Range": f"bytes {first}-{last}/{size}"})

    def _missing(self, code: str, message: str, headers: dict[str, str] | None = None) -> None:
        self._send(404, b"", {"X-Error-Code": code, "X-Error-Message": message, **(headers or {})})

    def _json(self, value: object) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.record.status = status
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        part = b"" if self.command == "HEAD" else body[: len(body) // 2] if self.fault == "drop" else body
        self.record.sent = len(part)
        self.wfile.write(part)
        self.wfile.flush()
        if self.fault == "drop":
            _break(self.connection)


def _break(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):  # the client was faster
        connection.shutdown(socket.SHUT_RDWR)


def _entry(folder: Path, path: Path) -> dict[str, object]:
    """One line of a tree listing."""
    name = path.relative_to(folder).as_posix()
    oid = hashlib.sha1(name.encode()).hexdigest()
    if path.is_dir():
        return {"type": "directory", "oid": oid, "size": 0, "path": name}
    return {"type": "file", "oid": oid, "size": path.stat().st_size, "path": name}


def _content_sha(folder: Path) -> str:
    digest = hashlib.sha1()
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            digest.update(file.relative_to(folder).as_posix().encode() + file.read_bytes())
    return digest.hexdigest()


def fineweb_rows(count: int, seed: int = 0, words: int = 400) -> list[dict[str, Any]]:
    """Rows with FineWeb's nine columns and about `words` words of text, of a vocabulary that does not compress away."""
    rng = random.Random(seed)
    vocabulary = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 10))) for _ in range(5000)]
    rows = []
    for number in range(count):
        text = " ".join(rng.choices(vocabulary, k=rng.randint(words // 2, words * 3 // 2)))
        identity = f"{rng.getrandbits(128):032x}"
        rows.append(
            {
                "text": text,
                "id": f"<urn:uuid:{identity[:8]}-{identity[8:12]}-{identity[12:16]}-{identity[16:20]}-{identity[20:]}>",
                "dump": "CC-MAIN-2024-10",
                "url": f"https://example.org/{seed}/{number}",
                "date": f"2024-02-{number % 28 + 1:02d}T03:04:05Z",
                "file_path": f"s3://commoncrawl/crawl-data/CC-MAIN-2024-10/segments/{number % 7}/warc.gz",
                "language": "en",
                "language_score": round(rng.uniform(0.65, 1.0), 6),
                "token_count": len(text) // 4,
            }
        )
    return rows


def write_fineweb(folder: Path, rows: int = 400, row_groups: int = 4) -> Path:
    """A repository like HuggingFaceFW/fineweb: two parquet files of `rows` rows in the subset `default`, one of a
    quarter as many in `sample-10BT`, a dataset card that says so."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    files = {
        "data/CC-MAIN-2024-10/000_00000.parquet": fineweb_rows(rows, seed=1),
        "data/CC-MAIN-2024-10/000_00001.parquet": fineweb_rows(rows, seed=2),
        "sample/10BT/000_00000.parquet": fineweb_rows(rows // 4, seed=1),
    }
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(content), folder / name, row_group_size=-(-len(content) // row_groups))
    (folder / "README.md").write_text(FINEWEB_CARD)
    return folder
