"""The run folder: where a recipe's stage puts its files, and which of its checkpoints to resume from.

runs/<recipe>/<stage>/config.yaml            every key as it was resolved
                      logs/metrics.csv       one row per logged step, appended on resume
                      logs/tensorboard/
                      checkpoints/step-00000500/   complete once it holds meta.json
                      checkpoints/last       link to the newest complete one
                      hf/                    Hugging Face export of the final weights
                      loss.png, summary.json
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

_STEP_FOLDER = re.compile(r"step-(\d+)")
_NOT_THE_MODEL = ("initializer_range", "bos_token_id", "eos_token_id")  # the ids come from the data
_SAFE_NAME = re.compile(r"[\w.\-]+")


@dataclass
class RunConfig:
    """How a stage is run; what it trains is said by the other keys.

    Attributes:
        recipe: first folder level below `root`, for example 1.3b.
        stage: second level, for example pretrain or extend-32k.
        root: where runs live.
        resume: `auto` continues from the newest complete checkpoint, `never` starts over (the old run moves aside).
        tokens_per_step: global batch in tokens. Gradient accumulation follows from it, so the same recipe takes
            the same optimizer steps on any number of GPUs. None: trainer.accumulate_grad_batches as it is.
        validate_every: optimizer steps between validations; the first and the last step are always validated.
        checkpoint_every: optimizer steps between checkpoints; the last step always writes one.
        keep_checkpoints: newest checkpoints kept.
        slurm_requeue: stopped by SLURM's warning signal or time limit, put the job back into the queue after the
            checkpoint (see `s2.training.slurm`).
    """

    recipe: str
    stage: str
    root: str = "runs"
    resume: Literal["auto", "never"] = "auto"
    tokens_per_step: int | None = None
    validate_every: int = 500
    checkpoint_every: int = 1000
    keep_checkpoints: int = 2
    slurm_requeue: bool = False

    def __post_init__(self) -> None:
        for name in ("recipe", "stage"):
            value = getattr(self, name)
            if not _SAFE_NAME.fullmatch(str(value)):
                raise ValueError(f"run.{name}={value!r} is a folder name: letters, digits, '.', '-' and '_'")
        for name in ("validate_every", "checkpoint_every", "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise ValueError(f"run.{name}={getattr(self, name)} must be at least 1")

    @property
    def folder(self) -> Path:
        """runs/<recipe>/<stage>"""
        return Path(self.root) / self.recipe / self.stage

    def accumulation(self, sequences_per_micro_batch: int, seq_len: int, world_size: int) -> int | None:
        """Micro-batches per optimizer step that make up `tokens_per_step`, or None where that is not set.

        Raises:
            ValueError: the global batch is not a whole number of micro-batches over all ranks.
        """
        if self.tokens_per_step is None:
            return None
        tokens = sequences_per_micro_batch * seq_len * world_size
        if self.tokens_per_step < tokens or self.tokens_per_step % tokens:
            raise ValueError(
                f"run.tokens_per_step={self.tokens_per_step} must be a multiple of {tokens} = data.micro_batch_size "
                f"{sequences_per_micro_batch} x data.seq_len {seq_len} x {world_size} ranks"
            )
        return self.tokens_per_step // tokens


def checkpoint_folder(checkpoints: Path, step: int) -> Path:
    """checkpoints/step-00000500"""
    return checkpoints / f"step-{step:08d}"


def complete_checkpoints(checkpoints: Path) -> list[Path]:
    """Complete checkpoint folders, oldest first. A folder still being written has another name or no meta.json."""
    found = []
    for path in checkpoints.glob("step-*"):
        match = _STEP_FOLDER.fullmatch(path.name)
        if match and (path / "meta.json").is_file():
            found.append((int(match[1]), path))
    return [path for _, path in sorted(found)]


def read_meta(checkpoint: Path) -> dict[str, Any]:
    """meta.json of a checkpoint: step, tokens, world_size, strategy, model (its ModelConfig keys)."""
    return json.loads((checkpoint / "meta.json").read_text())


def publish_checkpoint(partial: Path, final: Path, meta: Mapping[str, Any], keep: int) -> None:
    """Turn a fully written `partial` folder into the checkpoint `final` and drop the oldest beyond `keep`.

    The rename is the commit: a process killed before it leaves only a name that resume ignores.
    """
    write_atomically(partial / "meta.json", json.dumps(dict(meta), indent=2))
    _sync_tree(partial)
    if final.exists():
        shutil.rmtree(final)
    partial.rename(final)
    _sync_folder(final.parent)
    _point_last_at(final)
    for old in complete_checkpoints(final.parent)[:-keep]:
        shutil.rmtree(old)


def _point_last_at(final: Path) -> None:
    last, link = final.parent / "last", final.parent / "last.tmp"
    link.unlink(missing_ok=True)
    link.symlink_to(final.name)
    if last.is_dir() and not last.is_symlink():
        shutil.rmtree(last)  # a copy that followed links has made a folder of it
    link.replace(last)


def check_same_model(meta: Mapping[str, Any], wanted: Mapping[str, Any], checkpoint: Path) -> None:
    """Refuse to resume weights of another shape or meaning.

    Raises:
        ValueError: names the first key that differs, both values and the checkpoint.
    """
    saved = meta["model"]
    for key, value in wanted.items():
        if key not in _NOT_THE_MODEL and saved.get(key, value) != value:
            raise ValueError(
                f"checkpoint {checkpoint} was trained with model.config.{key}={saved[key]!r} but the recipe says "
                f"{value!r}; go back to the old value, or start over with run.resume=never or another run.stage"
            )


def write_atomically(path: Path, text: str) -> None:
    """Write a small text file so that a reader never sees half of it."""
    partial = path.with_name(path.name + ".tmp")
    with partial.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def _sync_tree(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    _sync_folder(folder)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
