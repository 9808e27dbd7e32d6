"""Check and time S2-Attention in Megatron-core's GPTModel beside our own model, on this GPU (or CPU).

    python scripts/check_megatron.py [--steps 20] [--seq-len 8192] [--layout L8V16+dense0,1] [--layers 8] ...

Both start from the same weights and train as the first steps of recipes/1.3b/pretrain.yaml do, on the same packed
documents, new ones every step: losses of all steps, gradients of the first, milliseconds a step. Our model with other
kernels, trained in the same way, says what difference rounding alone makes. GPTModel with Megatron's own core
attention, which takes no packed documents, is timed on whole sequences. Then the core attention of every distinct layer
is run as two tensor-parallel ranks would, each on its half of the heads, and compared with the whole, forward and
gradients.

Writes docs/benchmarks/<date>-<machine>-megatron.{md,json}. Exit code 0 if all agree, 1 if not. Needs megatron-core.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
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
from torch import Tensor, nn

from s2 import ending
from s2.attention import s2_attention
from s2.attention.kernels.hopper.support import on_hopper
from s2.model import ModelConfig, Transformer
from s2.model.rope import document_positions
from s2.tables import markdown
from s2.training.optim import OptimizerConfig, ScheduleConfig, build_adamw

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
        from_megatron,
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
LIMITS = {
    "bfloat16": {"losses": 1e-3, "gradients": 5e-2, "halves": 1e-2},
    "float32": {"losses": 1e-4, "gradients": 1e-3, "halves": 1e-4},
}
UNTIMED = 3  # steps

# of recipes/1.3b/pretrain.yaml
OPTIMIZER = OptimizerConfig(lr=4e-4)
SCHEDULE = ScheduleConfig("wsd", warmup_steps=500, min_ratio=0.05)
STEPS, CLIP = 15_000, 1.0

METHOD = (
    "the same weights, optimizer and documents for all models; fp32 master weights, gradients and moments; AdamW "
    f"with gradients clipped at {CLIP:g} and the warm-up of recipes/1.3b/pretrain.yaml; new documents every step, of "
    "tokens drawn by Zipf's law",
    "losses: largest relative difference of a step's loss from our model's; gradients: of the first step, largest "
    "relative RMS difference of a weight's from our model's",
    f"ms: forward, backward and optimizer, median of the steps after the first {UNTIMED}; all eager, without "
    "recomputation: our model without torch.compile, GPTModel of Megatron's local spec (no Transformer Engine) without "
    "Megatron's fusions",
    "Megatron's own core attention takes no packed documents: it is timed on whole sequences, and recomputes attention "
    "(selective, core_attn), whose scores would not fit otherwise",
    "halves: the core attention of one of two tensor-parallel ranks over the same heads of the whole, relative RMS",
)

JUDGED = "GPTModel, S2"

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


def batches(config: ModelConfig, seq_len: int, count: int, device: str) -> list[Batch]:
    """Rows of random tokens, token i as often as 1 / (i + 1); documents of a half, a third of the rest and so on,
    ragged."""
    draw = torch.Generator().manual_seed(0)
    share = 1 / torch.arange(1, config.vocab_size + 1)
    made = []
    for _ in range(count):
        tokens = torch.multinomial(share, seq_len + 1, replacement=True, generator=draw)[None]
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


def train(model: nn.Module, loss_of: Step, rows: Sequence[Batch], optimizer: OptimizerConfig = OPTIMIZER) -> Row:
    """Losses and milliseconds of a step on each row.

    The weights get the rounded values of fp32 ones, which gradients, clipped in fp32, are applied to: what DeepSpeed
    does in `bf16-mixed`, and Megatron's optimizer for a `Float16Module`.
    """
    weights = list(model.parameters())
    masters = nn.ParameterList([x.detach().float().clone() for x in weights])
    adamw = build_adamw(masters, optimizer, fused=weights[0].is_cuda)
    losses, times = [], []
    for step, row in enumerate(rows):
        begin = perf_counter()
        loss = loss_of(row)
        loss.backward()
        for weight, master in zip(weights, masters, strict=True):
            assert weight.grad is not None
            master.grad, weight.grad = weight.grad.float(), None
        nn.utils.clip_grad_norm_(masters.parameters(), CLIP)
        for group in adamw.param_groups:
            group["lr"] = optimizer.lr * SCHEDULE.factor(step, STEPS)
        adamw.step()
        with torch.no_grad():
            for weight, master in zip(weights, masters, strict=True):
                weight.copy_(master)
        losses.append(float(loss.detach()))  # waits for the device
        if loss.is_cuda:
            torch.cuda.synchronize()
        times.append(1e3 * (perf_counter() - begin))
    return {"loss": losses, "ms": statistics.median(times[UNTIMED:] or times), "note": ""}


def gradients(model: nn.Module, loss_of: Step, row: Batch) -> dict[str, Tensor]:
    loss_of(row).backward()
    found = {name: x.grad for name, x in model.named_parameters() if x.grad is not None}
    model.zero_grad()
    return found


def compare_models(
    config: ModelConfig, rows: Sequence[Batch], optimizer: OptimizerConfig, dtype: torch.dtype
) -> dict[str, Row]:
    """A row for our model, for the same with other kernels, for GPTModel with our attention and with Megatron's. The
    second and third say how far they are from the first (`apart`)."""
    device = rows[0].input_ids.device.type
    torch.manual_seed(0)
    ours = Transformer(config).to(device, dtype)
    start = {name: x.clone() for name, x in ours.state_dict().items()}
    loss_of = partial(our_loss, ours)
    wanted = gradients(ours, loss_of, rows[0])
    first = train(ours, loss_of, rows, optimizer)

    def beside(model: nn.Module, loss_of: Step, named: Callable[[dict[str, Tensor]], dict[str, Tensor]] = dict) -> Row:
        got = named(gradients(model, loss_of, rows[0]))
        row = train(model, loss_of, rows, optimizer)
        pairs = zip(row["loss"], first["loss"], strict=True)
        return row | {
            "apart": {
                "losses": largest(abs(a - b) / abs(b) for a, b in pairs),
                "gradients": largest(relative_rms(got[name], x) for name, x in wanted.items()),
            }
        }

    backend = other_backend(device)
    ours.load_state_dict(start)
    with patch("s2.model.layers.s2_attention", partial(s2_attention, backend=backend)):
        found = {"our model": first, f"our model, backend {backend}": beside(ours, loss_of)}
    ours.load_state_dict(start)
    theirs = gpt_model(ours)
    found[JUDGED] = beside(theirs, partial(megatron_loss, theirs), partial(from_megatron, config=config))
    del theirs
    selective = {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}
    dense = gpt_model(ours, get_gpt_layer_local_spec(normalization="RMSNorm", qk_layernorm=config.qk_norm), **selective)
    name = "GPTModel, Megatron's attention"
    try:
        found[name] = train(dense, partial(megatron_loss, dense, packed=False), rows, optimizer)
    except torch.cuda.OutOfMemoryError:
        found[name] = {"loss": [], "ms": None, "note": "out of memory"}
    return found


def other_backend(device: str) -> str:
    """One that a packed call on the device does not take by itself."""
    if device == "cpu":
        return "reference"
    return "triton" if on_hopper(torch.empty(0, device=device)) else "sdpa"


def largest(values: Iterable[float]) -> float:
    """NaN where one is NaN."""
    return float(torch.tensor(list(values), dtype=torch.float64).max())


def relative_rms(got: Tensor, wanted: Tensor) -> float:
    return float((got.double() - wanted.double()).norm() / wanted.double().norm())


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
        found[f"{pattern}, rotation {rotation}"] = largest(map(relative_rms, got, wanted))
    return found


def _attend(core: S2CoreAttention, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Output and gradients, all `[S, 1, heads, D]`, of q, k, v and the output's gradient."""
    q, k, v, dout = (x.detach().clone() for x in tensors)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    out = core(q, k, v, None).view_as(q)
    return [out.detach(), *torch.autograd.grad(out, inputs, dout)]


