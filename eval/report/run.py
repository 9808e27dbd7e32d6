"""What one run folder holds: recipe, training log, summary and the results of evaluations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from eval.checkpoint import results_folder
from eval.sweep import Sweep, read_sweep
from s2.files import read_json
from s2.model.config import ModelConfig
from s2.model.hf import fingerprint, load_config
from s2.recipe import load_recipe
from s2.training.gate import BEFORE, what_is_wrong
from s2.training.metrics import heldout_sets, read_metrics

_TABLE = ("results", "versions", "n-shot", "higher_is_better")  # what lm-eval makes a table of


@dataclass(frozen=True)
class Scores:
    """One result file: `content` as it stands there."""

    file: Path
    content: dict[str, Any]


@dataclass(frozen=True)
class Run:
    """One column of a report.

    Attributes:
        folder, name: of the run; the name is the shortest that tells it from the others.
        recipe: config.yaml, every key as it was resolved; {} where there is none, as for a checkpoint of others.
        model: None where no file says it.
        log: rows of logs/metrics.csv.
        summary, gate: of the files of these names, {} where there is none.
        gate_before: what the gate of the weights that the stage began from said; {} where nothing says it.
        environment: commit, versions, device and command: environment.json, or the record beside the folder.
        fingerprint: of the weights in `hf`.
        lm, needle, ruler, positions: results by the stem of their files. sweeps: those of `needle` by cell.
        left_out: what is in the folder and not on the page, and why.
    """

    folder: Path
    name: str = ""
    recipe: dict[str, Any] = field(default_factory=dict)
    model: ModelConfig | None = None
    log: tuple[dict[str, float], ...] = ()
    summary: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    gate: dict[str, Any] = field(default_factory=dict)
    gate_before: dict[str, Any] = field(default_factory=dict)
    fingerprint: str | None = None
    lm: dict[str, Scores] = field(default_factory=dict)
    needle: dict[str, Scores] = field(default_factory=dict)
    ruler: dict[str, Scores] = field(default_factory=dict)
    positions: dict[str, Scores] = field(default_factory=dict)
    sweeps: dict[str, Sweep] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()

    @property
    def scores(self) -> list[Scores]:
        return [each for kind in (self.lm, self.needle, self.ruler, self.positions) for each in kind.values()]

    @property
    def data(self) -> dict[str, Any]:
        return self.recipe.get("data", {}).get("init_args", {})

    @property
    def seq_len(self) -> int | None:
        """Tokens of a training sequence; else the model's context."""
        return self.data.get("seq_len") or (self.model.max_position_embeddings if self.model else None)

    def last(self, key: str) -> float | None:
        """The last value of a column of the training log."""
        return next((row[key] for row in reversed(self.log) if key in row), None)

    def series(self, key: str, over: str) -> list[tuple[float, float]]:
        """(value of `over`, value of `key`) of the rows that have both."""
        return [(row[over], row[key]) for row in self.log if key in row and over in row]

    @property
    def heldout_sets(self) -> list[str]:
        return heldout_sets(self.log)


def read_runs(folders: Sequence[Path], names: Sequence[str] | None = None) -> list[Run]:
    """The runs in their order, one that is named twice once.

    names: what to call them; default: `labels`.

    Raises:
        FileNotFoundError: no such folder, or nothing in it that a report shows.
        ValueError: a broken file, which is named; not one name of its own for each run.
    """
    runs = list({run.folder.resolve(): run for run in map(read_run, folders)}.values())
    names = names or labels([run.folder for run in runs])
    if len(set(names)) != len(runs):
        raise ValueError(f"--names {' '.join(names)}: {len(set(names))} different names for {len(runs)} runs")
    return [replace(run, name=name) for run, name in zip(runs, names, strict=True)]


