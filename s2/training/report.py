"""What a stage will do, said before it starts: parameters, memory per device, layers and what they see."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from s2.model.config import ModelConfig

GIB = 2**30


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes per device. Activations are those of one micro-batch; communication buckets, the allocator's slack and
    the CUDA context (a few GiB together) come on top."""

    weights: float
    gradients: float
    optimizer: float
    activations: float

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.activations

    def __str__(self) -> str:
        parts = [
            f"{name} {getattr(self, name) / GIB:.2f}" for name in ("weights", "gradients", "optimizer", "activations")
        ]
        return f"{self.total / GIB:.2f} GiB per device ({', '.join(parts)})"


def estimate_memory(
    config: ModelConfig,
    tokens: int,
    *,
    stage: int,
    world_size: int,
    precision: str,
    checkpointing: str,
    offload_optimizer: bool = False,
) -> MemoryEstimate:
    """Memory of one rank.

    Model states follow Rajbhandari et al., arXiv 1910.02054, with fp32 gradient accumulation: in bf16 a parameter
    costs 2 bytes of weight, 4 of gradient and 12 of fp32 master weight and Adam moments; in fp32 4, 4 and 8.
    ZeRO-1 shards the optimizer, ZeRO-2 the gradients too, ZeRO-3 the weights too.

    Args:
        tokens: of a micro-batch on one rank.
        stage: ZeRO stage (0: nothing is sharded).
        precision: Lightning's name, for example 32-true or bf16-mixed.
        checkpointing: none, selective or full.
    """
    low = "16" in precision
    parameters = config.num_parameters()
    shard = [1.0 if stage < level else 1.0 / world_size for level in (1, 2, 3)]
    return MemoryEstimate(
        weights=parameters * (2 if low else 4) * shard[2],
        gradients=parameters * 4 * shard[1],
        optimizer=0.0 if offload_optimizer else parameters * (12 if low else 8) * shard[0],
        activations=tokens * _activation_bytes(config, checkpointing, 2 if low else 4),
    )


def _activation_bytes(config: ModelConfig, checkpointing: str, width: int) -> float:
    """Bytes kept per token between forward and backward.

    A block keeps, in elements: two residual inputs and two norm outputs (4 E), rotated q, k, v (Q + 2 K), the attention
    output (Q), and gate, up, their activation and product (4 F). `selective` keeps the block's input, q, k, v, the
    attention output and its projection, `full` only the input; both hold one whole block at a time in the backward.
    The head keeps the last hidden states, their norm and their gradient (3 E); its logits exist a chunk at a time.
    """
    E, F = config.hidden_size, config.intermediate_size
    Q = config.num_attention_heads * config.head_dim
    K = config.num_key_value_heads * config.head_dim
    whole = (4 * E + 2 * Q + 2 * K + 4 * F) * width
    kept = {"none": whole, "selective": (2 * E + 2 * Q + 2 * K) * width, "full": E * width}[checkpointing]
    working = 0 if checkpointing == "none" else whole
    return config.num_hidden_layers * kept + working + 3 * E * width


def data_report(data: Any, total_tokens: int) -> str:
    """How often a run goes through its data, and what of its text the tokens lack; printed once the data is there."""
    passes = data.passes(total_tokens)
    lines = [
        f"data: {each.component}: {each.asked:,} tokens of {each.available:,}, {each.passes:.2f} passes"
        for each in passes
    ]
    if repeated := [each for each in passes if each.passes > 1]:
        most = max(repeated, key=lambda each: each.passes)
        lines.append(
            f"warning: data is repeated, {most.component} {most.passes:.2f} times; prepare more of it, give it less "
            f"weight, or train on fewer tokens"
        )
    lines += [f"warning: not in the tokens: {line}" for line in data.lost_text()]
    return "\n".join(lines)


