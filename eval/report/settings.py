"""The settings of runs side by side, and which share of their data is synthetic."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from data.shards.mixture import SYNTHETIC
from eval.report.run import Run
from s2.files import read_json
from s2.tables import markdown
from s2.training.gate import gate_warning

UNKNOWN = "not recorded"
NO_SYNTHETIC = "none"
# Keys that the first table says in its own words, that say where things lie, or that change nothing of what is learned.
_SAID = (
    *("run.", "model.config.", "model.init_from", "model.optimizer.lr", "model.schedule", "seed_everything"),
    *("data.class_path", *(f"data.init_args.{key}" for key in ("prepare", "mixture", "retrieval", "seq_len", "seed"))),
    *("data.init_args.num_workers", "trainer.max_steps", "trainer.precision", "trainer.strategy"),
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


def literal(text: str) -> str:
    """Text that Markdown shows as it is: `2*dense|6*L8V4<32`, `__name__`."""
    return re.sub(r"([\\*_`\[\]])", r"\\\1", text).replace("<", "&lt;")


def settings(runs: Sequence[Run]) -> list[str]:
    """The settings side by side, and every other key of the recipes in which they differ."""
    rows: list[Row] = [
        ("attention", layout),
        ("parameters", parameters),
        ("shape", _shape),
        ("context, RoPE", _rope),
        ("weights from", lambda run: run.recipe and (_key(run, "model.init_from") or "random")),
        *([("gate before", _gate_before)] if {*map(_gate_before, runs)} - {None, "none"} else []),
        ("tokens", lambda run: tokens(run) and f"{tokens(run):,}"),
        ("batch", _batch),
        ("learning rate", _schedule),
        ("precision, strategy", _precision),
        ("data", lambda run: "<br>".join(f"{share:.1%} {label}" for label, share in _shares(run.summary, run.data))),
        ("synthetic retrieval documents", synthetic),
        ("seeds", seeds),
    ]
    parts = [table(rows, runs, mark=len(runs) > 1)]
    if len(runs) > 1:
        parts.append(f"In bold: other than {runs[0].name}.")
        flat = [dict(_flat(run.recipe)) if run.recipe else {} for run in runs]
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
        return literal(f"{run.model.attention_layout}{size}")
    about = [scores.content.get("s2", scores.content) for scores in run.scores]
    return next((literal(str(each["attention_layout"])) for each in about if each.get("attention_layout")), None)


def parameters(run: Run) -> str | None:
    return None if run.model is None else f"{run.model.num_parameters():,}"


def tokens(run: Run) -> int | None:
    """Tokens that the stage was trained on."""
    last = run.summary.get("tokens") or run.last("tokens")
    return None if last is None else int(last)


def synthetic(run: Run) -> str | None:
    """Share of the training tokens that are made-up retrieval documents; as far as it is known."""
    return synthetic_share(run.summary, run.data)


def synthetic_share(
    summary: Mapping[str, Any], data: Mapping[str, Any], prepared: Sequence[Mapping[str, Any]] = ()
) -> str | None:
    """Share of the training tokens that are made-up retrieval documents, in words; None where nothing says it.

    Of each component: as training has recorded it, else from the manifest of its shards where that is there, else from
    the section that prepares it, where all sources are of one sort.

    summary: of summary.json. data: `data.init_args` of the recipe. prepared: `prepare` sections beside the recipe's.
    """
    shares = _shares(summary, data)
    recorded = {each.get("component"): each.get("synthetic") for each in summary.get("data", ())}
    known, unknown = 0.0, []
    for label, share in shares:
        part = recorded.get(label)
        if part is None:
            part = _synthetic_part(label, [*_prepared(data), *prepared])
        if part is None:
            unknown.append(label)
        else:
            known += share * part
    if len(unknown) == len(shares):
        return None
    if unknown:
        return f"at least {known:.1%} of the tokens; {UNKNOWN} of {', '.join(unknown)}"
    return f"{known:.1%} of the tokens" if known else NO_SYNTHETIC


def _gate_before(run: Run) -> str | None:
    """What the gate of the weights said when the stage began."""
    said = gate_warning(run.gate_before)
    return literal(said) if said else {"passed": "passed", "none": "none"}.get(run.gate_before.get("state", ""))


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
    if str(run.environment.get("device")).startswith("CPU"):
        precision = f"32-true on the CPU (recipe: {precision})"
    words = [str(precision), str(strategy), *([f"{checkpointing} checkpointing"] if checkpointing != "none" else [])]
    return ", ".join([*words, *(["compiled"] if compiled else [])]) if run.recipe else None


def seeds(run: Run) -> str | None:
    """Of everything, and of the order of the data."""
    return f"{_key(run, 'seed_everything')}, data {run.data.get('seed', 0)}" if run.recipe else None


def _shares(summary: Mapping[str, Any], data: Mapping[str, Any]) -> list[tuple[str, float]]:
    """(component, share of the training tokens): as trained where the summary says it, else as weighted. A component
    is called `<shard folder>[, source <name>][, documents of <length>]`, as the data module does."""
    found = [(str(each.get("component")), each.get("asked", 0)) for each in summary.get("data", ())]
    if not sum(amount for _, amount in found):
        found = [(_label(each), each.get("weight", 1.0)) for each in _mappings(data.get("mixture"))]
        found = found or [(f"{spec.get('output')}/train", 1.0) for spec in _mappings(data.get("prepare"))]
        for added in _mappings(data.get("retrieval")):  # a share of documents beside the mixture
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


def _prepared(data: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The `prepare` sections of a recipe, those of retrieval documents too."""
    added = [each.get("prepare") for each in _mappings(data.get("retrieval"))]
    return _mappings(data.get("prepare")) + _mappings(added)


def _synthetic_part(label: str, prepared: Sequence[Mapping[str, Any]]) -> float | None:
    """Share of a component's tokens that come from synthetic sources, where training has not recorded it."""
    path, *words = label.split(", ")
    folder, manifest = Path(path), Path(path) / "manifest.json"
    names = [word.removeprefix("source ") for word in words if word.startswith("source ")]
    sources = read_json(manifest).get("sources", []) if manifest.is_file() else []
    sources = [source for source in sources if not names or source.get("name") in names]
    if total := sum(source.get("tokens", 0) for source in sources):
        return sum(source["tokens"] for source in sources if source.get("path") == SYNTHETIC) / total
    for spec in prepared:
        if spec.get("output") and folder.parent == Path(spec["output"]):
            kinds = {source.get("path") == SYNTHETIC for source in spec.get("sources", ())}
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
    return literal(text if len(text) <= 160 else f"{text[:120]} ...")
