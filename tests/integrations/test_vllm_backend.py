"""What a layer's attention holds."""

import gc
import weakref
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm.v1.core.kv_cache_manager", reason="needs vLLM 0.24")

from s2.integrations.vllm import layer as layers


def bare_layer():
    """One that vLLM has not built."""
    layer = layers.PagedAttention.__new__(layers.PagedAttention)
    torch.nn.Module.__init__(layer)
    return layer


@pytest.mark.parametrize("heads", [1, 3])
def test_a_layer_holds_no_pages_that_vllm_has_taken_away(heads):
    """Among them those with which vLLM measures what graphs take, before it makes the real ones."""
    layer = bare_layer()
    layer.other_heads = [SimpleNamespace(kv_cache=torch.zeros(5, 2, 16, 1, 8)) for _ in range(1, heads)]
    layer.kv_cache = torch.zeros(5, 2, 16, 1, 8)
    keys, values = layer.page_views()
    assert (keys[0] if heads > 1 else keys).data_ptr() == layer.kv_cache.data_ptr()
    assert layer.page_views()[0] is keys, "views are made once"
    held = weakref.ref(keys[0] if heads > 1 else keys)
    del keys, values
    for head in [layer, *layer.other_heads]:
        head.kv_cache = torch.tensor([])
    gc.collect()
    assert held() is None
    layer.kv_cache = torch.zeros(9, 2, 16, 1, 8)
    for head in layer.other_heads:
        head.kv_cache = torch.zeros(9, 2, 16, 1, 8)
    assert all(len(pages) == 9 for pages in (layer.page_views()[0] if heads > 1 else [layer.page_views()[0]]))