def layout_table(config: ModelConfig, seq_len: int) -> str:
    """Layers that attend alike in one line each: pattern, density at `seq_len`, and the share of the causal context
    that a layer's heads see together (and over how many layers it is all of it)."""
    layout, heads = config.layout, config.layout.ruled_heads(config.num_key_value_heads)
    num_blocks = -(-seq_len // config.block_size)
    alike: dict[tuple, list[int]] = {}  # layers whose heads follow the same rules
    for layer, (pattern, rotation) in enumerate(zip(layout.patterns, layout.rotations, strict=True)):
        alike.setdefault((pattern, pattern.rules(heads, layer=rotation)), []).append(layer)
    rows = [("layers", "pattern", "density", "its heads see together")]
    for (pattern, _), layers in alike.items():
        rotation = layout.rotations[layers[0]]
        covered = pattern.union_coverage(num_blocks, heads, layer=rotation)
        together = f"{covered:.1%}"
        if covered < 1:
            needed = pattern.layers_to_cover(heads)
            together += f", all of it over {needed} layers" if needed else ", never all of it"
        density = pattern.density(seq_len, heads, layer=rotation)
        rows.append((_ranges(layers), str(pattern), f"{density:.2%}", together))
    whole = layout.density(seq_len, heads)
    rows.append(("all", config.attention_layout, f"{whole:.2%}", f"at {seq_len:,} tokens"))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return "\n".join(f"  {a:>{widths[0]}}  {b:<{widths[1]}}  {c:>{widths[2]}}  {d}" for a, b, c, d in rows)


def _ranges(layers: list[int]) -> str:
    """[0, 1, 2, 5] -> 0-2,5"""
    parts: list[list[int]] = []
    for layer in layers:
        if parts and layer == parts[-1][-1] + 1:
            parts[-1].append(layer)
        else:
            parts.append([layer])
    return ",".join(str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts)


def memory_of(module: Any, data: Any, trainer: Any, precision: str | None = None) -> MemoryEstimate:
    """`estimate_memory` of a run, in another precision where one is given."""
    strategy = trainer.strategy
    return estimate_memory(
        module.config,
        data.micro_batch_size * data.seq_len,
        stage=getattr(strategy, "stage", 0),
        world_size=trainer.world_size,
        precision=precision or trainer.precision,
        checkpointing=module.activation_checkpointing,
        offload_optimizer=getattr(strategy, "offloads_optimizer", False),
    )


def launch_report(run: Any, module: Any, data: Any, trainer: Any, precision: Any) -> str:
    """The text printed before the first step.

    Args:
        precision: trainer.precision of the recipe, which the CPU does not train in.
    """
    config: ModelConfig = module.config
    strategy = trainer.strategy
    accumulate, world = trainer.accumulate_grad_batches, trainer.world_size
    on_cpu = strategy.root_device.type == "cpu"
    wanted = str(precision or trainer.precision) if on_cpu else str(trainer.precision)
    step = data.micro_batch_size * data.seq_len * accumulate * world
    return "\n".join(
        [
            f"{run.recipe} {run.stage} -> {run.folder}",
            f"model: {config.num_parameters():,} parameters, {config.num_hidden_layers} layers, hidden "
            f"{config.hidden_size}, {config.num_attention_heads} query / {config.num_key_value_heads} KV heads of "
            f"{config.head_dim}, vocabulary {config.vocab_size:,}, rope_theta {config.rope_theta:g}"
            + (f", weights from {module.init_from}" if module.init_from else ""),
            layout_table(config, data.seq_len),
            f"batch: {data.seq_len:,} tokens x {data.micro_batch_size} x {accumulate} accumulated x {world} ranks = "
            f"{step:,} tokens a step, {trainer.max_steps:,} steps, {step * trainer.max_steps:,} tokens",
            f"memory estimate: {memory_of(module, data, trainer, wanted)}; {wanted}, ZeRO stage "
            f"{getattr(strategy, 'stage', 0)}, checkpointing {module.activation_checkpointing}"
            + (f" (of a GPU; here on the CPU, in {trainer.precision}, it is not estimated)" if on_cpu else ""),
        ]
    )
