"""Whether a checkpoint may go on to the next stage: its figures against thresholds.

    python -m eval.gate --ckpt runs/1.3b/extend-32k/hf --config recipes/1.3b/gates/extend-32k.yaml

    documents: held-out.jsonl.gz              # of the loss; haystack: of the needle; default: the run's held-out ones
    base: runs/1.3b/pretrain/hf               # only for max_rise and max_drop
    loss:
      - {length: 8k, max_rise: 0.02}          # nats per token over the base checkpoint's, on the same documents
      - {length: 32k, from: 16k, to: 32k, max: 2.9}     # of the tokens at these positions (powers of two)
    needle:
      - {length: 32k, min: 0.95}              # kind: single, score: exact
    shared_haystack: true                     # of the needle, as in eval.needle; default: false
    data_dir: data/eval                       # of the tasks (--data-dir), without it the hub; limit: 500
    tasks:
      - {task: piqa, metric: acc, max_drop: 0.01}       # of what is better the lower it is: max or max_rise
      - {task: s2_heldout, metric: bits_per_byte, max_rise: 0.01}

`gate.json`, beside the other results, has each figure beside its threshold and whether all hold, and the losses by
bucket. The figures come from `eval.positions`, `eval.needle` and `eval.lm`, whose files say more; samples that are
known are not computed again. A task whose rows are neither on this machine nor to be had from the hub is left out,
which gate.json and the stage after it say. The command ends with code 2 where the gate is not passed.
"""

from __future__ import annotations

import argparse
import glob
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from eval import lm, needle, positions
from eval.checkpoint import Checkpoint, results_folder
from eval.grid import SAMPLES, parse_length
from eval.heldout import find_heldout
from eval.needle import check_lengths
from eval.needle_prompts import KINDS
from eval.positions import DOCUMENTS
from eval.results import threshold
from eval.suite import Row, rows_of
from s2 import ending, files
from s2.arguments import DTYPES, new_parser, options_named, path
from s2.inference.folder import check_folder
from s2.recipe import load_recipe
from s2.training.gate import holds, thresholds_digest

Length = Annotated[int, BeforeValidator(lambda value: parse_length(str(value)))]
Begin = Annotated[int, BeforeValidator(lambda value: 0 if str(value) == "0" else parse_length(str(value)))]
Count = Annotated[int, Field(strict=True, ge=1)]
Number = Annotated[float, Field(strict=True)]
Loss = Annotated[float, Field(strict=True, ge=0)]
Share = Annotated[float, Field(strict=True, ge=0, le=1)]
Change = Annotated[float, Field(strict=True, ge=-1, le=1)]  # of a share
FILE = "gate.json"
_KEYS = {"--lengths": "length", "--documents": "documents:", "--haystack": "haystack:", "--limit": "limit"}  # of a YAML


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class LossCheck(_Section):
    """Mean loss of the tokens at positions `from` to `to` of documents read to `length`, in nats."""

    length: Length
    begin: Begin = Field(0, alias="from")
    end: Length | None = Field(None, alias="to")
    max: Loss | None = None
    max_rise: Number | None = None

    @model_validator(mode="after")
    def _check(self) -> LossCheck:
        _one_of(self, "max", "max_rise")
        edges = {edge for pair in positions.buckets(self.length) for edge in pair}
        for name, edge in (("from", self.begin), ("to", self.end or self.length)):
            if edge not in edges:
                raise ValueError(f"{name}: {edge} is no border of the buckets {sorted(edges)}")
        if self.begin >= (self.end or self.length):
            raise ValueError(f"from: {self.begin} is not below to: {self.end or self.length}")
        return self


class NeedleCheck(_Section):
    """Mean score over all depths of a length."""

    length: Length
    kind: Literal[tuple(KINDS)] = "single"  # type: ignore[valid-type]
    min: Share | None = None
    max_drop: Change | None = None

    @model_validator(mode="after")
    def _check(self) -> NeedleCheck:
        _one_of(self, "min", "max_drop")
        return self


