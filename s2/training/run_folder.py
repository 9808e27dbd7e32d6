"""The run folder: where a recipe's stage puts its files, and checkpoints that are written whole.

runs/<recipe>/<stage>/config.yaml             every key as it was resolved
                      environment.json        devices, versions, commit and command of each process
                      gate-before.json        what the gate of the weights to start from said when the stage began
                      logs/metrics.csv        one row per logged step, appended on resume
                      logs/tensorboard/
                      checkpoints/step-00000500/meta.json   step, tokens, how it was trained, size and checksum of files
                                                state/      what Lightning and DeepSpeed saved
                                                state-universal/   the same for another number of ranks, when needed
                      checkpoints/last        link to the newest complete one
                      hf/                     Hugging Face export of the final weights
                      loss.png, summary.json

A checkpoint is written as `step-00000500.partial` and gets its name when everything is on disk. On resume the newest
one that is as it was written is used, and what is wrong with a newer one is said.
"""

from __future__ import annotations

import errno
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from s2 import files
from s2.ending import DamagedError
from s2.locks import lock
from s2.training.config import RunConfig

KIND = "training checkpoint"
META = "meta.json"
_ALMOST_FULL = 1 << 30  # bytes free of a disk that has just refused to take a file
_STEP_FOLDER = re.compile(r"step-(\d+)")
_NOT_THE_MODEL = ("initializer_range", "bos_token_id", "eos_token_id")  # the ids come from the data


def make_run_folder(run: RunConfig) -> None:
    """Make the run folder and see that it can be written to. With run.resume=never what lies there moves aside to
    <stage>.1, .2, ...: nothing is deleted.

    Raises:
        LockedError: another process is training there.
        OSError: a file stands where a folder has to be, or nothing can be written there.
    """
    if run.resume == "never" and run.folder.exists():
        with lock(run.folder):
            aside = files.move_aside(run.folder)
        print(f"run.resume=never: the earlier run is now {aside}")
    for folder in ("logs", "checkpoints"):
        files.require_writable(run.folder / folder)


def check_disk(run: RunConfig, parameters: int, *, low_precision: bool) -> None:
    """Refuse a run whose checkpoints would fill the disk.

    A checkpoint holds fp32 weights and two moments, and bf16 weights beside them in low precision; one more than
    `run.keep_checkpoints` exists while it is written. The export takes 2 bytes a parameter.

    Raises:
        ValueError: the space needed and the space there is.
    """
    if run.checkpoint_every is None:
        return
    each = parameters * (14 if low_precision else 12)
    checkpoints = (run.folder / "checkpoints").absolute()  # or a link to another disk
    kept = sum(f.stat().st_size for f in checkpoints.rglob("*") if f.is_file() and not f.is_symlink())
    needed = (run.keep_checkpoints + 1) * each + 2 * parameters - kept
    free = shutil.disk_usage(next(folder for folder in (checkpoints, *checkpoints.parents) if folder.exists())).free
    if needed > free:
        raise ValueError(
            f"run.keep_checkpoints={run.keep_checkpoints}: that many checkpoints of {each / 1e9:.1f} GB and one being "
            f"written need {needed / 1e9:.1f} GB more below {run.folder}, which has {free / 1e9:.1f} GB free; keep "
            f"fewer, or point run.root at a larger disk"
        )


def is_finished(run: RunConfig, max_steps: int) -> bool:
    """Whether the stage's newest complete checkpoint is its last step. Raises ValueError where it is, but the export is
    gone, or where a stage of more steps was stopped beyond `max_steps`."""
    checkpoints = complete_checkpoints(run.folder / "checkpoints")
    if not checkpoints or damage(checkpoints[-1], checksums=False):
        return False
    if (step := read_meta(checkpoints[-1])["step"]) < max_steps:
        return False
    for name in ("hf/config.json", "summary.json"):
        if not (run.folder / name).is_file():
            if step > max_steps:
                raise ValueError(
                    f"trainer.max_steps={max_steps}: {run.folder} is trained to step {step}, unfinished (it has no "
                    f"{name}); raise trainer.max_steps above {step} to go on from there"
                )
            raise ValueError(
                f"{run.folder} is trained to step {step} but has no {name}; raise trainer.max_steps above {step} to go "
                f"on from there, or remove {checkpoints[-1]} to train from the checkpoint before it and export again"
            )
    return True