def read_run(folder: Path) -> Run:
    """A run folder, its `hf`, or a Hugging Face folder of others that was evaluated here. Raises as `read_runs`."""
    if not folder.is_dir():
        raise FileNotFoundError(f"run {folder}: no such folder; expected something like runs/demo/extend-2k")
    results, given = results_folder(folder), folder
    folder = results.parent
    weights = next((place for place in (folder / "hf", folder, given) if (place / "config.json").is_file()), None)
    now = fingerprint(weights) if weights and any(weights.glob("*.safetensors")) else None  # of results brought here
    recipe = load_recipe(folder / "config.yaml") if (folder / "config.yaml").is_file() else {}
    found: dict[str, Any] = {kind: {} for kind in ("lm", "needle", "ruler", "positions")}
    left_out = []
    for file in sorted(results.glob("*.json"), key=lambda file: file.stem):
        content = read_json(file)
        if (kind := _kind(file, content)) is None:
            continue
        about = content["s2"] if kind == "lm" else content
        if now and about.get("fingerprint") not in (None, now):
            left_out.append(f"{file.name} (of other weights than the run has now)")
        elif kind == "lm" or content.get("samples" if kind == "needle" else "summary"):
            found[kind][file.stem] = Scores(file, content)
        else:
            left_out.append(f"{file.name} (not finished)")
    gate = _object(folder / "gate.json") or _object(results / "gate.json")
    if now and gate.get("fingerprint") not in (None, now):
        gate = {}
        left_out.append("gate.json (of other weights than the run has now)")
    if gate and (wrong := what_is_wrong(gate)):
        gate = {}
        left_out.append(f"gate.json ({wrong})")
    summary = _object(folder / "summary.json")
    run = Run(
        folder=folder,
        recipe=recipe,
        model=_model(weights, recipe),
        log=tuple(read_metrics(folder / "logs" / "metrics.csv", strict=True)),
        summary=summary,
        environment=_environment(folder),
        gate=gate,
        gate_before=summary.get("gate_before") or _object(folder / BEFORE),
        fingerprint=now,
        sweeps={stem: read_sweep([scores.file]) for stem, scores in found["needle"].items()},
        left_out=tuple(left_out),
        **found,
    )
    if not (run.scores or run.log or left_out):
        raise FileNotFoundError(
            f"run {folder} has no results yet: neither results/*.json (`make eval`, `make needle`) nor a training log"
            " in logs/metrics.csv"
        )
    return run


def labels(folders: Sequence[Path]) -> list[str]:
    """The last two parts of each path, or as many more as tell it from the others: A/demo/ext and B/demo/ext."""
    paths = [folder.resolve().parts for folder in folders]

    def last(parts: tuple[str, ...], count: int) -> str:
        return "/".join(parts[-count:]).replace("//", "/").removeprefix("/" if count < len(parts) else "")

    def label(parts: tuple[str, ...]) -> str:
        shortest = (n for n in range(2, len(parts)) if [last(p, n) for p in paths].count(last(parts, n)) == 1)
        return last(parts, next(shortest, len(parts)))

    return [label(parts) for parts in paths]


def _kind(file: Path, content: Any) -> str | None:
    """Which results a file holds; None where it holds others."""
    if not isinstance(content, dict) or ".old" in file.name:  # as earlier versions set sweeps aside
        return None
    if content.get("kind") in ("needle", "ruler", "positions"):
        return content["kind"]
    if "results" not in content or not isinstance(content.get("s2"), dict):
        return None
    parts = {"s2": content["s2"].get("tasks"), **{key: content.get(key) for key in _TABLE}}
    if missing := [key for key, value in parts.items() if not isinstance(value, list if key == "s2" else dict)]:
        raise ValueError(f"{file}: not as eval.lm writes it ({missing[0]!r} is missing or incomplete); move it away")
    return "lm"


def _object(file: Path) -> dict[str, Any]:
    content = read_json(file) if file.is_file() else {}
    if not isinstance(content, dict):
        raise ValueError(f"{file}: expected a JSON object, got {type(content).__name__}")
    return content


def _environment(folder: Path) -> dict[str, Any]:
    """environment.json, or what the queue that started the run has written beside its folder."""
    beside = folder.with_name(f"{folder.name}.run.json")
    if (folder / "environment.json").is_file() or not beside.is_file():
        return _object(folder / "environment.json")
    content = read_json(beside)
    return content if isinstance(content, dict) and "commit" in content else {}


def _model(weights: Path | None, recipe: dict[str, Any]) -> ModelConfig | None:
    if weights is not None:
        return load_config(weights)
    section = recipe.get("model", {})
    values = section.get("config") or {}
    if section.get("init_from") or "hidden_size" not in values:
        return None
    return ModelConfig.from_dict(values, "config.yaml")
