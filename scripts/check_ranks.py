"""Check that ranks train together: compiled like eager, ZeRO-3 like ZeRO-1, with buckets of any size.

    python scripts/check_ranks.py [--ranks 2] [--steps 10] [--cases zero_2,zero_3-selective] [--ways eager,compiled]

Every case trains a small model on the same random rows, of which some are packed (document borders inside) and some
whole, in turn on each rank, so that ranks run different graphs in most micro-batches; "mixed" compiles on every second
rank only. The first case, eager ZeRO-1, is what the others are compared with, in fp32: losses and gradient norms of all
steps, and how far the weights have moved apart over how far they have moved. "graphs" counts what was compiled on the
first rank, "held" the block weights that ZeRO-3 could not free between forward and backward; neither may be more than
expected. Runs on the GPUs of this node, or on CPU ranks where there are none. Prints a table; exit code 0 if all cases
agree, 1 if not.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from bench_record import names
from lightning.pytorch import Callback, LightningDataModule, Trainer
from torch.multiprocessing.reductions import StorageWeakRef

from s2 import ending, files
from s2.training.config import ModelSection
from s2.training.gaps.lightning import quieten
from s2.training.module import PretrainModule
from s2.training.optim import OptimizerConfig, ScheduleConfig
from s2.training.strategy import ZeROStrategy
from s2.training.weights import gathered

SMALL_BUCKET = 40_000  # elements: less than a matrix, so that every gradient is a bucket of its own or shares one
CASES: dict[str, dict[str, Any]] = {
    name: {"stage": stage, **settings}
    for stage in (1, 2, 3)  # 3 is last: DeepSpeed replaces torch's linear for the rest of the process
    for name, settings in {f"zero_{stage}": {}, f"zero_{stage}-small": {"bucket_size": SMALL_BUCKET}}.items()
}
CASES |= {f"zero_3-{kind}": {"stage": 3, "checkpointing": kind} for kind in ("selective", "full")}
WAYS = ("eager", "compiled", "mixed")
LIMITS = {"loss": 1e-3, "grad norm": 1e-3, "weights": 3e-2, "graphs": 7, "held": 0}
"""Graphs: each of the three patterns (two residues and dense), packed and whole, and the loss. With full checkpointing
that is attention, which like the MLP is captured both without and with gradients."""
FULL_LIMITS = LIMITS | {"graphs": 2 * (3 * 2 + 1) + 1}
SEQ_LEN, ACCUMULATE, VOCAB_SIZE = 256, 2, 512
MODEL = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": SEQ_LEN,
    "attention_layout": "L1V2+dense1",
}


class RandomRows(LightningDataModule):
    """Endless rows of random tokens, one a rank and micro-batch; row i is packed where i mod 4 is 0 or 3."""

    seq_len, micro_batch_size, bos_token_id, eos_token_id = SEQ_LEN, 1, None, 0
    validation_names: tuple[str, ...] = ()

    def check_vocab_size(self, size: int) -> None:
        assert size == VOCAB_SIZE

    def train_dataloader(self) -> Any:
        rank, ranks = dist.get_rank(), dist.get_world_size()
        rows = (self.row(i) for i in range(rank, 1 << 30, ranks))
        return torch.utils.data.DataLoader(list(islice(rows, 1000)), batch_size=None)

    def row(self, index: int) -> dict[str, torch.Tensor]:
        tokens = torch.randint(VOCAB_SIZE, (1, SEQ_LEN + 1), generator=torch.Generator().manual_seed(index))
        batch = {"input_ids": tokens[:, :-1], "labels": tokens[:, 1:].clone(), "position": torch.tensor(index)}
        if index % 4 in (0, 3):
            borders = torch.tensor([0, 30, 31 + index % 100, 200], dtype=torch.int32)
            batch["labels"][0, borders[1:].long() - 1] = -100
            batch["cu_seqlens"] = torch.nn.functional.pad(borders, (0, 61), value=SEQ_LEN)
        return batch


class Recorder(Callback):
    """Loss and gradient norm of each step; how many block weights stay whole after a forward at most."""

    def __init__(self) -> None:
        self.loss: list[float] = []
        self.grad_norm: list[float] = []
        self.held = 0
        self._gathered: list[StorageWeakRef] = []

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.strategy.stage == 3:
            for block in pl_module.model.model.blocks:
                block.register_forward_hook(self._note, prepend=True)  # before DeepSpeed's, which releases

    def _note(self, block: torch.nn.Module, *_: Any) -> None:
        self._gathered += [StorageWeakRef(parameter.untyped_storage()) for parameter in block.parameters()]

    def on_before_backward(self, *_: Any) -> None:
        if self.loss:  # in the first step DeepSpeed only watches in which order weights are used
            self.held = max(self.held, sum(not storage.expired() for storage in self._gathered))
        self._gathered.clear()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        if trainer.global_step > len(self.loss):
            self.loss.append(pl_module.pop_train_loss())
            self.grad_norm.append(float(trainer.strategy.deepspeed_engine.get_global_grad_norm()))


def run(stage: int, *, steps: int, compiled: bool, checkpointing: Any = "none", **strategy: Any) -> dict[str, Any]:
    """Train; returns the losses, gradient norms, the final weights (flat), the number of graphs and weights held."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    recorder = Recorder()
    section = ModelSection(
        MODEL,
        optimizer=OptimizerConfig(lr=1e-3),
        schedule=ScheduleConfig(name="constant"),
        activation_checkpointing=checkpointing,
        compile=compiled,
    )
    module = PretrainModule(section)
    if stage == 3:
        # or so small a model would not be sharded, or never released
        strategy |= {"persistence_threshold": 0, "reuse_distance": 0, "prefetch_elements": 0}
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    with files.temporary_folder() as folder:
        trainer = Trainer(
            accelerator="cuda" if torch.cuda.is_available() else "cpu",
            devices=int(os.environ["LOCAL_WORLD_SIZE"]),
            strategy=ZeROStrategy(stage=stage, **strategy),
            precision="32-true",
            max_steps=steps,
            accumulate_grad_batches=ACCUMULATE,
            gradient_clip_val=1.0,
            use_distributed_sampler=False,
            callbacks=[recorder],
            default_root_dir=folder,
            **quiet,
        )
        trainer.fit(module, datamodule=RandomRows())
    assert module.model is not None
    return {
        "loss": recorder.loss,
        "grad norm": recorder.grad_norm,
        "weights": _flat(module.model),
        "graphs": torch._dynamo.utils.counters["stats"]["unique_graphs"],
        "held": recorder.held,
    }