# ---------------------------------------------------------------- the report


def parts(record: Record) -> Iterator[str]:
    found, limits = record["models"], record["limits"]
    base = found["our model"]
    body = []
    for name, row in found.items():
        if row["ms"] is None:
            body.append([name, "", "", "", "", row["note"], ""])
            continue
        ends = (f"{row['loss'][0]:.4f}", f"{row['loss'][-1]:.4f}")
        apart = [f"{value:.1e}" for value in row["apart"].values()] if "apart" in row else ["", ""]
        body.append([name, *ends, *apart, f"{row['ms']:,.1f}", f"{row['ms'] / base['ms']:.2f}"])
    yield "## Training\n\n" + ", ".join(f"{key} {value}" for key, value in record["sizes"].items())
    yield markdown(("model", "first loss", "last loss", "losses", "gradients", "ms a step", "over ours"), body)
    change = base["loss"][-1] - base["loss"][0]
    yield (
        f"Our model's loss changes by {change:+.2f} in {len(base['loss'])} steps. Limits of GPTModel with S2: losses "
        f"{limits['losses']:.0e}, gradients {limits['gradients']:.0e}; of the halves {limits['halves']:.0e}."
    )
    rows = [[name, f"{value:.1e}"] for name, value in record["halves"].items()]
    yield "## Two tensor-parallel ranks\n\n" + markdown(("layers", "difference"), rows)


def main() -> int:
    parser = new_parser(__doc__, name="megatron")
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seq-len", type=int, default=8192)
    parser.add_argument("--lr", type=float, default=OPTIMIZER.lr, help="peak rate; narrower models take a higher one")
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
    dtype, limits = DTYPES[args.dtype], LIMITS[args.dtype]
    record = new_record(
        "check_megatron",
        sys.argv[1:],
        machine_of(device),
        ("torch", "triton", "megatron-core"),
        commit=args.commit,
        name=args.name,
        method=METHOD,
        sizes=sizes_of(args) | {"seq_len": args.seq_len, "dtype": args.dtype, "steps": args.steps, "lr": args.lr},
        limits=limits,
    )
    rows = batches(config, args.seq_len, args.steps, device)
    with one_rank(device):
        record["models"] = compare_models(config, rows, replace(OPTIMIZER, lr=args.lr), dtype)
        record["halves"] = halves(config, args.seq_len, device, dtype)
    print(save(record, args.output / stem(record), "Megatron-core", parts(record)))
    found = record["models"][JUDGED]["apart"] | {"halves": largest(record["halves"].values())}
    return int(not all(found[kind] <= limit for kind, limit in limits.items()))


if __name__ == "__main__":
    ending.run(main)
