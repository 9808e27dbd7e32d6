"""Stock lm-eval tasks on local files: the task's own prompt and metrics, rows from a folder, not the hub.

    DATA/hellaswag/validation.jsonl.gz     one folder per task, one file per split (.jsonl or .jsonl.gz),
    DATA/mmlu/test.jsonl.gz                with the columns of the hub dataset

`mmlu` holds the rows of all mmlu_* tasks, told apart by a `subject` column that says what the task's
dataset_name says.
"""

import gzip
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from lm_eval.tasks._index import Entry, Kind
from lm_eval.tasks._yaml_loader import load_yaml

from s2.files import write_text

_SPLITS = ("training_split", "validation_split", "test_split")


@dataclass
class LocalTasks:
    """What `write_local_tasks` found: remarks for the reader of the results, and the files that are read."""

    remarks: list[str] = field(default_factory=list)
    files: set[Path] = field(default_factory=set)


def write_local_tasks(index: Mapping[str, Entry], names: Iterable[str], data: Path, folder: Path) -> LocalTasks:
    """Write, into `folder`, a YAML per stock task behind `names` that includes its file and reads `data`.

    `names` are tasks, groups or tags of lm-eval's `index`; groups come along, so `folder` alone is enough
    for a TaskManager.

    Raises FileNotFoundError for a data folder, a task's folder or the split it is evaluated on that is
    missing; ValueError for a joined file without the task's rows, or a group that cannot read local files.
    """
    if not data.is_dir():
        raise FileNotFoundError(f"--data-dir {data}: no such folder")
    folder.mkdir(parents=True, exist_ok=True)
    found = LocalTasks()
    waiting, seen = list(names), set()
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        entry = index[name]
        if entry.kind == Kind.TAG:
            waiting += sorted(entry.tags)
        elif entry.kind == Kind.GROUP:
            waiting += _write_group(entry, folder)
        else:
            _write_task(entry, data, folder, found)
    found.remarks.sort()
    return found


def _write_group(entry: Entry, folder: Path) -> list[str]:
    """Write a group's YAML; return the names of its members."""
    members = [
        member if isinstance(member, str) else member.get("task", member.get("group"))
        for member in load_yaml(_path(entry), resolve_func=False)["task"]
    ]
    if inline := [member for member in members if not isinstance(member, str)]:
        raise ValueError(f"--tasks {entry.name}: its inline group {inline[0]!r} cannot read --data-dir; name the tasks")
    _write_yaml(folder / f"{entry.name}.group.yaml", {"include": str(_path(entry)), "group": entry.name})
    return members


def _write_task(entry: Entry, data: Path, folder: Path, found: LocalTasks) -> None:
    stock = load_yaml(_path(entry), resolve_func=False)
    words = entry.name.split("_")
    candidates = ["_".join(words[:n]) for n in range(len(words), 0, -1)]  # mmlu_astronomy, then mmlu
    source = next((data / name for name in candidates if (data / name).is_dir()), None)
    if source is None:
        raise FileNotFoundError(
            f"--data-dir {data} has no folder for task {entry.name!r} (looked for: {', '.join(candidates)});"
            f" it has: {', '.join(sorted(path.name for path in data.iterdir() if path.is_dir()))}"
        )
    override: dict[str, Any] = {"include": str(_path(entry)), "task": entry.name}
    override |= {"dataset_path": "json", "dataset_name": None}
    files: dict[str, str] = {}
    evaluated = stock.get("test_split") or stock.get("validation_split")
    fewshot = stock.get("fewshot_split")
    for split in dict.fromkeys(filter(None, [*(stock.get(key) for key in _SPLITS), fewshot])):
        file = _split_file(source, split)
        if file is not None:
            if file not in found.files:
                _check_rows(file)
            found.files.add(file)
            if source.name != entry.name:
                file = _rows_of_task(file, stock, folder / entry.name / f"{split}.jsonl", entry.name)
            files[split] = str(file.resolve())
        elif split == evaluated:
            raise FileNotFoundError(
                f"task {entry.name!r} is evaluated on its {split} split; expected {source / split}.jsonl or .jsonl.gz"
            )
        else:
            override |= {key: None for key in _SPLITS if stock.get(key) == split}
            if split == (fewshot or stock.get("training_split")):
                override["fewshot_split"] = None
                found.remarks.append(
                    f"{entry.name}: no local {split} split, so few-shot examples come from another one, and never are"
                    " the document that is asked about"
                )
    _write_yaml(folder / f"{entry.name}.yaml", override | {"dataset_kwargs": {"data_files": files}})


def _split_file(source: Path, split: str) -> Path | None:
    candidates = (source / f"{split}{suffix}" for suffix in (".jsonl.gz", ".jsonl"))
    return next((file for file in candidates if file.is_file()), None)


def _check_rows(file: Path) -> None:
    """Raises ValueError for a file without rows, or the first line that is none."""
    opener = gzip.open if file.suffix == ".gz" else open
    rows = 0
    try:
        with opener(file, "rt", encoding="utf-8") as stream:
            for line in stream:
                if not isinstance(json.loads(line), dict):
                    raise ValueError("not a JSON object")
                rows += 1
    except (ValueError, EOFError, gzip.BadGzipFile) as error:
        raise ValueError(f"{file}, line {rows + 1}: {error}") from None
    if rows == 0:
        raise ValueError(f"{file} is empty; expected one JSON object a line")


def _rows_of_task(file: Path, stock: Mapping[str, Any], target: Path, task: str) -> Path:
    """Copy the rows whose `subject` is the task's dataset_name."""
    opener = gzip.open if file.suffix == ".gz" else open
    with opener(file, "rt", encoding="utf-8") as stream:
        rows = [line for line in stream if json.loads(line).get("subject") == stock.get("dataset_name")]
    if not rows:
        raise ValueError(
            f"{file} has no row whose 'subject' is {stock.get('dataset_name')!r}, which task {task!r} needs"
        )
    write_text(target, "".join(rows))
    return target


def _path(entry: Entry) -> Path:
    if entry.yaml_path is None:
        raise ValueError(f"--tasks {entry.name}: it has no YAML file and cannot read --data-dir")
    return entry.yaml_path


def _write_yaml(file: Path, content: Mapping[str, Any]) -> None:
    write_text(file, yaml.safe_dump(dict(content), sort_keys=False))
