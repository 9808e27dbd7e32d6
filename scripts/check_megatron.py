"""Check and time S2-Attention in Megatron-core's GPTModel beside our own model, on this GPU (or CPU).

    python scripts/check_megatron.py [--steps 20] [--seq-len 8192] [--layout L8V16+dense0,1] [--layers 8] ...

Both start from the same weights and train with the same optimizer on the same packed documents: losses of all steps,
their largest relative difference, milliseconds a step. GPTModel with Megatron's own core attention, which takes no
packed documents, is timed on whole sequences. Then the core attention of every distinct layer is run as two
tensor-parallel ranks would, each on its half of the heads, and compared with the whole, forward and gradients.

Writes docs/benchmarks/<date>-<machine>-megatron.{md,json}. Exit code 0 if all agree, 1 if not. Needs megatron-core.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from time import perf_counter
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from bench_record import Record, new_parser, new_record, save, stem
from check_model import add_model_options, config_of, machine_of, sizes_of
from torch import Tensor

from s2 import ending
from s2.model import ModelConfig, Transformer
from s2.model.rope import document_positions
from s2.tables import markdown

MISSING = ""  # why Megatron cannot be imported

try:
    from megatron.core import parallel_state
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.packed_seq_params import PackedSeqParams
    from megatron.core.tensor_parallel import random as megatron_random
    from megatron.core.transformer.enums import AttnMaskType

    from s2.integrations.megatron import (
        S2CoreAttention,
        get_s2_layer_spec,
        gpt_model_arguments,
        to_megatron,
        transformer_config,
    )
except ModuleNotFoundError as error:
    if not (error.name or "").startswith("megatron"):
        raise
    MISSING = f"{error}; pip install -e '.[megatron]' brings megatron-core"

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
LIMITS = {"bfloat16": 1e-2, "float32": 1e-4}  # relative: of losses, and RMS of the slices
WARM_UP = 3  # steps that are not timed
ROWS = 4  # that come in turn, so that the losses fall

METHOD = (
    "the same weights, AdamW and packed documents for both models, eager, without recomputation; GPTModel is of "
    "Megatron's local spec (no Transformer Engine)",
    f"ms: forward, backward and optimizer, median of the steps after the first {WARM_UP}",
    "Megatron's own core attention takes no packed documents: it is timed on whole sequences, and recomputes attention "
    "(selective, core_attn), whose scores would not fit otherwise",
    "halves: the core attention of one of two tensor-parallel ranks over the same heads of the whole, relative RMS",
)

Row = dict[str, Any]
Step = Callable[["Batch"], Tensor]  # to the mean loss


@dataclass(frozen=True)
class Batch:
    """One row of packed documents `[1, T]`; labels are -100 where a document ends."""

    input_ids: Tensor
    labels: Tensor
    cu_seqlens: Tensor
    longest: int


@dataclass(frozen=True)
class Ranks:
    """Stands for the process group of one tensor-parallel rank."""

    index: int
    count: int

    def rank(self) -> int:
        return self.index

    def size(self) -> int:
        return self.count


# ---------------------------------------------------------------- Megatron's surroundings


@contextlib.contextmanager
def one_rank(device: str) -> Iterator[None]:
    """Process group (the one of this process, if it has one) and parallel state of a single rank."""
    own = not dist.is_initialized()
    if own:
        dist.init_process_group("nccl" if device == "cuda" else "gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with without_cuda() if device == "cpu" else contextlib.nullcontext():
            parallel_state.initialize_model_parallel()
            megatron_random.model_parallel_cuda_manual_seed(0)
            yield
    finally:
        parallel_state.destroy_model_parallel()
        if own:
            dist.destroy_process_group()


@contextlib.contextmanager
def without_cuda() -> Iterator[None]:
    """Megatron puts what it makes on the current CUDA device, and saves its random state; here that is the CPU."""
    state = torch.empty(0, dtype=torch.uint8)
    with (
        patch.object(torch.cuda, "current_device", lambda: torch.device("cpu")),
        patch.object(torch.cuda, "get_rng_state", lambda *_, **__: state),
        patch.object(torch.cuda.random, "get_rng_state", lambda *_, **__: state),
        patch.object(torch.cuda, "manual_seed", lambda _: None),
        patch.object(megatron_random, "_set_cuda_rng_state", lambda *_, **__: None),
    ):
        yield


def gpt_model(ours: Transformer, spec: Any = None, weights: Any = None, **changes: Any) -> GPTModel:
    """With the weights of `ours` (or what `weights` makes of them), attending by its layout, or as another layer spec
    says."""
    config, weight = ours.config, ours.lm_head.weight
    settings = {"params_dtype": weight.dtype, "bf16": weight.dtype == torch.bfloat16} | changes
    made = transformer_config(
        config, use_cpu_initialization=weight.device.type == "cpu", masked_softmax_fusion=False, **settings
    )
    spec = spec or get_s2_layer_spec(made, config.layout)
    model = GPTModel(made, spec, **gpt_model_arguments(config)).to(weight.device, weight.dtype)
    model.load_state_dict(weights(ours.state_dict()) if weights else to_megatron(ours.state_dict(), config))
    return model


# ---------------------------------------------------------------- training


def batches(config: ModelConfig, seq_len: int, device: str) -> list[Batch]:
    """`ROWS` rows of random tokens; documents of a half, a third of the rest and so on, ragged."""
    draw = torch.Generator().manual_seed(0)
    made = []
    for _ in range(ROWS):
        tokens = torch.randint(config.vocab_size, (1, seq_len + 1), generator=draw)
        borders = [0]
        while seq_len - borders[-1] > max(seq_len // 16, 1):
            left = seq_len - borders[-1]
            borders.append(borders[-1] + int(torch.randint(left // 3, left, (), generator=draw)) + 1)
        borders = [*borders, *([seq_len] if borders[-1] < seq_len else [])]
        labels = tokens[:, 1:].clone()
        labels[0, torch.tensor(borders[1:]) - 1] = -100
        longest = max(b - a for a, b in pairwise(borders))
        cu_seqlens = torch.tensor(borders, dtype=torch.int32, device=device)
        made.append(Batch(tokens[:, :-1].to(device), labels.to(device), cu_seqlens, longest))
    return made


def our_loss(model: Transformer, batch: Batch) -> Tensor:
    total, count = model(batch.input_ids, labels=batch.labels, cu_seqlens=batch.cu_seqlens)
    return total / count


def megatron_loss(model: GPTModel, batch: Batch, *, packed: bool = True) -> Tensor:
    tokens = batch.input_ids.shape[1]
    if packed:
        mask = None
        borders = batch.cu_seqlens
        positions = document_positions(borders, tokens)[None]
        documents = PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=borders,
            cu_seqlens_kv=borders,
            max_seqlen_q=batch.longest,
            max_seqlen_kv=batch.longest,
        )
    else:
        positions, documents = torch.arange(tokens, device=batch.input_ids.device)[None], None
        mask = torch.ones(1, 1, tokens, tokens, dtype=torch.bool, device=batch.input_ids.device).triu_(1)
    counts = batch.labels >= 0
    targets = batch.labels.clamp(min=0)
    losses = model(batch.input_ids, positions, mask, labels=targets, packed_seq_params=documents)  # [1, T]
    return (losses.float() * counts).sum() / counts.sum()


def train(model: torch.nn.Module, loss_of: Step, rows: Sequence[Batch], steps: int) -> Row:
    """Losses and milliseconds of the steps."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    losses, times = [], []
    for step in range(steps):
        begin = perf_counter()
        loss = loss_of(rows[step % len(rows)])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))  # waits for the device
        if loss.is_cuda:
            torch.cuda.synchronize()
        times.append(1e3 * (perf_counter() - begin))
    return {"loss": losses, "ms": statistics.median(times[WARM_UP:] or times), "note": ""}


