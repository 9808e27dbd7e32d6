"""Answers of an evaluation that is not finished: what is interrupted goes on where it stopped.

They are kept beside the results, in a folder of their own, a line for each request, until the table is written.
"""

import hashlib
import json
import logging
import time
from pathlib import Path
from typing import Any

from s2.files import make_folder, remove_files, write_text

log = logging.getLogger(__name__)
_FLUSH_SECONDS = 5.0


class Answers:
    """Results by request, in memory and in `folder/.unfinished/<name>.jsonl`.

    Args:
        folder: of the results.
        name: of the table.
        identity: what the answers depend on beyond the requests; a file of another identity is begun anew.
    """

    def __init__(self, folder: Path, name: str, identity: dict[str, Any]) -> None:
        self._folder = make_folder(folder / ".unfinished", "answers of unfinished evaluations")
        self._file = self._folder / f"{name}.jsonl"
        header = json.dumps(identity, sort_keys=True)
        lines = self._file.read_text(encoding="utf-8").splitlines() if self._file.is_file() else []
        self._known: dict[str, tuple[Any, str | None]] = {}
        if lines[:1] == [header]:
            self._known = {key: (result, cut) for key, result, cut in _rows(lines[1:])}
        rows = [json.dumps([key, *value]) for key, value in self._known.items()]
        write_text(self._file, "".join(f"{line}\n" for line in (header, *rows)))  # without a line cut by a kill
        self._stream = self._file.open("a", encoding="utf-8")
        self._flushed = time.monotonic()

    def __len__(self) -> int:
        return len(self._known)

    def get(self, kind: str, args: Any) -> tuple[Any, str | None] | None:
        """The result of a request and what of it was cut; None where it is not known."""
        return self._known.get(_key(kind, args))

    def add(self, kind: str, args: Any, result: Any, cut: str | None) -> None:
        """Keep a result. It is on its way to the disk within seconds; where that is full, only a warning says so."""
        if self._stream.closed:
            return
        try:
            self._stream.write(json.dumps([_key(kind, args), result, cut]) + "\n")
            if time.monotonic() - self._flushed > _FLUSH_SECONDS:
                self._stream.flush()
                self._flushed = time.monotonic()
        except OSError as error:
            log.warning("%s cannot be written (%s): an interruption would lose what is scored now", self._file, error)
            self.close()

    def close(self) -> None:
        """Write out what is kept so far."""
        try:
            self._stream.close()
        except OSError as error:
            log.warning("%s cannot be written (%s)", self._file, error)

    def discard(self) -> None:
        """Forget them: the table is written."""
        self.close()
        remove_files(self._folder, self._file.name)


def _rows(lines: list[str]) -> list[tuple[str, Any, str | None]]:
    rows = []
    for line in lines:
        try:
            key, result, cut = json.loads(line)
        except ValueError:
            continue  # cut by a kill
        rows.append((key, tuple(result) if isinstance(result, list) else result, cut))
    return rows


def _key(kind: str, args: Any) -> str:
    return hashlib.sha256(json.dumps([kind, args], sort_keys=True).encode()).hexdigest()[:32]
