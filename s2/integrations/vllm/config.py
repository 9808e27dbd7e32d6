"""What vLLM's configuration has to be for our models, and what of it keeps the whole cache."""

from __future__ import annotations

from typing import Any

from vllm import envs
from vllm.logger import init_logger
from vllm.model_executor.models.config import VerifyAndUpdateConfig

from s2.attention.schedule import MAX_LEVELS, has_closed_form
from s2.model.config import ModelConfig

logger = init_logger(__name__)


class ServingConfig(VerifyAndUpdateConfig):
    """Called by vLLM before anything is built."""

    @staticmethod
    def verify_and_update_model_config(model_config: Any) -> None:
        """The longest text is config.json's `max_position_embeddings`: vLLM's own bound is that times the factor of
        RoPE (`linear`), or `original_max_position_embeddings` times it (`yarn`), but ours counts the factor already.

        Raises:
            ValueError: a longer one is asked for, without `VLLM_ALLOW_LONG_MAX_MODEL_LEN`.
        """
        trained = model_config.hf_config.max_position_embeddings
        if model_config.original_max_model_len in (None, -1):  # -1: or as much as there is memory for
            model_config.max_model_len = trained
        elif model_config.max_model_len > trained:
            said = (
                f"--max-model-len={model_config.max_model_len}, but config.json has max_position_embeddings={trained}, "
                f"the longest text that the model was trained for"
            )
            if not envs.VLLM_ALLOW_LONG_MAX_MODEL_LEN:
                raise ValueError(f"{said}; VLLM_ALLOW_LONG_MAX_MODEL_LEN=1 serves longer ones nevertheless")
            logger.warning_once(said)

    @staticmethod
    def verify_and_update_config(vllm_config: Any) -> None:
        """Pages hold a block of the attention each.

        Raises:
            ValueError: the model or an option that is not supported; says which.
        """
        config, cache = model_config(vllm_config.model_config.hf_config), vllm_config.cache_config
        if cache.user_specified_block_size and cache.block_size != config.block_size:
            raise ValueError(
                f"--block-size={cache.block_size}, but config.json has block_size={config.block_size}: pages must hold "
                f"one block of the attention; leave --block-size out"
            )
        dtype = str(vllm_config.model_config.dtype).removeprefix("torch.")
        if cache.cache_dtype not in ("auto", dtype):
            raise ValueError(
                f"--kv-cache-dtype={cache.cache_dtype}, but keys are kept in the model's dtype, {dtype}: leave it out"
            )
        if backend := vllm_config.attention_config.backend:
            raise ValueError(f"--attention-backend={backend.name} does not know attention_layout: leave it out")
        if envs.VLLM_BATCH_INVARIANT:
            raise ValueError(
                "VLLM_BATCH_INVARIANT=1 is not supported: the order in which a query's keys are summed up depends on "
                "the batch that it comes in"
            )
        heads = config.layout.ruled_heads(config.num_key_value_heads)
        if heads != config.num_key_value_heads:
            raise ValueError(
                f"config.json: attention_layout={config.attention_layout!r} has a rule for each of {heads} query heads,"
                f" but serving takes one for each of {config.num_key_value_heads} KV heads"
            )
        if odd := [pattern for pattern in config.layout if not has_closed_form(pattern)]:
            raise ValueError(
                f"config.json: attention_layout={config.attention_layout!r}: serving takes up to {MAX_LEVELS} stride "
                f"levels, whose strides divide each other, not {odd[0]}"
            )
        cache.block_size, cache.user_specified_block_size = config.block_size, True


def model_config(hf_config: Any) -> ModelConfig:
    """Ours, of what transformers read from config.json."""
    return ModelConfig.from_hf_dict(hf_config.to_dict())


def keeps_all(vllm_config: Any) -> str | None:
    """Why every page of every layer is kept until its request ends; None: pages are freed."""
    parallel = vllm_config.parallel_config
    if vllm_config.scheduler_config.disable_hybrid_kv_cache_manager:
        return "the hybrid KV cache manager is disabled"
    if parallel.tensor_parallel_size > 1:
        return "with tensor parallelism vLLM wants the same cache on every rank, but ranks hold other heads"
    if vllm_config.speculative_config is not None:
        return "with speculative decoding tokens are taken back"
    if vllm_config.kv_transfer_config is not None:
        return "KV connectors do not know pages with holes"
    return None