class TaskCheck(_Section):
    """A metric of an lm-eval task; `max` and `max_rise` are of those that are better the lower they are."""

    task: str
    metric: str = "acc"
    min: Number | None = None
    max: Number | None = None
    max_drop: Number | None = None
    max_rise: Number | None = None

    @model_validator(mode="after")
    def _check(self) -> TaskCheck:
        _one_of(self, "min", "max", "max_drop", "max_rise")
        for name, least in (("min", 0), ("max", 0), ("max_drop", -1), ("max_rise", -1)):
            threshold = getattr(self, name)
            if self.metric.startswith("acc") and threshold is not None and not least <= threshold <= 1:
                raise ValueError(f"{name}: {threshold:g}, and {self.metric} is a share, from 0 to 1")
        return self

    def check_direction(self, is_higher_better: bool | None) -> None:
        """Raises ValueError for a threshold that a worse model would pass; None: nobody says which is better."""
        if is_higher_better is None:
            return
        lower, higher = ("max", "max_rise"), ("min", "max_drop")
        fitting, others = (higher, lower) if is_higher_better else (lower, higher)
        if wrong := next((key for key in others if getattr(self, key) is not None), None):
            raise ValueError(
                f"tasks: {self.metric} of {self.task} is better the {'higher' if is_higher_better else 'lower'} it is;"
                f" expected {' or '.join(fitting)}, not {wrong}: {getattr(self, wrong):g}"
            )


class GateConfig(_Section):
    """Thresholds, and what the figures are taken on."""

    loss: tuple[LossCheck, ...] = ()
    needle: tuple[NeedleCheck, ...] = ()
    tasks: tuple[TaskCheck, ...] = ()
    documents: Path | None = None
    haystack: Path | None = None
    data_dir: Path | None = None
    base: Path | None = None
    limit: Count | None = None
    needle_n: Count = SAMPLES
    shared_haystack: bool = Field(False, strict=True)
    documents_n: Count = DOCUMENTS

    @model_validator(mode="after")
    def _check(self) -> GateConfig:
        checks = self.checks()
        if not checks:
            raise ValueError("no check: expected loss, needle or tasks")
        if self.base is None and any(_is_relative(check) for check in checks):
            raise ValueError("base: max_rise and max_drop need a checkpoint to compare with")
        return self

    def checks(self) -> list[Any]:
        return [*self.loss, *self.needle, *self.tasks]

    @classmethod
    def load(cls, file: Path) -> GateConfig:
        """Raises ValueError that names file, key and value; FileNotFoundError that names the gates there are."""
        if not file.is_file():
            known = ", ".join(map(str, sorted(Path("recipes").glob("*/gates/*.yaml")))) or "none here"
            raise FileNotFoundError(
                f"there is no gate {file}: nothing says what the checkpoint has to show; there are {known}"
            )
        try:
            return cls.model_validate(load_recipe(file))
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(map(str, first["loc"])) or "the file"
            reason = first["msg"].removeprefix("Value error, ")
            raise ValueError(f"{file}: {key}: {reason}; it is {repr(first['input'])[:200]}") from None


def _one_of(check: BaseModel, *names: str) -> None:
    if sum(getattr(check, name) is not None for name in names) != 1:
        raise ValueError(f"expected one of {', '.join(names[:-1])} and {names[-1]}")


def _is_relative(check: Any) -> bool:
    return any(getattr(check, name, None) is not None for name in ("max_rise", "max_drop"))


