"""Stock lm-eval tasks on local files: the task's own prompt and metrics, rows from a folder, not the hub.

    DATA/hellaswag/validation.jsonl.gz     one folder per task, one file per split (.jsonl or .jsonl.gz),
    DATA/mmlu/test.jsonl.gz                with the columns of the hub dataset

`mmlu` holds the rows of all mmlu_* tasks, told apart by a `subject` column that says what the task's
dataset_name says.
"""

import gzip
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from lm_eval.tasks import TaskManager

from s2.files import write_text

_SPLITS = ("training_split", "validation_split", "test_split")


@dataclass
class LocalTasks:
    """What `write_local_tasks` found: remarks for the reader of the results, and the files that are read."""

    remarks: list[str] = field(default_factory=list)
    files: set[Path] = field(default_factory=set)


def write_local_tasks(stock: TaskManager, names: Iterable[str], data: Path, folder: Path) -> LocalTasks:
    """Write, into `folder`, a YAML per stock task behind `names` that includes its file and reads `data`.

    `names` are tasks, groups or tags of lm-eval's `stock`; groups come along, so `folder` alone is enough for a
    TaskManager.

    Raises FileNotFoundError for a data folder, a task's folder or the split it is evaluated on that is
    missing; ValueError for a joined file without the task's rows, or a group that cannot read local files.
    """
    if not data.is_dir():
        raise FileNotFoundError(f"--data-dir {data}: no such folder")
    folder.mkdir(parents=True, exist_ok=True)
    found = LocalTasks()
    waiting, seen = list(names), set()
    while waiting:
        if (name := waiting.pop()) in seen:
            continue
        seen.add(name)
        entry = stock.task_index[name]
        config = entry.cfg or {}
        if name in stock.all_tags:
            waiting += sorted(entry.tags)
            continue
        if entry.yaml_path is None:
            raise ValueError(f"--tasks {name}: it has no YAML file and cannot read --data-dir")
        override: dict[str, Any] = {"include": str(entry.yaml_path)}
        if name in stock.all_groups:
            waiting += _members(name, config)
            override["group"] = name
        else:
            override |= {"task": name} | _local_data(name, config, data, folder, found)
        write_text(folder / f"{name}.yaml", yaml.safe_dump(override, sort_keys=False))
    found.remarks.sort()
    return found


def _members(name: str, group: Mapping[str, Any]) -> list[str]:
    members = [m if isinstance(m, str) else m.get("task", m.get("group")) for m in group["task"]]
    if inline := [member for member in members if not isinstance(member, str)]:
        raise ValueError(f"--tasks {name}: its inline group {inline[0]!r} cannot read --data-dir; name the tasks")
    return members


def _local_data(name: str, stock: Mapping[str, Any], data: Path, folder: Path, found: LocalTasks) -> dict[str, Any]:
    """The keys of a task's YAML that say where its rows are."""
    words = name.split("_")
    candidates = ["_".join(words[:n]) for n in range(len(words), 0, -1)]  # mmlu_astronomy, then mmlu
    source = next((data / candidate for candidate in candidates if (data / candidate).is_dir()), None)
    if source is None:
        raise FileNotFoundError(
            f"--data-dir {data} has no folder for task {name!r} (looked for: {', '.join(candidates)});"
            f" it has: {', '.join(sorted(path.name for path in data.iterdir() if path.is_dir()))}"
        )
    override: dict[str, Any] = {"dataset_path": "json", "dataset_name": None}
    files: dict[str, str] = {}
    evaluated = stock.get("test_split") or stock.get("validation_split")
    fewshot = stock.get("fewshot_split")
    for split in dict.fromkeys(filter(None, [*(stock.get(key) for key in _SPLITS), fewshot])):
        choices = (source / f"{split}{suffix}" for suffix in (".jsonl.gz", ".jsonl"))
        file = next((choice for choice in choices if choice.is_file()), None)
        if file is not None:
            if file not in found.files and not sum(1 for _ in _rows(file)):
                raise ValueError(f"{file} is empty; expected one JSON object a line")
            found.files.add(file)
            if source.name != name:
                file = _rows_of_task(file, stock.get("dataset_name"), folder / name / f"{split}.jsonl", name)
            files[split] = str(file.resolve())
        elif split == evaluated:
            raise FileNotFoundError(
                f"task {name!r} is evaluated on its {split} split; expected {source / split}.jsonl or .jsonl.gz"
            )
        else:
            override |= {key: None for key in _SPLITS if stock.get(key) == split}
            if split == (fewshot or stock.get("training_split")):
                override["fewshot_split"] = None
                found.remarks.append(
                    f"{name}: no local {split} split, so few-shot examples come from another one, and never are"
                    " the document that is asked about"
                )
    return override | {"dataset_kwargs": {"data_files": files}}


def _rows(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each line and its object. Raises ValueError for the first line that is none."""
    opener = gzip.open if file.suffix == ".gz" else open
    number = 1
    try:
        with opener(file, "rt", encoding="utf-8") as stream:
            for line in stream:
                if not isinstance(row := json.loads(line), dict):
                    raise ValueError("not a JSON object")
                yield line, row
                number += 1
    except (ValueError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{file}, line {number}: {error}") from None


def _rows_of_task(file: Path, subject: str | None, target: Path, task: str) -> Path:
    """Copy the rows whose `subject` is the task's dataset_name."""
    if not (lines := [line for line, row in _rows(file) if row.get("subject") == subject]):
        raise ValueError(f"{file} has no row whose 'subject' is {subject!r}, which task {task!r} needs")
    write_text(target, "".join(lines))
    return target
