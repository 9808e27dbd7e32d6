"""vLLM serves our exports with sparse layers (`model_type` s2_llama): model, attention over pages, and a KV cache that
frees the pages that no later query sees.

vLLM finds `register` by the entry point `vllm.general_plugins` and calls it in each of its processes. Written for vLLM
0.24; nothing of vLLM is imported before that.
"""

from __future__ import annotations

import warnings

VERSION = "0.24."  # of vLLM: what is built on changes from one to the next
ARCHITECTURE = "S2LlamaForCausalLM"


def register() -> None:
    """Makes the model and its kind of cache known to vLLM. Calling it again changes nothing. A vLLM of another version
    is left as it is, with a warning: it serves all models but ours.

    The attention backend is not registered: its layers bring it, and vLLM has one place for others' backends, which
    another plugin may need.
    """
    import vllm

    if not vllm.__version__.startswith(VERSION):
        warnings.warn(
            f"vLLM {vllm.__version__} does not get the plugin of s2-attention, which is written for {VERSION}x: models "
            f"of type s2_llama cannot be served",
            stacklevel=2,
        )
        return
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    from . import cache, config

    ModelRegistry.register_model(ARCHITECTURE, f"{__name__}.model:{ARCHITECTURE}")
    MODELS_CONFIG_MAP[ARCHITECTURE] = config.ServingConfig
    cache.register()
