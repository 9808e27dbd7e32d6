"""At what rate, on what and by which commands runs were made."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence
from functools import partial
from statistics import median
from typing import Any

import torch

from eval.grid import format_length
from eval.report.run import Run
from eval.report.settings import UNKNOWN, Row, lines, seeds, table
from s2.files import read_json
from s2.inference import KVCache
from s2.model.config import ModelConfig
from s2.model.flops import flops_per_token, full_square_flops_per_token
from s2.tables import markdown
from s2.training.metrics import clock


def speed(runs: Sequence[Run]) -> list[str]:
    """Rates, utilization, memory and time."""
    rows: list[Row] = [
        ("devices", lambda run: run.summary and f"{run.summary.get('world_size', 1)}"),
        ("tokens/s a device", lambda run: rate(run) and f"{rate(run):,.0f}"),
        ("MFU, executed", lambda run: _percent(_median(run, "mfu_executed"))),
        ("MFU, dense-equivalent", lambda run: _percent(_median(run, "mfu_dense_equivalent"))),
        ("MFU, full square", lambda run: _percent(full_square(run))),
        ("peak memory", lambda run: _memory(run)),
        ("time", hours),
        *((f"KV cache a token at {format_length(size)}", partial(_cache, size)) for size in _lengths(runs)),
    ]
    parts = [table(rows, runs)]
    if any(_median(run, "mfu_executed") for run in runs):
        parts.append(
            "MFU is achieved over peak dense bf16 FLOP/s of the device, forward and backward counted once. *Executed*:"
            " the causal half, as far as the pattern lets queries see. *Dense-equivalent*: the causal half of the same"
            " model with dense attention. *Full square*: 6 N + 12 L Hq D S a token, with the masked half, as"
            " llm-foundry, torchtitan and OLMo-core count."
        )
    else:
        parts.append("No MFU: the log has none, as on a CPU or a device whose peak is not known.")
    parts.append(
        "tokens/s: the median of the logged steps, without validations and checkpoints; time: with them. KV cache:"
        " bytes, for each token of context, of the cache here (`s2.inference.KVCache`) for one sequence of that length"
        " in bf16. It keeps what a later query can see: everything in dense layers; sinks, window and every V-th block"
        " in sparse heads. In brackets: the same model with every layer dense."
    )
    return parts


def rate(run: Run) -> float | None:
    """Tokens/s a device: the median of the logged steps."""
    return _median(run, "tokens_per_second_per_device")


def full_square(run: Run) -> float | None:
    """MFU with the masked half counted and every layer dense; the device's peak is that of the logged MFU."""
    executed, model, seq_len = _median(run, "mfu_executed"), run.model, run.data.get("seq_len")
    if not executed or model is None or not seq_len:
        return None
    return executed * full_square_flops_per_token(model, seq_len) / flops_per_token(model, seq_len, executed=True)


def hours(run: Run) -> str | None:
    seconds = run.summary.get("seconds") or run.last("seconds")
    if seconds is None:
        return None
    return f"{seconds / 3600:.2f} hours" if seconds >= 3600 else clock(seconds)


def kv_cache(seq_len: int, run: Run) -> str | None:
    """Bytes a token of context of a cache for a sequence of `seq_len` tokens, in bf16."""
    return None if run.model is None else _bytes(_cache_bytes(run.model, seq_len))


def _cache(seq_len: int, run: Run) -> str | None:
    if run.model is None:
        return None
    dense = run.model.replace(attention_layout="dense", rope_scaling=None)  # which may be by kind of layer
    return f"{kv_cache(seq_len, run)} ({_bytes(_cache_bytes(dense, seq_len))})"


def _cache_bytes(model: ModelConfig, seq_len: int) -> float:
    longer = model.replace(max_position_embeddings=max(seq_len, model.max_position_embeddings))
    return KVCache.bytes_for(longer, 1, seq_len, torch.bfloat16) / seq_len


def _lengths(runs: Sequence[Run]) -> list[int]:
    return sorted({run.model.max_position_embeddings for run in runs if run.model} | {1 << 17})


def _memory(run: Run) -> str | None:
    peak = run.summary.get("memory_gib") or max((row.get("memory_gib", 0.0) for row in run.log), default=0.0)
    return f"{peak:.2f} GiB" if peak else None


def _median(run: Run, key: str) -> float | None:
    values = [row[key] for row in run.log if key in row]
    return median(values) if values else None


def _percent(value: float | None) -> str | None:
    return f"{value:.1%}" if value else None


def _bytes(count: float) -> str:
    return f"{count / 1024:.1f} KiB" if count >= 1024 else f"{count:.0f} B"


# --- environment ------------------------------------------------------------------------------------------------------


def environment(runs: Sequence[Run]) -> list[str]:
    """Where runs were made and how they are made again; what is not on record says so."""
    versions = dict.fromkeys(name for run in runs for each in _processes(run) for name in each.get("versions") or {})
    rows: list[Row] = [
        ("device", lambda run: _each(each.get("device") for each in _processes(run))),
        ("commit", lambda run: _each(each.get("commit") for each in _processes(run))),
        *((name, partial(_version, name)) for name in versions),
        ("training", lambda run: command(run) and f"`{command(run)}`"),
        ("evaluation", lambda run: "<br>".join(f"`{text}`" for text in evaluations(run))),
        ("seeds", seeds),
        ("weights (fingerprint)", lambda run: ", ".join(_fingerprints(run))),
    ]
    labels = [label for label, _ in rows] + ([] if versions else ["versions"])
    shown = lines(rows, runs)
    gone = [label for label in labels if label not in {line[0] for line in shown}]
    return [
        markdown(["", *(run.name for run in runs)], shown),
        f"{UNKNOWN.capitalize()}: {', '.join(gone)}." if gone else "",
    ]


def _version(name: str, run: Run) -> str:
    return _each((each.get("versions") or {}).get(name) for each in _processes(run))


def _processes(run: Run) -> list[dict[str, Any]]:
    """What each process of a run wrote about itself, in their order."""
    return [*run.environment.get("earlier", ()), run.environment]


def _each(values: Iterable[str | None]) -> str:
    return ", then ".join(dict.fromkeys(value for value in values if value))


def command(run: Run) -> str | None:
    """What trained the run, or trains it again from its resolved recipe."""
    words = run.environment.get("command")
    if words:
        return words if isinstance(words, str) else shlex.join(map(str, words))
    return f"python -m s2.training.cli {run.folder / 'config.yaml'}" if run.recipe else None


def evaluations(run: Run) -> list[str]:
    """Commands of the evaluations, as far as a suite has written them down."""
    files = sorted((run.folder / "results").glob("suite*.json"))
    contents = [content for file in files if isinstance(content := read_json(file), dict)]
    parts = (part for content in contents for part in content.get("parts", ()))
    return list(dict.fromkeys(part["command"] for part in parts if part.get("command")))


def _fingerprints(run: Run) -> list[str]:
    about = [scores.content.get("s2", scores.content) for scores in run.scores]
    found = [run.fingerprint, *(each.get("fingerprint") for each in about)]
    return list(dict.fromkeys(each for each in found if each))
