"""Our model in vLLM, on a CPU without its scheduler: weights of an export, pages from vLLM's memory manager, several
requests in one batch, prompts in chunks beside tokens that follow. Its logits are those of our own model."""

import json
import os
import subprocess
import sys

import pytest
import torch

from s2.model.config import ModelConfig
from s2.model.hf import save_pretrained
from s2.model.transformer import Transformer

pytest.importorskip("vllm.v1.core.kv_cache_manager", reason="needs vLLM 0.24")

pytestmark = pytest.mark.nightly  # vLLM takes its time to be imported

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512, "block_size": 16,
    "initializer_range": 0.2,
}  # fmt: skip

# vLLM keeps its configuration, its process groups and its registries in globals: so each case runs in a child process.
CHILD = """
import json
import sys

import torch
import vllm.platforms
from vllm.platforms.cpu import CpuPlatform

vllm.platforms._current_platform = CpuPlatform()  # without the compiled parts vLLM does not know where it runs
CpuPlatform.support_hybrid_kv_cache = classmethod(lambda cls: True)

from vllm.config import CacheConfig, DeviceConfig, VllmConfig, set_current_vllm_config
from vllm.config import ModelConfig as ServedConfig
from vllm.distributed import init_distributed_environment, initialize_model_parallel
from vllm.forward_context import set_forward_context
from vllm.model_executor.model_loader import get_model
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import get_kv_cache_configs, get_request_block_hasher, init_none_hash
from vllm.v1.request import Request

from s2.integrations.vllm import register

register_backend(AttentionBackendEnum.CUSTOM, "another.plugin.Backend")
register()
assert AttentionBackendEnum.CUSTOM.get_path() == "another.plugin.Backend", "vLLM's only place for others' backends"
folder, case = sys.argv[1], json.loads(sys.argv[2])
PAGES, BLOCK, STEP = 400, 16, 64
served = ServedConfig(model=folder, dtype="float32", skip_tokenizer_init=True, enforce_eager=True)
assert served.max_model_len == 512, "also where RoPE has a factor"
config = VllmConfig(
    model_config=served, device_config=DeviceConfig("cpu"),
    cache_config=CacheConfig(num_gpu_blocks_override=PAGES, **case["cache"]),
)
config.scheduler_config.max_num_batched_tokens = STEP
config.scheduler_config.disable_hybrid_kv_cache_manager = not case["frees"]
with set_current_vllm_config(config):
    init_distributed_environment(1, 0, f"file://{folder}/store", 0, backend="gloo")
    initialize_model_parallel(1, 1)
    model = get_model(vllm_config=config)
assert config.cache_config.block_size == BLOCK

layers = config.compilation_config.static_forward_context
specs = {name: layer.get_kv_cache_spec(config) for name, layer in layers.items()}
(placed,) = get_kv_cache_configs(config, [specs], [1 << 40])
for tensor in placed.kv_cache_tensors:
    raw = torch.full((tensor.size // 4,), torch.nan)  # pages that nobody has written
    for name in tensor.shared_by:
        spec, backend = specs[name], layers[name].get_attn_backend()
        shape = backend.get_kv_cache_shape(PAGES, spec.block_size, spec.num_kv_heads, spec.head_size)
        layers[name].kv_cache = raw.view(shape)
builders = [
    layers[group.layer_names[0]].get_attn_backend().get_builder_cls()(
        group.kv_cache_spec, group.layer_names, config, torch.device("cpu")
    )
    for group in placed.kv_cache_groups
]
manager = KVCacheManager(placed, 512, scheduler_block_size=BLOCK, hash_block_size=BLOCK, max_num_batched_tokens=STEP)
init_none_hash(sha256)
hasher = get_request_block_hasher(BLOCK, sha256)


def run(batch):
    # batch: (request, new tokens), those of one token first -> logits of each request's new tokens
    counts = [new for _, new in batch]
    starts = torch.tensor([0, *counts], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    lengths = torch.tensor([r.num_computed_tokens + new for r, new in batch], dtype=torch.int32)
    tokens, positions = [], []
    for request, new in batch:
        seen = range(request.num_computed_tokens, request.num_computed_tokens + new)
        tokens += [request.all_token_ids[i] for i in seen]
        positions += list(seen)
        request.num_computed_tokens += new
    metadata = {}
    for nth, (group, builder) in enumerate(zip(placed.kv_cache_groups, builders, strict=True)):
        table = torch.zeros(len(batch), 512 // BLOCK, dtype=torch.int32)
        for row, (request, _) in enumerate(batch):
            ids = manager.get_block_ids(request.request_id)[nth]
            table[row, : len(ids)] = torch.tensor(ids, dtype=torch.int32)
        common = CommonAttentionMetadata(
            query_start_loc=starts, query_start_loc_cpu=starts, seq_lens=lengths, num_reqs=len(batch),
            num_actual_tokens=sum(counts), max_query_len=max(counts), max_seq_len=int(lengths.max()),
            block_table_tensor=table, slot_mapping=torch.zeros(sum(counts), dtype=torch.int64),
        )
        metadata |= dict.fromkeys(group.layer_names, builder.build(0, common))
    with set_current_vllm_config(config), set_forward_context(metadata, config, sum(counts), slot_mapping={}):
        with torch.inference_mode():
            hidden = model(torch.tensor(tokens), torch.tensor(positions), None)
            logits = hidden @ model.lm_head.weight.T
    return logits.split(counts)


results, running = {}, []
arrivals = [(int(step), prompt) for step, prompt in case["arrivals"]]
for step in range(90):
    batch = []
    for request in list(running):
        left = request.num_tokens - request.num_computed_tokens
        if left == 0:
            if request.num_tokens >= case["stop"]:
                manager.free(request)
                running.remove(request)
                continue
            request.append_output_token_ids((7 * request.num_tokens) % 64)
            left = 1
        new = min(left, case["chunk"])
        assert manager.allocate_slots(request, new) is not None
        batch.append((request, new))
    for arrival, prompt in arrivals:
        if arrival == step:
            request = Request(f"r{arrival}", prompt, SamplingParams(max_tokens=99), None, block_hasher=hasher)
            found, count = manager.get_computed_blocks(request)
            new = min(len(prompt) - count, case["chunk"])
            assert manager.allocate_slots(request, new, count, found, full_sequence_must_fit=True) is not None
            request.num_computed_tokens = count
            results[request.request_id] = {"found": count, "logits": []}
            running.append(request)
            batch.append((request, new))
    if not batch:
        continue
    batch.sort(key=lambda pair: pair[1])
    for (request, _), logits in zip(batch, run(batch), strict=True):
        results[request.request_id]["logits"].append(logits)
        results[request.request_id]["tokens"] = list(request.all_token_ids[: request.num_computed_tokens])
for result in results.values():
    result["logits"] = torch.cat(result["logits"])
pages = {name: type(spec).__name__ for name, spec in specs.items()}
torch.save({"results": results, "specs": pages, "groups": len(placed.kv_cache_groups)}, f"{folder}/served.pt")
"""


