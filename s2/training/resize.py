"""Resume a ZeRO checkpoint on another number of ranks.

DeepSpeed saves one optimizer shard per rank and refuses to load them on another number of ranks. Its universal
checkpoint format holds each parameter's fp32 weight and moments whole; a checkpoint is converted once, beside
itself, and loaded in that form.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from s2 import files

KIND = "converted checkpoint"
TAG = "checkpoint"  # the folder name Lightning saves DeepSpeed states under


@contextmanager
def universal_load(engine: Any) -> Iterator[None]:
    """Let `engine.load_checkpoint` read the universal format, and mend what it gets wrong.

    It hands every parameter group the settings of the first one (its weight decay too), and on ZeRO-3 one step
    tensor to all parameters, which AdamW would then advance once for each of them.
    """
    optimizer = engine.optimizer
    settings = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    engine._config.load_universal_checkpoint = True
    try:
        yield
    finally:
        engine._config.load_universal_checkpoint = False
    for group, before in zip(optimizer.param_groups, settings, strict=True):
        group.update(before)
    fused = any(before.get("fused") for before in settings)
    for parameter, state in optimizer.optimizer.state.items():
        if "step" in state:
            step = torch.as_tensor(state["step"], dtype=torch.float32)
            state["step"] = step.clone().to(parameter.device if fused else "cpu")


def saved_ranks(state: Path) -> int:
    """Ranks that a DeepSpeed state folder was saved by."""
    return len(list((state / TAG).glob("*zero_pp_rank_*_optim_states.pt")))


def to_universal(state: Path) -> Path:
    """Convert a state folder and return the universal one, `<state>-universal`; nothing to do if it is there whole."""
    universal = state.with_name(state.name + "-universal")
    if files.kind_of(universal) == KIND and not files.damage(universal, files.listed_files(universal)):
        return universal
    from deepspeed.checkpoint.ds_to_universal import main

    partial = universal.with_name(universal.name + ".partial")
    files.remove_folder(partial)  # of a process that was killed
    files.make_folder(partial, KIND)
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
    files.publish(partial, universal)
    return universal


def add_missing_ranks(universal: Path, world_size: int) -> None:
    """ZeRO-3 asks for one model-state file per rank; they all hold the same metadata, so rank 0's serves."""
    first = universal / TAG / "zero_pp_rank_0_mp_rank_00_model_states.pt"
    if first.is_file():
        for rank in range(world_size):
            file = first.with_name(f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt")
            if not file.exists():
                os.link(first, file)
        files.seal(universal)