def checkpoint_folder(checkpoints: Path, step: int) -> Path:
    """checkpoints/step-00000500"""
    return checkpoints / f"step-{step:08d}"


def complete_checkpoints(checkpoints: Path) -> list[Path]:
    """Checkpoint folders that were published, oldest first; whether they are still whole `damage` tells."""
    found = []
    for path in checkpoints.glob("step-*"):
        match = _STEP_FOLDER.fullmatch(path.name)
        if match and path.is_dir() and (files.kind_of(path) == KIND or (path / META).is_file()):
            found.append((int(match[1]), path))
    return [path for _, path in sorted(found)]


def read_meta(checkpoint: Path) -> dict[str, Any]:
    """meta.json of a checkpoint: step, tokens, world_size, zero_stage, model (its ModelConfig keys), files. Raises
    DamagedError where it is missing, not JSON, or of another form."""
    try:
        meta = files.read_json(checkpoint / META)
    except (OSError, ValueError) as error:
        raise DamagedError(f"{checkpoint / META} cannot be read ({error})") from None
    if not isinstance(meta, dict) or not _is_meta(meta):
        raise DamagedError(f"{checkpoint / META} is not a checkpoint's")
    return meta


def _is_meta(meta: Mapping[str, Any]) -> bool:
    recorded = meta.get("files", {})
    counts = (meta.get("step"), meta.get("tokens"))
    return (
        all(isinstance(count, int) and not isinstance(count, bool) for count in counts)
        and isinstance(meta.get("model"), Mapping)
        and isinstance(recorded, Mapping)
        and all(isinstance(entry, Mapping) and "size" in entry for entry in recorded.values())
    )


def damage(checkpoint: Path, *, checksums: bool, share: tuple[int, int] = (0, 1)) -> str | None:
    """What is wrong with a checkpoint, in a few words; None if it is as it was written.

    Args:
        checksums: read every byte; without, sizes only.
        share: (rank, ranks) that divide the reading among them.
    """
    try:
        meta = read_meta(checkpoint)
    except DamagedError as error:
        return str(error)
    match = _STEP_FOLDER.fullmatch(checkpoint.name)
    if match and int(match[1]) != meta["step"]:
        return f"{checkpoint / META} is that of step {meta['step']}, so the folder was renamed or the file copied"
    recorded = meta.get("files")
    if recorded is None:  # written by a version that recorded nothing
        return None if (checkpoint / "state").exists() else f"{checkpoint / 'state'} is missing"
    if (wrong := files.damage(checkpoint, recorded, checksums=False)) or not checksums:
        return wrong
    return files.damage(checkpoint, {name: recorded[name] for name in sorted(recorded)[share[0] :: share[1]]})


def newest_whole(
    checkpoints: Sequence[Path], damage_of: Callable[[Path], str | None], say: Callable[[str], None]
) -> Path | None:
    """The newest of `checkpoints` (oldest first) of which `damage_of` says nothing; None where there are none at all.
    `say` takes a line for each that is passed over. Raises DamagedError where there are some, and all are damaged."""
    wrong: list[str] = []
    for checkpoint in reversed(checkpoints):
        if (what := damage_of(checkpoint)) is None:
            return checkpoint
        wrong.append(what)
        say(f"checkpoint {checkpoint} is damaged: {what}")
    if wrong:
        raise DamagedError(
            f"no checkpoint in {checkpoints[0].parent} is whole (the newest: {wrong[0]}); put the file back, or start "
            f"over with run.resume=never, which moves the run aside"
        )
    return None