def check_gate(
    folder: Path,
    config_file: Path,
    output: Path | None = None,
    options: Sequence[str] = (),
    data_dir: Path | None = None,
) -> dict[str, Any]:
    """Evaluate a checkpoint against the thresholds of a YAML file; write and return `gate.json`.

    Args:
        output: folder of all results (default: the run's results folder).
        options: further arguments of the commands: --device, --dtype.
        data_dir: of the tasks, in place of the YAML's.
    Raises:
        ValueError, FileNotFoundError: a threshold, file or checkpoint that is not as it has to be; nothing to measure.
    """
    started = time.monotonic()
    config, digest = GateConfig.load(config_file), thresholds_digest(config_file)
    config = config if data_dir is None else config.model_copy(update={"data_dir": data_dir})
    output = output or results_folder(check_folder(folder))
    if config.base and any(map(_is_relative, config.checks())):
        check_folder(config.base)
    about = Checkpoint.open(folder, "cpu")
    lengths = [*(check.length for check in config.loss), *(check.length for check in config.needle)]
    without = lm.unavailable([check.task for check in config.tasks], config.data_dir)
    try:
        with options_named(_KEYS):
            check_lengths(lengths or [1], about.max_length)
        for check in config.tasks:
            check.check_direction(lm.is_higher_better(check.task, check.metric))
    except ValueError as error:
        raise ValueError(f"{config_file}: {error}") from None
    measured = [check for check in config.checks() if getattr(check, "task", None) not in without]
    if not measured:
        raise ValueError(f"{config_file}: nothing can be measured: {'; '.join(without.values())}")
    _check_texts(folder, config, config_file, measured)
    own, base = _Figures(folder, output, config, measured, options), None
    if relative := [check for check in measured if _is_relative(check)]:
        assert config.base is not None  # GateConfig asks for it
        _check_texts(config.base, config, config_file, relative)
        base = _Figures(config.base, results_folder(config.base), config, relative, ["--beyond", *options])
    checks = []
    for check in config.checks():
        if check not in measured:
            checks.append(_given(check) | {"value": None, "passed": None, "unmeasured": without[check.task]})
            continue
        row = own.figure(check)
        before = base.figure(check)["value"] if base and _is_relative(check) else None
        checks.append(_judged(check, row, before))
    gate = {
        "kind": "gate",
        **{key: value for key, value in about.describe().items() if key != "dtype"},
        "config": str(config_file),
        "config_digest": digest,
        "data_dir": config.data_dir and str(config.data_dir),
        "passed": all(check["passed"] for check in checks if "unmeasured" not in check),
        "checks": checks,
        "loss": own.losses() | ({} if base is None else {"base": base.losses()}),
        "seconds": round(time.monotonic() - started, 1),
    }
    files.write_json(output / FILE, gate)
    return gate


def _check_texts(folder: Path, config: GateConfig, config_file: Path, checks: Sequence[Any]) -> None:
    """Raises FileNotFoundError for texts that one of the checks reads and that are not there."""
    for key, kind in (("documents", LossCheck), ("haystack", NeedleCheck)):
        if not any(isinstance(check, kind) and getattr(check, "kind", None) != "passkey" for check in checks):
            continue
        given = getattr(config, key)
        if given is None:
            find_heldout(folder, f"`{key}: FILE` in {config_file}")
        elif not (given.exists() or glob.glob(str(given))):
            raise FileNotFoundError(f"{config_file}: {key}: {given}: no such file or folder")


def _given(check: Any) -> dict[str, Any]:
    """A check as gate.json says it."""
    kind = type(check).__name__.removesuffix("Check").lower()
    return {"check": kind, **check.model_dump(by_alias=True, exclude_none=True)}


def _judged(check: Any, row: Row, before: float | None) -> dict[str, Any]:
    """A figure beside its threshold."""
    base = {} if before is None else {"base": before}
    figure = {key: row.get(key) for key in ("n", "interval", "stderr", "file") if row.get(key) is not None}
    judged = {**_given(check), "value": row.get("value"), **figure, **base}
    return judged | {"passed": holds(judged)}


