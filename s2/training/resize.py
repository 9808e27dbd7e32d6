"""Resume a ZeRO checkpoint on another number of ranks.

DeepSpeed saves one optimizer shard per rank and refuses to load them on another number of ranks. Its universal
checkpoint format holds each parameter's fp32 weight and moments whole: a checkpoint is converted beside its state and
loaded in that form.
"""

from __future__ import annotations

import argparse
import contextlib
import io
from pathlib import Path

from s2 import files
from s2.training.gaps.deepspeed import add_missing_ranks

KIND = "converted checkpoint"
TAG = "checkpoint"  # the folder name Lightning saves DeepSpeed states under


def saved_ranks(state: Path) -> int:
    """Ranks that a DeepSpeed state folder was saved by."""
    return len(list((state / TAG).glob("*zero_pp_rank_*_optim_states.pt")))


def universal_folder(state: Path) -> Path:
    """Where the converted form of a state folder stands."""
    return state.with_name(state.name + "-universal")


def to_universal(state: Path, world_size: int) -> None:
    """Make the universal form of a state folder, for `world_size` ranks to load."""
    from deepspeed.checkpoint.ds_to_universal import main

    universal = universal_folder(state)
    if files.kind_of(universal) == KIND:
        files.remove_folder(universal)  # of an earlier resume, maybe on yet another number of ranks
    partial = files.begin(universal, KIND)
    settings = argparse.Namespace(
        input_folder=str(state / TAG),
        output_folder=str(partial / TAG),
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,
    )
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        main(settings)
    add_missing_ranks(partial / TAG, world_size)
    files.publish(partial, universal)