def compare_models(config: ModelConfig, seq_len: int, steps: int, device: str, dtype: torch.dtype) -> dict[str, Row]:
    """A row for our model, for GPTModel with it, and for GPTModel with Megatron's attention."""
    torch.manual_seed(0)
    ours = Transformer(config).to(device, dtype)
    start = {name: x.clone() for name, x in ours.state_dict().items()}
    rows = batches(config, seq_len, device)
    found = {"our model": train(ours, partial(our_loss, ours), rows, steps)}
    ours.load_state_dict(start)
    theirs = gpt_model(ours)
    found["GPTModel, S2"] = train(theirs, partial(megatron_loss, theirs), rows, steps)
    del theirs
    selective = {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}
    dense = gpt_model(ours, get_gpt_layer_local_spec(normalization="RMSNorm", qk_layernorm=config.qk_norm), **selective)
    name = "GPTModel, Megatron's attention"
    try:
        found[name] = train(dense, partial(megatron_loss, dense, packed=False), rows, steps)
    except torch.cuda.OutOfMemoryError:
        found[name] = {"loss": [], "ms": None, "note": "out of memory"}
    return found


def difference(found: dict[str, Row]) -> float:
    pairs = zip(found["GPTModel, S2"]["loss"], found["our model"]["loss"], strict=True)
    return max(abs(a - b) / abs(b) for a, b in pairs)


# ---------------------------------------------------------------- halves of the heads