class _Figures:
    """The figures of one checkpoint; each command runs once, for all checks that need it."""

    def __init__(
        self, folder: Path, output: Path, config: GateConfig, checks: Sequence[Any], options: Sequence[str]
    ) -> None:
        self._config, self._checks = config, checks
        self._common = ["--ckpt", str(folder), "--output", str(output), *options]
        self._known: dict[Any, tuple[Path, dict[str, Any]]] = {}

    def figure(self, check: Any) -> Row:
        config = self._config
        if isinstance(check, LossCheck):
            file, content = self._positions()
            end = check.end or check.length
            own = [
                sample | {"losses": [part for part in sample["losses"] if check.begin <= part[0] and part[1] <= end]}
                for sample in content["samples"]
                if sample["length"] == check.length
            ]
            found = rows_of("positions", {"summary": positions.summarise(own)})
        elif isinstance(check, NeedleCheck):
            words = [*self._lengths(NeedleCheck, check.kind), "--kind", check.kind, "--n", str(config.needle_n)]
            words += ["--no-generate", *(["--shared-haystack"] if config.shared_haystack else [])]
            words += _named("haystack", None if check.kind == "passkey" else config.haystack)
            file, content = self._run(needle.command, words)
            found = [row for row in rows_of("needle", content) if row["length"] == check.length]
        else:
            names = list(dict.fromkeys(c.task for c in self._checks if isinstance(c, TaskCheck)))
            data_dir = None if set(names) <= set(lm.OWN_TASKS) else config.data_dir
            words = ["--tasks", ",".join(names), *_named("data-dir", data_dir), *_named("limit", config.limit)]
            file, content = self._run(lm.command, words)
            rows = [row for row in rows_of("lm", content) if row["task"] == check.task]
            found = [row for row in rows if row["metric"] == check.metric]
            if not found:
                metrics = ", ".join(row["metric"] for row in rows)
                raise ValueError(f"tasks: {check.task} has no metric {check.metric!r}; it has {metrics}")
            check.check_direction(found[0]["higher_is_better"])  # of a group, and of what its YAML does not say
        return found[0] | {"file": file.name}

    def losses(self) -> dict[str, Any]:
        """By length in tokens, what `eval.positions` says of it and of its buckets."""
        if not any(isinstance(check, LossCheck) for check in self._checks):
            return {}
        return {str(row["length"]): row for row in self._positions()[1]["summary"]["lengths"]}

    def _positions(self) -> tuple[Path, dict[str, Any]]:
        words = [*self._lengths(LossCheck), "--n", str(self._config.documents_n)]
        return self._run(positions.command, words + _named("documents", self._config.documents))

    def _lengths(self, kind: type[LossCheck | NeedleCheck], needle_kind: str | None = None) -> list[str]:
        alike = [c for c in self._checks if isinstance(c, kind) and getattr(c, "kind", None) == needle_kind]
        return ["--lengths", ",".join(str(length) for length in sorted({check.length for check in alike}))]

    def _run(self, command: Callable[[Sequence[str]], Path], words: list[str]) -> tuple[Path, dict[str, Any]]:
        key = (command, tuple(words))
        if key not in self._known:
            common = [word for word in self._common if word != "--beyond" or command is not lm.command]
            with options_named(_KEYS):
                file = command([*common, *words])
            self._known[key] = file, files.read_json(file)
        return self._known[key]


def _named(option: str, value: Any) -> list[str]:
    return [] if value is None else [f"--{option}", str(value)]


def describe(gate: dict[str, Any]) -> str:
    """A Markdown table of the checks."""
    lines = ["| check | value | threshold | |", "|---|---:|---:|---|"]
    for check in gate["checks"]:
        name = " ".join(str(check[key]) for key in ("check", "task", "metric", "kind", "length") if key in check)
        if check["check"] == "loss":
            name += f", positions {check['from']} to {check.get('to', check['length'])}"
        if reason := check.get("unmeasured"):
            lines.append(f"| {name} | - | {threshold(check)} | not measured: {reason} |")
            continue
        verdict = "passed" if check["passed"] else "missed"
        value = "-" if check["value"] is None else f"{check['value']:.4g}"
        lines.append(f"| {name} | {value} | {threshold(check)} | {verdict} |")
    return "\n".join(lines)


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = new_parser("eval.gate", __doc__)
    add = parser.add_argument
    # fmt: off
    add("--ckpt", type=path, required=True, help="Hugging Face folder, e.g. runs/demo/extend-2k/hf")
    add("--config", type=path, required=True, help="YAML of thresholds")
    add("--output", type=path, help="folder for gate.json and results (default: the run's results folder)")
    add("--data-dir", type=path, help="local files of the tasks, as of eval.lm (default: the YAML's, else the hub)")
    add("--device", help="default: the GPU if there is one")
    add("--dtype", choices=DTYPES, help="default: bfloat16 on a GPU, float32 on a CPU")
    # fmt: on
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = _arguments(sys.argv[1:] if argv is None else argv)
    options = [*_named("device", args.device), *_named("dtype", args.dtype)]
    output = args.output or results_folder(check_folder(args.ckpt))
    gate = check_gate(args.ckpt, args.config, output, options, args.data_dir)
    print(f"{describe(gate)}\n{output / FILE}", flush=True)
    if missed := [check for check in gate["checks"] if not check["passed"] and "unmeasured" not in check]:
        raise ValueError(f"{output / FILE}: {len(missed)} of {len(gate['checks'])} checks are not passed")


if __name__ == "__main__":
    ending.run(main)
