"""Layer specs whose core attention is ours: Megatron's own, local or of Transformer Engine, with two modules replaced.

The layout travels in the spec (`ModuleSpec.params`), so `TransformerConfig` stays Megatron's. A layer takes its pattern
by its number in the whole model, hence one spec serves every layer, pipeline stage and virtual stage.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, TypeVar

from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_decoder_block_spec,
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

from s2.attention import LayerLayout

from .core_attention import S2CoreAttention, S2SelfAttention, check_layout

_Spec = TypeVar("_Spec", ModuleSpec, TransformerBlockSubmodules)


def get_s2_layer_spec(
    config: TransformerConfig,
    attention_layout: str | LayerLayout,
    block_size: int = 64,
    *,
    use_transformer_engine: bool = False,
) -> ModuleSpec:
    """Of a transformer layer, for `GPTModel(transformer_layer_spec=)`: every layer of the model, each with the pattern
    that the layout gives it.

    Args:
        config: of the model; says norms, experts and QK norms as for Megatron's specs.
        attention_layout: such as "L4V24+dense10-22" (`s2.attention.grammar`), or one that has been read.
        block_size: of a layout that is a string.
        use_transformer_engine: put it into Transformer Engine's layer instead of Megatron's local one.

    Raises:
        ValueError: a layout that cannot be read, or of other layers or heads than config's.
    """
    layout = _read(attention_layout, block_size, config, use_transformer_engine)
    settings: dict[str, Any] = {
        "num_experts": config.num_moe_experts,
        "moe_grouped_gemm": config.moe_grouped_gemm,
        "qk_layernorm": config.qk_layernorm,
        "multi_latent_attention": config.multi_latent_attention,
    }
    if use_transformer_engine:
        spec = get_gpt_layer_with_transformer_engine_spec(**settings)
    else:
        spec = get_gpt_layer_local_spec(**settings, normalization=config.normalization)
    return with_s2_attention(spec, config, layout)


def get_s2_block_spec(
    config: TransformerConfig,
    attention_layout: str | LayerLayout,
    block_size: int = 64,
    *,
    use_transformer_engine: bool = False,
    vp_stage: int | None = None,
    pp_rank: int | None = None,
) -> TransformerBlockSubmodules:
    """As `get_s2_layer_spec`, a spec for each layer of this pipeline stage: for models whose layers differ in more than
    attention (`moe_layer_freq`). The last two arguments are those of `get_gpt_decoder_block_spec`."""
    layout = _read(attention_layout, block_size, config, use_transformer_engine)
    spec = get_gpt_decoder_block_spec(
        config,
        use_transformer_engine=use_transformer_engine,
        normalization=config.normalization,
        vp_stage=vp_stage,
        pp_rank=pp_rank,
    )
    return with_s2_attention(spec, config, layout)


def with_s2_attention(spec: _Spec, config: TransformerConfig, layout: LayerLayout) -> _Spec:
    """A copy of a layer's or a block's spec that attends by `layout`; everything else in it stays.

    Raises:
        ValueError: its attention is not Megatron's `SelfAttention`; a layout of other layers or heads than config's.
    """
    check_layout(layout, config.num_layers, config.num_attention_heads, config.num_query_groups)
    if isinstance(spec, TransformerBlockSubmodules):
        return replace(spec, layer_specs=[with_s2_attention(each, config, layout) for each in spec.layer_specs])
    attention = getattr(spec.submodules, "self_attention", None)
    if not isinstance(attention, ModuleSpec) or attention.module is not SelfAttention:
        found = getattr(attention, "module", attention)
        raise ValueError(f"the spec's self_attention is {found!r}, must be {SelfAttention!r} for attention by a layout")
    core = ModuleSpec(S2CoreAttention, params={"layout": layout, "num_kv_heads": config.num_query_groups})
    attention = replace(
        attention, module=S2SelfAttention, submodules=replace(attention.submodules, core_attention=core)
    )
    return replace(spec, submodules=replace(spec.submodules, self_attention=attention))


def _read(
    layout: str | LayerLayout, block_size: int, config: TransformerConfig, use_transformer_engine: bool
) -> LayerLayout:
    if use_transformer_engine and not HAVE_TE:
        raise ValueError("use_transformer_engine=True needs Transformer Engine, which is not installed")
    return LayerLayout.parse(layout, config.num_layers, block_size) if isinstance(layout, str) else layout
