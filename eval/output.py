"""Result files: JSON and text that a reader never sees half-written."""

import json
import os
from pathlib import Path
from typing import Any


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` in one step: a crash leaves the old file or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def write_json(path: Path, value: Any) -> None:
    """`write_text` of indented JSON; what JSON cannot say (dtypes, functions, paths) becomes its name."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False, default=_name) + "\n")


def read_json(path: Path) -> Any:
    """Parse a JSON file. Raises FileNotFoundError, or ValueError that names the file and the broken line."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {error.lineno}: not valid JSON ({error.msg})") from error


def _name(value: Any) -> str:
    return value.__qualname__ if callable(value) and hasattr(value, "__qualname__") else str(value)
