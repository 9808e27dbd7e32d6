"""Time S2-Attention beside its baselines on this GPU and write a report.

    python scripts/bench_attention.py [--lengths 8192,32768,131072] [--patterns L1V15,L8V16] [--heads 32] ...

All figures come from one process: dense causal attention through SDPA (FlashAttention-2 and cuDNN) and our kernels, on
the same random inputs. Useful TFLOP/s count visible query-key pairs only: 4 D per pair and head forward, 10 D backward.
Writes docs/benchmarks/<date>-<machine>-attention.{md,json,png}.
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
import triton
from torch.nn.attention import SDPBackend, sdpa_kernel

from s2.attention import Pattern, s2_attention
from s2.attention.kernels.hopper.launch import supports

ROOT = Path(__file__).resolve().parent.parent
BASELINES = {"FlashAttention-2": SDPBackend.FLASH_ATTENTION, "cuDNN": SDPBackend.CUDNN_ATTENTION}


def median_ms(function: Callable[[], object]) -> float:
    return triton.testing.do_bench(function, warmup=50, rep=250, return_mode="median")


def peak_gib(function: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**30


def measure(name: str, seq_len: int, flops: float, forward: Callable[[], torch.Tensor], inputs: tuple, dout) -> dict:
    def both() -> None:
        torch.autograd.grad(forward(), inputs, dout)

    out = forward()
    forward_ms = median_ms(forward)
    backward_ms = median_ms(lambda: torch.autograd.grad(out, inputs, dout, retain_graph=True))
    row = {
        "name": name,
        "seq_len": seq_len,
        "forward_ms": forward_ms,
        "backward_ms": backward_ms,
        "forward_tflops": flops / forward_ms / 1e9,
        "backward_tflops": 2.5 * flops / backward_ms / 1e9,
        "peak_gib": peak_gib(both),
    }
    print(
        f"{seq_len:>8} {name:<24} fwd {forward_ms:9.3f} ms {row['forward_tflops']:5.0f} TF"
        f"   bwd {backward_ms:9.3f} ms {row['backward_tflops']:5.0f} TF   {row['peak_gib']:.2f} GiB",
        flush=True,
    )
    return row


def measure_length(args: argparse.Namespace, seq_len: int) -> Iterator[dict]:
    shape = (args.batch, seq_len, args.heads, args.head_dim)
    kv_shape = (args.batch, seq_len, args.kv_heads, args.head_dim)
    q, k, v, dout = (
        torch.randn(s, device="cuda", dtype=getattr(torch, args.dtype)) for s in (shape, kv_shape, kv_shape, shape)
    )
    inputs = tuple(x.requires_grad_() for x in (q, k, v))
    per_pair = 4 * args.head_dim * args.batch * args.heads
    pairs = seq_len * (seq_len + 1) / 2
    for name, backend in BASELINES.items():
        with sdpa_kernel(backend):

            def dense() -> torch.Tensor:
                heads_first = (x.transpose(1, 2) for x in inputs)
                gqa = args.heads != args.kv_heads
                return F.scaled_dot_product_attention(*heads_first, is_causal=True, enable_gqa=gqa).transpose(1, 2)

            yield measure(f"dense {name}", seq_len, per_pair * pairs, dense, inputs, dout)
    for spec in args.patterns:
        pattern = Pattern.parse(spec, args.block_size)
        visible = pattern.density(seq_len, args.kv_heads) * pairs

        for backend in args.backends:
            if backend == "hopper" and not supports(*inputs, pattern, packed=False):
                continue

            def sparse(pattern: Pattern = pattern, backend: str = backend) -> torch.Tensor:
                return s2_attention(*inputs, pattern, backend=backend)

            yield measure(f"S2 {spec} {backend}", seq_len, per_pair * visible, sparse, inputs, dout)


def speedup(rows: list[dict], row: dict, baseline: str, key: str) -> float:
    base = next(r for r in rows if r["seq_len"] == row["seq_len"] and r["name"] == f"dense {baseline}")
    if key == "both_ms":
        return (base["forward_ms"] + base["backward_ms"]) / (row["forward_ms"] + row["backward_ms"])
    return base[key] / row[key]


def table(rows: list[dict]) -> str:
    lines = [
        "| length | kernel | forward ms | TFLOP/s | backward ms | TFLOP/s | peak GiB "
        "| time vs FA2, fwd | fwd+bwd | rate / cuDNN, fwd | bwd |",
        "|---:|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        # a ratio of rates is the inverse of `speedup`, which divides baseline by row
        rates = [1 / speedup(rows, row, "cuDNN", f"{way}_tflops") for way in ("forward", "backward")]
        lines.append(
            f"| {row['seq_len']:,} | {row['name']} | {row['forward_ms']:.3f} | {row['forward_tflops']:.0f} "
            f"| {row['backward_ms']:.3f} | {row['backward_tflops']:.0f} | {row['peak_gib']:.2f} "
            f"| {speedup(rows, row, 'FlashAttention-2', 'forward_ms'):.2f}x "
            f"| {speedup(rows, row, 'FlashAttention-2', 'both_ms'):.2f}x "
            f"| {rates[0]:.2f} | {rates[1]:.2f} |"
        )
    return "\n".join(lines)


def plot(rows: list[dict], path: Path, title: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 4, figsize=(19, 4.4), constrained_layout=True)
    names = list(dict.fromkeys(row["name"] for row in rows))
    for name in names:
        mine = [row for row in rows if row["name"] == name]
        lengths = [row["seq_len"] for row in mine]
        style = {"marker": "o", "linestyle": "--" if name.startswith("dense") else "-", "label": name}
        axes[0].plot(lengths, [row["forward_ms"] + row["backward_ms"] for row in mine], **style)
        axes[1].plot(lengths, [row["forward_tflops"] for row in mine], **style)
        axes[2].plot(lengths, [row["backward_tflops"] for row in mine], **style)
        axes[3].plot(lengths, [speedup(rows, row, "FlashAttention-2", "both_ms") for row in mine], **style)
    labels = (
        "forward + backward, ms",
        "forward, useful TFLOP/s",
        "backward, useful TFLOP/s",
        "speed-up over FlashAttention-2",
    )
    lengths = sorted({row["seq_len"] for row in rows})
    for axis, label in zip(axes, labels, strict=True):
        axis.set_xscale("log", base=2)
        axis.set_xticks(lengths, [f"{n // 1024}k" for n in lengths])
        axis.set_xlabel("sequence length")
        axis.set_title(label)
        axis.grid(alpha=0.3)
    axes[0].set_yscale("log")
    axes[3].set_yscale("log")
    axes[1].set_ylim(bottom=0)
    axes[2].set_ylim(bottom=0)
    axes[0].legend(fontsize=8)
    figure.suptitle(title)
    figure.savefig(path, dpi=130)


def git_commit() -> str:
    result = subprocess.run(
        ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    return result.stdout.strip() or "unknown"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", default="8192,32768,131072", type=lambda s: [int(x) for x in s.split(",")])
    parser.add_argument("--patterns", default="L1V15,L8V16", type=lambda s: s.split(","))
    parser.add_argument("--backends", default="triton,hopper", type=lambda s: s.split(","))
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=32)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--block-size", type=int, default=64)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16"])
    parser.add_argument("--commit", default=None, help="commit to name in the report (default: git)")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "benchmarks")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    if not torch.cuda.is_available():
        sys.exit("error: bench needs a CUDA device")
    machine = torch.cuda.get_device_name()
    rows = [row for seq_len in args.lengths for row in measure_length(args, seq_len)]
    versions = {"torch": torch.__version__, "triton": triton.__version__, "cuda": torch.version.cuda or "none",
                "cudnn": str(torch.backends.cudnn.version())}  # fmt: skip
    date = datetime.date.today().isoformat()
    stem = args.output / f"{date}-{re.sub('[^a-z0-9]+', '-', machine.lower())}-attention"
    args.output.mkdir(parents=True, exist_ok=True)
    setup = {k: v for k, v in vars(args).items() if k not in ("output", "commit")}
    commit = args.commit or git_commit()
    record = {
        "machine": machine,
        "date": date,
        "commit": commit,
        "versions": versions,
        "setup": setup,
        "rows": rows,
    }
    stem.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    title = (
        f"S2-Attention on {machine}: batch {args.batch}, {args.heads}/{args.kv_heads} heads, d {args.head_dim}, "
        f"block {args.block_size}, {args.dtype}"
    )
    plot(rows, stem.with_suffix(".png"), title)
    command = "python scripts/bench_attention.py " + " ".join(sys.argv[1:])
    stem.with_suffix(".md").write_text(
        f"# {title}\n\n"
        f"- command: `{command.strip()}`\n- commit: {commit}\n"
        f"- versions: {', '.join(f'{k} {v}' for k, v in versions.items())}\n"
        f"- medians of `triton.testing.do_bench`; all rows of one length share inputs and process\n"
        f"- useful TFLOP/s count visible pairs only: 4 D a pair and head forward, 10 D backward\n\n"
        f"{table(rows)}\n\n![latency, rates and speed-up]({stem.name}.png)\n"
    )
    print(f"wrote {stem}.md, .json and .png")


if __name__ == "__main__":
    main()