def serve(folder, **case):
    case = {"cache": {}, "frees": True, "chunk": 50, "stop": 230, **case}
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "VLLM_LOGGING_LEVEL": "ERROR"}
    command = [sys.executable, "-c", CHILD, str(folder), json.dumps(case)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if result.returncode:
        raise RuntimeError(result.stdout[-3000:] + result.stderr[-6000:])
    return torch.load(folder / "served.pt")


def export(folder, **changes):
    torch.manual_seed(0)
    config = ModelConfig(**{**SIZES, **changes})
    model = Transformer(config).eval()
    for parameter in model.parameters():
        if parameter.dim() == 1:  # biases and norms that do something
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    save_pretrained(model, config, folder, dtype=torch.float32)
    return model


PREFIX = [(13 * i + i * i) % 64 for i in range(200)]
ARRIVALS = [(0, PREFIX), (2, PREFIX[:90] + PREFIX[:60]), (8, [*PREFIX[:170], 1, 2, 3]), (9, [5])]
ROPE = {"dense": {"rope_type": "linear", "factor": 2.0}, "sparse": None}


@pytest.mark.parametrize(
    ("changes", "frees"),
    [
        ({"attention_layout": "L1V3+sink1+dense1"}, True),
        ({"attention_layout": "L1V3+sink1+dense1"}, False),
        ({"attention_layout": "L1V3<8+dense1"}, True),
        ({"attention_layout": "L2V3<5V6-inter", "qk_norm": True, "rope_scaling": ROPE}, True),
        ({"attention_layout": "dense|W2", "qkv_bias": True, "tie_word_embeddings": True}, True),
    ],
)
def test_logits_are_those_of_our_model(tmp_path, changes, frees):
    model = export(tmp_path, **changes)
    served = serve(tmp_path, arrivals=ARRIVALS, frees=frees)
    kinds = set(served["specs"].values())
    assert kinds == ({"FullAttentionSpec", "ShardedSpec"} if frees else {"FullAttentionSpec"})
    assert served["groups"] > 1 if frees else served["groups"] == 1
    assert any(result["found"] for result in served["results"].values()), "a prefix was found again"
    for result in served["results"].values():
        tokens = torch.tensor(result["tokens"])[None]
        with torch.inference_mode():
            wanted = model(tokens)[0, result["found"] :]
        assert len(result["tokens"]) >= 80
        torch.testing.assert_close(result["logits"], wanted, atol=2e-4, rtol=1e-3)