def core_attention(config: ModelConfig, layer: int, rank: int, ranks: int) -> S2CoreAttention:
    """Of one tensor-parallel rank."""
    return S2CoreAttention(
        transformer_config(config),
        layer + 1,
        AttnMaskType.causal,
        "self",
        pg_collection=SimpleNamespace(tp=Ranks(rank, ranks)),
        layout=config.layout,
        num_kv_heads=config.num_key_value_heads,
    )


def halves(config: ModelConfig, seq_len: int, device: str, dtype: torch.dtype) -> dict[str, float]:
    """By layers that attend alike, the largest relative RMS difference of output and gradients."""
    rotations = config.layout.distinct_rotations(config.num_key_value_heads)
    layers = {pair: layer for layer, pair in reversed(list(enumerate(zip(config.layout, rotations, strict=True))))}
    heads = (config.num_attention_heads, *[config.num_key_value_heads] * 2, config.num_attention_heads)
    torch.manual_seed(0)
    whole = [torch.randn(seq_len, 1, n, config.head_dim, device=device, dtype=dtype) for n in heads]
    found = {}
    for (pattern, rotation), layer in sorted(layers.items(), key=lambda item: item[1]):
        wanted = _attend(core_attention(config, layer, 0, 1), whole)
        parts = []
        for rank in range(2):
            core = core_attention(config, layer, rank, 2)
            parts.append(_attend(core, [x.chunk(2, 2)[rank] for x in whole]))
        got = [torch.cat(pair, 2) for pair in zip(*parts, strict=True)]
        found[f"{pattern}, rotation {rotation}"] = max(
            float((a.double() - b.double()).norm() / b.double().norm()) for a, b in zip(got, wanted, strict=True)
        )
    return found


def _attend(core: S2CoreAttention, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Output and gradients, all `[S, 1, heads, D]`, of q, k, v and the output's gradient."""
    q, k, v, dout = (x.detach().clone() for x in tensors)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    out = core(q, k, v, None).view_as(q)
    return [out.detach(), *torch.autograd.grad(out, inputs, dout)]


# ---------------------------------------------------------------- the report


def parts(record: Record) -> Iterator[str]:
    found, limit = record["models"], record["limit"]
    base = found["our model"]["ms"]
    body = []
    for name, row in found.items():
        if row["ms"] is None:
            body.append([name, "", "", row["note"], ""])
            continue
        ends = (f"{row['loss'][0]:.4f}", f"{row['loss'][-1]:.4f}")
        body.append([name, *ends, f"{row['ms']:,.1f}", f"{row['ms'] / base:.2f}"])
    sizes = record["sizes"]
    yield "## Training\n\n" + ", ".join(f"{key} {value}" for key, value in sizes.items())
    yield markdown(("model", "first loss", "last loss", "ms a step", "over ours"), body)
    yield f"Largest relative difference of GPTModel's losses from ours: {record['difference']:.1e} (limit {limit:.0e})."
    rows = [[name, f"{value:.1e}"] for name, value in record["halves"].items()]
    yield "## Two tensor-parallel ranks\n\n" + markdown(("layers", "difference"), rows)


def main() -> int:
    parser = new_parser(__doc__, name="megatron")
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seq-len", type=int, default=8192)
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="bfloat16" if on_gpu else "float32")
    add_model_options(parser, "L8V16+dense0,1", layers=8, hidden=2048, ffn=5504, vocab=32768)
    args = parser.parse_args()
    if MISSING:
        raise ValueError(MISSING)
    return check(args, "cuda" if on_gpu else "cpu")


def check(args: argparse.Namespace, device: str) -> int:
    """Run all and write the report; the exit code."""
    config = config_of(args, args.seq_len)
    if args.heads % 2 or args.kv_heads % 2:
        raise ValueError(f"--heads {args.heads} and --kv-heads {args.kv_heads} must be even for two ranks")
    dtype = DTYPES[args.dtype]
    with one_rank(device):
        found = compare_models(config, args.seq_len, args.steps, device, dtype)
        apart = halves(config, args.seq_len, device, dtype)
    record = new_record(
        "check_megatron",
        sys.argv[1:],
        machine_of(device),
        ("torch", "triton", "megatron-core"),
        commit=args.commit,
        name=args.name,
        method=METHOD,
        sizes=sizes_of(args) | {"seq_len": args.seq_len, "dtype": args.dtype, "steps": args.steps},
        models=found,
        difference=difference(found),
        limit=LIMITS[args.dtype],
        halves=apart,
    )
    print(save(record, args.output / stem(record), "Megatron-core", parts(record)))
    wrong = [value for value in (record["difference"], *apart.values()) if not value <= record["limit"]]
    return int(bool(wrong))


if __name__ == "__main__":
    ending.run(main)
