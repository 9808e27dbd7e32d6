"""What a layer's attention is told of a batch, and what it holds."""

import gc
import weakref
from types import SimpleNamespace

import pytest
import torch

from s2.attention import Pattern
from s2.attention.kernels.triton.paged_launch import Grid

pytest.importorskip("vllm.v1.core.kv_cache_manager", reason="needs vLLM 0.24")

from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import CommonAttentionMetadata

from s2.integrations.vllm import layer as layers
from s2.integrations.vllm.backend import PagedMetadataBuilder

LONGEST = 131072


def metadata(queries, lengths):
    """Of a batch whose sequences have so many new tokens and so many tokens."""
    config = SimpleNamespace(model_config=SimpleNamespace(max_model_len=LONGEST))
    builder = PagedMetadataBuilder(None, ["layer"], config, torch.device("cpu"))
    starts = torch.tensor([0, *queries], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return builder.build(0, CommonAttentionMetadata(
        query_start_loc=starts, query_start_loc_cpu=starts, seq_lens=torch.tensor(lengths, dtype=torch.int32),
        num_reqs=len(queries), num_actual_tokens=sum(queries), max_query_len=max(queries), max_seq_len=max(lengths),
        block_table_tensor=torch.zeros(len(queries), 4, dtype=torch.int32),
        slot_mapping=torch.zeros(sum(queries), dtype=torch.int64),
    ))  # fmt: skip


def test_the_kernel_of_a_decode_step_does_not_depend_on_how_long_sequences_are():
    """vLLM warms a graph up with sequences of one token, captures it with the longest, and replays it with any."""
    q, grids = torch.empty(8, 32, 128, dtype=torch.bfloat16, device="meta"), []
    for length in (1, 5000, LONGEST):
        ((first, last, queries, longest),) = metadata([1] * 8, [length] * 8).parts
        grids.append(Grid.of(q, 8, last - first, 64, queries, longest))
    assert grids[0] == grids[1] == grids[2]
    assert grids[0].constants["SPLIT"] and not Grid.of(q, 8, 8, 64, 1, 1).constants["SPLIT"]


def test_sequences_that_decode_come_first_and_prompts_are_as_long_as_they_are():
    assert metadata([1, 1, 30, 7], [90, 400, 30, 50]).parts == ((0, 2, 1, LONGEST), (2, 4, 30, 400))


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


@pytest.mark.parametrize("apart", [False, True])
def test_kernels_are_warmed_up_once_the_weights_are_there(monkeypatch, apart):
    said = []
    monkeypatch.setattr(Attention, "process_weights_after_loading", lambda layer, dtype: said.append(dtype))
    monkeypatch.setattr(layers, "warm_up", lambda *heads, **others: said.append((heads, others)))
    pattern = Pattern.parse("L1V3", 16)
    where = {"rotation": 2, "head_offset": 1, "total_kv_heads": 5}
    layer = bare_layer()
    layer.impl = SimpleNamespace(pattern=pattern, heads=where)
    layer.num_heads, layer.num_kv_heads, layer.head_size = 8, 4, 64
    layer.device, layer.other_heads = torch.device("cuda", 0), [1] * apart
    layer.process_weights_after_loading(torch.float16)
    assert said[0] == torch.float16 and said[1] == (
        (pattern, 8, 4, 64), {"dtype": torch.float16, "device": layer.device, "apart": apart, **where},
    )  # fmt: skip
