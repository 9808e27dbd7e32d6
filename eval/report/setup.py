"""How runs were made: settings, data, rates, environment."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from eval.grid import format_length
from eval.report.run import Run
from s2.files import read_json
from s2.model.flops import attention_flops_per_token, flops_per_token
from s2.model.layouts import kv_bytes_per_token
from s2.tables import markdown
from s2.training.metrics import clock

UNKNOWN = "not recorded"
_SYNTHETIC = "retrieval"  # the path of sources that are made up (data.corpus.sources)
# Keys that the first table says in its own words, that say where things lie, or that change nothing of what is learned.
_SAID = (
    *(
        "run.",
        "model.config.",
        "model.init_from",
        "data.class_path",
        "data.init_args.prepare",
        "data.init_args.mixture",
    ),
    *(
        "data.init_args.seq_len",
        "data.init_args.retrieval",
        "data.init_args.seed",
        "data.init_args.num_workers",
        "seed_everything",
    ),
    *("model.optimizer.lr", "model.schedule", "trainer.max_steps", "trainer.precision", "trainer.strategy"),
)

Row = tuple[str, Callable[[Run], Any]]  # a label, and what stands in a run's column; nothing where it is not known


def table(rows: Sequence[Row], runs: Sequence[Run], *, mark: bool = False) -> str:
    """`lines` as Markdown."""
    return markdown(["", *(run.name for run in runs)], lines(rows, runs, mark=mark))


def lines(rows: Sequence[Row], runs: Sequence[Run], *, mark: bool = False) -> list[list[str]]:
    """A label and a text for each run, of what any run has. mark: in bold what differs from the first run."""
    found = []
    for label, value in rows:
        texts = [value(run) or UNKNOWN for run in runs]
        if set(texts) != {UNKNOWN}:
            is_marked = [mark and text not in (texts[0], UNKNOWN) for text in texts]
            found.append([label, *(f"**{t}**" if marked else t for t, marked in zip(texts, is_marked, strict=True))])
    return found


# --- settings ---------------------------------------------------------------------------------------------------------


def settings(runs: Sequence[Run]) -> list[str]:
    """The settings side by side, and every other key of the recipes in which they differ."""
    rows: list[Row] = [
        ("attention", layout),
        ("parameters", parameters),
        ("shape", _shape),
        ("context, RoPE", _rope),
        ("weights from", lambda run: run.recipe and (_key(run, "model.init_from") or "random")),
        ("tokens", lambda run: tokens(run) and f"{tokens(run):,}"),
        ("batch", _batch),
        ("learning rate", _schedule),
        ("precision, strategy", _precision),
        ("data", _mixture),
        ("synthetic retrieval documents", synthetic),
        ("seeds", _seeds),
    ]
    parts = [table(rows, runs, mark=len(runs) > 1)]
    if len(runs) > 1:
        parts.append(f"In bold: other than {runs[0].name}.")
        flat = [dict(_flat(run.recipe)) for run in runs]
        keys = [key for key in dict.fromkeys(key for each in flat for key in each) if not key.startswith(_SAID)]
        differing = [key for key in keys if len({str(each.get(key)) for each in flat if each}) > 1]
        others: list[Row] = [(key.replace(".init_args", ""), partial(_leaf, key)) for key in differing]
        alike = f"{len(keys) - len(others)} other keys of the recipes are alike"
        parts += [f"Other keys that differ ({alike}):", table(others, runs, mark=True)] if others else [f"All {alike}."]
    return parts


def layout(run: Run) -> str | None:
    """The layout and its block size, from the config or what the results say."""
    if run.model is not None:
        size = "" if run.model.is_dense else f", blocks of {run.model.block_size}"
        return f"{run.model.attention_layout}{size}"
    about = [scores.content.get("s2", scores.content) for scores in run.scores]
    return next((str(each["attention_layout"]) for each in about if each.get("attention_layout")), None)


def parameters(run: Run) -> str | None:
    return None if run.model is None else f"{run.model.num_parameters():,}"


def tokens(run: Run) -> int | None:
    """Tokens that the stage was trained on."""
    last = run.summary.get("tokens") or run.last("tokens")
    return None if last is None else int(last)


def synthetic(run: Run) -> str | None:
    """Share of the training tokens that are made-up retrieval documents; as far as it is known."""
    known, unknown, shares = 0.0, [], _shares(run)
    for label, share in shares:
        part = _synthetic_part(run, label)
        if part is None:
            unknown.append(label)
        else:
            known += share * part
    if not shares:
        return None
    words = f"{known:.1%} of the tokens"
    return f"{words}; unknown of {', '.join(unknown)}" if unknown else "none" if known == 0 else words


def _shape(run: Run) -> Any:
    m = run.model
    return m and (
        f"{m.num_hidden_layers} layers of {m.hidden_size}, {m.num_attention_heads} query / {m.num_key_value_heads} KV"
        f" heads of {m.head_dim}, MLP {m.intermediate_size}, vocabulary {m.vocab_size:,}"
    )


def _rope(run: Run) -> Any:
    m = run.model
    scaling = f", {m.rope_scaling}" if m and m.rope_scaling else ""
    return m and f"{m.max_position_embeddings:,} tokens, theta {m.rope_theta:g}{scaling}"


def _batch(run: Run) -> str | None:
    if not run.recipe:
        return None
    a_step, steps = _key(run, "run.tokens_per_step"), run.summary.get("step") or run.last("step")
    words = [f"{a_step:,} tokens a step"] if a_step else []
    return ", ".join([*words, *([f"{steps:,.0f} steps"] if steps else []), f"sequences of {run.seq_len:,}"])


def _schedule(run: Run) -> str | None:
    schedule = _key(run, "model.schedule")
    if not schedule:
        return None
    warmup, least = schedule.get("warmup_steps", 0), schedule.get("min_ratio", 0)
    lr = _key(run, "model.optimizer.lr")
    return f"{lr:g}, {schedule.get('name', 'constant')}, warmup {warmup} steps, to {least:g} of it"


def _precision(run: Run) -> str | None:
    keys = ("trainer.precision", "trainer.strategy", "model.activation_checkpointing", "model.compile")
    precision, strategy, checkpointing, compiled = (_key(run, key) for key in keys)
    words = [str(precision), str(strategy), *([f"{checkpointing} checkpointing"] if checkpointing != "none" else [])]
    return ", ".join([*words, *(["compiled"] if compiled else [])]) if run.recipe else None


def _seeds(run: Run) -> str | None:
    return f"{_key(run, 'seed_everything')}, data {run.data.get('seed', 0)}" if run.recipe else None


def _mixture(run: Run) -> str | None:
    return "<br>".join(f"{share:.1%} {label}" for label, share in _shares(run)) or None


def _shares(run: Run) -> list[tuple[str, float]]:
    """(component, share of the training tokens): as trained where the summary says it, else as weighted. A component
    is called `<shard folder>[, source <name>][, documents of <length>]`, as the data module does."""
    found = [(str(each.get("component")), each.get("asked", 0)) for each in run.summary.get("data", ())]
    if not sum(amount for _, amount in found):
        found = [(_label(each), each.get("weight", 1.0)) for each in _mappings(run.data.get("mixture"))]
        found = found or [(f"{spec.get('output')}/train", 1.0) for spec in _mappings(run.data.get("prepare"))]
        for added in _mappings(run.data.get("retrieval")):  # a share of documents beside the mixture
            others, share = sum(weight for _, weight in found), added.get("share", 0)
            found.append((f"{added.get('prepare', {}).get('output')}/train", others * share / (1 - share)))
    total = sum(amount for _, amount in found)
    return [(label, amount / total) for label, amount in found] if total else []


def _label(component: dict[str, Any]) -> str:
    source, least = component.get("source"), component.get("min_tokens")
    words = [f"source {source}"] if source else []
    return ", ".join(
        [str(component.get("path")), *words, *([f"documents of {least:,} or more tokens"] if least else [])]
    )


def _mappings(value: Any) -> list[dict[str, Any]]:
    """The mappings of a key that holds one, several or none."""
    return [each for each in (value if isinstance(value, list) else [value]) if isinstance(each, dict)]


def _synthetic_part(run: Run, label: str) -> float | None:
    """Share of a component's tokens that come from synthetic sources: from the manifest of its shards, else from the
    recipe where all sources are of one sort."""
    path, *words = label.split(", ")
    folder, manifest = Path(path), Path(path) / "manifest.json"
    names = [word.removeprefix("source ") for word in words if word.startswith("source ")]
    sources = read_json(manifest).get("sources", []) if manifest.is_file() else []
    sources = [source for source in sources if not names or source.get("name") in names]
    if total := sum(source.get("tokens", 0) for source in sources):
        return sum(source["tokens"] for source in sources if source.get("path") == _SYNTHETIC) / total
    added = [each.get("prepare") for each in _mappings(run.data.get("retrieval"))]
    for spec in _mappings(run.data.get("prepare")) + _mappings(added):
        if spec.get("output") and folder.parent == Path(spec["output"]):
            kinds = {source.get("path") == _SYNTHETIC for source in spec.get("sources", ())}
            return float(kinds.pop()) if len(kinds) == 1 else None
    return None


def _key(run: Run, key: str) -> Any:
    node: Any = run.recipe
    for part in key.split("."):
        node = node.get(part) if isinstance(node, dict) else None
    return node


def _flat(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for name, below in value.items():
            yield from _flat(below, f"{key}.{name}" if key else str(name))
    else:
        yield key, value


def _leaf(key: str, run: Run) -> str | None:
    if not run.recipe:
        return None
    text = str(dict(_flat(run.recipe)).get(key))
    return text if len(text) <= 160 else f"{text[:120]} ..."


# --- rates ------------------------------------------------------------------------------------------------------------


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
        *((f"KV cache at {format_length(size)}", partial(_cache, size)) for size in _lengths(runs)),
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
        " bytes of bf16 keys and values, for each token of context, that the next token can see: everything in dense"
        " layers; sinks, window and every V-th block in sparse heads. In brackets: what the cache here holds, which is"
        " everything."
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
    causal = attention_flops_per_token(model, seq_len, executed=False)
    square = flops_per_token(model, seq_len, executed=False) + causal * (2 * seq_len / (seq_len + 1) - 1)
    return executed * square / flops_per_token(model, seq_len, executed=True)


def hours(run: Run) -> str | None:
    seconds = run.summary.get("seconds") or run.last("seconds")
    if seconds is None:
        return None
    return f"{seconds / 3600:.2f} hours" if seconds >= 3600 else clock(seconds)


def kv_cache(seq_len: int, run: Run) -> str | None:
    """KV bytes a token of a context of `seq_len`."""
    return None if run.model is None else _bytes(kv_bytes_per_token(run.model, seq_len))


def _cache(seq_len: int, run: Run) -> Any:
    return run.model and f"{kv_cache(seq_len, run)} ({_bytes(kv_bytes_per_token(run.model, 1))})"


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
        ("seeds", _seeds),
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