def _flat(model: torch.nn.Module) -> torch.Tensor:
    parts = []
    for parameter in model.parameters():
        with gathered(parameter):
            parts.append(parameter.detach().double().flatten().cpu())
    return torch.cat(parts)


def differences(result: dict[str, Any], reference: dict[str, Any], start: torch.Tensor) -> dict[str, float]:
    """Largest relative difference over the steps, and of the weights over the way they went."""
    found = {}
    for key in ("loss", "grad norm"):
        found[key] = max(abs(a - b) / abs(b) for a, b in zip(result[key], reference[key], strict=True))
    apart, way = result["weights"] - reference["weights"], reference["weights"] - start
    return found | {"weights": float(apart.norm() / way.norm()), "graphs": result["graphs"], "held": result["held"]}


def compare(cases: list[str], ways: list[str], steps: int) -> int:
    """Run the cases on the ranks of this process group; the exit code."""
    quieten()
    reference = run(1, steps=steps, compiled=False)
    torch.manual_seed(0)
    module = PretrainModule(ModelSection(MODEL))
    module.configure_model()
    start = _flat(module)
    first = dist.get_rank() == 0
    if first:
        print(f"{dist.get_world_size()} ranks, {steps} steps; largest differences from eager zero_1")
        print(f"{'case':<28}" + "".join(f"{key:>12}" for key in LIMITS))
    wrong = 0
    for name in cases:
        for way in ways:
            compiled = way == "compiled" or (way == "mixed" and dist.get_rank() % 2 == 0)
            found = differences(run(**CASES[name], steps=steps, compiled=compiled), reference, start)
            limits = FULL_LIMITS if CASES[name].get("checkpointing") == "full" else LIMITS
            agrees = all(found[key] <= limit for key, limit in limits.items())  # NaN does not
            wrong += not agrees
            if first:
                cells = "".join(f"{value:{'12' if isinstance(value, int) else '12.1e'}}" for value in found.values())
                print(f"{f'{name} {way}':<28}{cells}{'' if agrees else '   DISAGREES'}", flush=True)
    return 1 if wrong else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=torch.cuda.device_count() or 2)
    parser.add_argument("--steps", type=int, default=10)
    for option, known in (("--cases", CASES), ("--ways", WAYS)):
        parser.add_argument(option, default=",".join(known), type=names(known), help="of: %(default)s")
    asked = parser.parse_args()
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return compare(asked.cases, asked.ways, asked.steps)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={asked.ranks}"]
    return subprocess.run([*command, *sys.argv], check=False).returncode


if __name__ == "__main__":
    ending.run(main)
