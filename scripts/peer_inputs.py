"""Inputs of `bench_inference_peers.py`: a layer's queries, keys and values, from a file or drawn, and full attention.

Noise alone tells nothing of methods that choose keys by their scores: every key is as good as another. What `draw`
gives has what such methods live on, in the proportions that trained layers roughly have: a sink, runs of tokens of one
topic that other runs come back to, and a few keys that all queries like. A file has the real thing
(`attention_tensors.py` writes one).

Shapes: S tokens, Hq query heads, H KV heads, D head dimension.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor

HEAD_DIM = 128  # what all peers' kernels take; smaller ones are filled up with zeros
TOPICS, RUN = 64, 96  # topics of a head, and tokens for which one lasts on average
TOPIC_SCORE, SINK_SCORE, LIKED_SCORE = 5.0, 2.0, 4.0  # added to a score; the sink's is beyond log(S)
LIKED = 512  # one key in so many is liked by all queries
SINK_VALUE = 0.05  # length of the sink's value beside that of others


@dataclass(frozen=True)
class Inputs:
    """q `[S, Hq, D]`, k and v `[S, H, D]`."""

    q: Tensor
    k: Tensor
    v: Tensor

    def first(self, tokens: int) -> Inputs:
        return Inputs(self.q[:tokens], self.k[:tokens], self.v[:tokens])


def draw(
    tokens: int, heads: int, kv_heads: int, seed: int, device: str, dtype: torch.dtype, head_dim: int = HEAD_DIM,
    queries: int | None = None,
) -> Inputs:  # fmt: skip
    """Tokens of random topics. `queries`: only so many of the last queries."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=torch.float32)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, device=device)

    run = (uniform(tokens) < 1 / RUN).cumsum(0)
    topic = torch.randint(TOPICS, (tokens,), generator=generator, device=device)[run]
    queries = queries or tokens
    keys, values = F.normalize(normal(TOPICS, kv_heads, head_dim), dim=-1), normal(TOPICS, kv_heads, head_dim)
    liked = F.normalize(normal(kv_heads, head_dim), dim=-1)
    root = math.sqrt(head_dim)
    pull, sink = math.sqrt(TOPIC_SCORE * root), math.sqrt((math.log(tokens) + SINK_SCORE) * root)
    k = normal(tokens, kv_heads, head_dim) + pull * keys[topic]
    bonus = (uniform(tokens) < 1 / LIKED) * (LIKED_SCORE * root / sink)
    bonus[0] = sink
    k += bonus[:, None, None] * liked
    v = (normal(tokens, kv_heads, head_dim) + values[topic]) / math.sqrt(2)
    v[0] *= SINK_VALUE
    group = heads // kv_heads
    likes = (pull * keys[topic[-queries:]] + sink * liked).repeat_interleave(group, dim=1)
    q = normal(queries, heads, head_dim) + likes
    return Inputs(*(x.to(dtype) for x in (q, k, v)))


def load(path: Path, device: str, dtype: torch.dtype) -> tuple[Inputs, str]:
    """A file's tensors with heads of `HEAD_DIM`, scaled so that scores times `HEAD_DIM ** -0.5` are as before, and what
    the file says of where they come from.

    Raises:
        ValueError: names the file and what is wrong with it.
    """
    try:
        with safe_open(path, framework="pt") as file:
            source = (file.metadata() or {}).get("source", path.name)
            if missing := sorted({"q", "k", "v"} - set(file.keys())):
                raise ValueError(f"{path}: has no tensor {missing[0]!r}")
            q, k, v = (file.get_tensor(name) for name in "qkv")
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path}: not a readable safetensors file ({error})") from None
    head_dim = q.shape[-1]
    if q.dim() != 3 or k.dim() != 3 or k.shape != v.shape or q.shape[::2] != k.shape[::2] or q.shape[1] % k.shape[1]:
        raise ValueError(f"{path}: q {list(q.shape)} must be [S, Hq, D], k and v {list(k.shape)} [S, H, D]")
    if head_dim > HEAD_DIM:
        raise ValueError(f"{path}: heads of {head_dim} are larger than {HEAD_DIM}")
    q, k, v = (F.pad(x, (0, HEAD_DIM - head_dim)).to(device) for x in (q, k, v))
    return Inputs((q.float() * math.sqrt(HEAD_DIM / head_dim)).to(dtype), k.to(dtype), v.to(dtype)), source


# ---------------------------------------------------------------- full attention


def full_attention(q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> Tensor:
    """The definition, in float32: queries `[n, Hq, D]` of tokens at `positions` `[n]` on all keys up to themselves,
    `[S, H, D]`, a KV head at a time. Returns `[n, Hq, D]`."""
    group, after = q.shape[1] // k.shape[1], torch.arange(len(k), device=k.device) > positions[:, None]
    heads = []
    for n, queries in enumerate(q.float().split(group, dim=1)):
        scores = torch.einsum("ngd,sd->gns", queries, k[:, n].float()) * q.shape[-1] ** -0.5
        probs = scores.masked_fill_(after, float("-inf")).softmax(dim=-1)
        heads.append(torch.einsum("gns,sd->ngd", probs, v[:, n].float()))
    return torch.cat(heads, dim=1)


def relative_error(out: Tensor, wanted: Tensor) -> float:
    """Relative L2 error."""
    return float((out.float() - wanted.float()).norm() / wanted.float().norm())