def new_checkpoint(checkpoints: Path, step: int) -> Path:
    """An empty folder to write the checkpoint of `step` into; what a killed process left of others is removed."""
    for path in checkpoints.glob("step-*.partial"):
        if files.kind_of(path) == KIND:
            files.remove_folder(path)
    return files.begin(checkpoint_folder(checkpoints, step), KIND)


def disk_is_full(error: BaseException, checkpoints: Path) -> bool:
    """Whether writing failed for want of room. torch reports that as an error of its zip writer, without a number."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    words = ("PytorchStreamWriter failed", "unexpected pos", "No space left")
    return any(word in str(error) for word in words) and shutil.disk_usage(checkpoints).free < _ALMOST_FULL


def publish(partial: Path, final: Path, meta: Mapping[str, Any], keep: int) -> None:
    """Turn a fully written `partial` folder into the checkpoint `final`, point `last` at it, and drop the oldest.

    Args:
        meta: what meta.json says, with the inventory of all other files under `files`.
        keep: checkpoints kept, up to this one; damaged ones and those of later steps, which this run has passed over
            or left behind, do not count. Notes that somebody put into a dropped one stay.
    """
    files.write_json(partial / META, dict(meta))
    files.publish(partial, final)
    files.point(final.parent / "last", final.name)
    checkpoints = complete_checkpoints(final.parent)
    whole = [path for path in checkpoints[: checkpoints.index(final) + 1] if damage(path, checksums=False) is None]
    for old in whole[:-keep]:
        if files.kind_of(old) is None:  # an earlier version's
            files.adopt(old, KIND, _written_by_us(old))
        files.remove_folder(old)


def _written_by_us(checkpoint: Path) -> list[str]:
    """Files of a checkpoint without a mark: what its meta.json lists, or else all that stands below `state`."""
    listed = read_meta(checkpoint).get("files")
    below = (path for path in checkpoint.glob("state*/**/*") if path.is_file())
    return [META, *(listed or (str(path.relative_to(checkpoint)) for path in below))]


def check_resumable(meta: Mapping[str, Any], model: Mapping[str, Any], stage: int, precision: str, place: Path) -> None:
    """Refuse to resume weights of another shape or meaning, or optimizer states in another form.

    Args:
        meta: of the checkpoint in the folder `place`.
        model, stage, precision: of the recipe: ModelConfig's keys, ZeRO stage (0 without), Lightning's name.

    Raises:
        ValueError: names the first key that differs, both values and the checkpoint.
    """
    advice = "go back to the old value, or start over with run.resume=never or another run.stage"
    saved = meta["model"]
    obstacles = [
        f"trained with model.config.{key}={saved[key]!r} but the recipe says {value!r}; {advice}"
        for key, value in model.items()
        if key not in _NOT_THE_MODEL and saved.get(key, value) != value
    ]
    saved_stage = meta.get("zero_stage", stage)
    if _form(saved_stage) != _form(stage):
        obstacles.append(
            f"saved by {_strategy(saved_stage)} but the recipe's trainer.strategy is {_strategy(stage)}, which keeps "
            f"optimizer states in another form; {advice} (its weights alone, from an exported folder, go into any "
            f"strategy: model.init_from)"
        )
    if (saved_precision := meta.get("precision", precision)) != precision:
        obstacles.append(
            f"saved in precision {saved_precision} but this run is in {precision}; continue on the same kind of device "
            f"with the same trainer.precision, or start another run.stage from exported weights"
        )
    if obstacles:
        raise ValueError(f"checkpoint {place} was {obstacles[0]}")


def _form(stage: int) -> int:
    return 2 if stage == 1 else stage  # ZeRO-1 and ZeRO-2 shard optimizer states alike


def _strategy(stage: int) -> str:
    return f"ZeRO stage {stage}" if stage else "a strategy without ZeRO"
