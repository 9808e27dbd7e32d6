"""transformers knows `s2_llama`: the auto classes open our folders, and `attn_implementation="s2"` is our attention.

`import s2` is enough (see `lazy`); whoever imports this module has all of it at once.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from .modeling_s2_llama import NAME, S2LlamaConfig, S2LlamaForCausalLM, S2LlamaModel

AutoConfig.register(S2LlamaConfig.model_type, S2LlamaConfig, exist_ok=True)
AutoModel.register(S2LlamaConfig, S2LlamaModel, exist_ok=True)
AutoModelForCausalLM.register(S2LlamaConfig, S2LlamaForCausalLM, exist_ok=True)
# their save_pretrained puts the modeling file beside the weights
S2LlamaConfig.register_for_auto_class()
S2LlamaModel.register_for_auto_class("AutoModel")
S2LlamaForCausalLM.register_for_auto_class("AutoModelForCausalLM")

__all__ = ["NAME", "S2LlamaConfig", "S2LlamaForCausalLM", "S2LlamaModel"]
