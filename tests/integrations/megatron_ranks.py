"""Two tensor-parallel CPU ranks of GPTModel: losses and gradients are those of our whole model.

Run by test_megatron.py; `python tests/integrations/megatron_ranks.py <folder>` in an environment with megatron-core.
"""

import sys
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
from check_megatron import gpt_model, without_cuda
from megatron.core import parallel_state

from s2.integrations.megatron import to_megatron
from s2.model import ModelConfig, Transformer

RANKS = 2


def compare(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    with without_cuda():
        parallel_state.initialize_model_parallel(RANKS)
        for kv_heads in (2, 1):  # one a rank; the same one on both
            config = ModelConfig(
                vocab_size=62,
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=3,
                num_attention_heads=4,
                num_key_value_heads=kv_heads,
                attention_layout="L1V4+dense1",
                block_size=16,
                initializer_range=0.1,
                qkv_bias=True,
            )
            torch.manual_seed(0)
            ours = Transformer(config)
            shard = partial(to_megatron, config=config, tp_rank=rank, tp_size=RANKS)
            theirs = gpt_model(ours, weights=shard, tensor_model_parallel_size=RANKS)
            tokens = torch.randint(62, (2, 101))
            inputs, labels = tokens[:, :-1], tokens[:, 1:]
            losses = theirs(inputs, torch.arange(100)[None].expand(2, -1), None, labels=labels.contiguous())
            wanted = F.cross_entropy(ours(inputs).flatten(0, 1), labels.flatten(), reduction="none").view(2, 100)
            torch.testing.assert_close(losses, wanted, rtol=1e-5, atol=1e-5)
            losses.mean().backward()
            wanted.mean().backward()
            gradients = shard({name: x.grad for name, x in ours.named_parameters()})
            for name, parameter in theirs.named_parameters():
                torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-4, atol=1e-6)
    dist.barrier()
    print("agreed", flush=True)


if __name__ == "__main__":
    torch.multiprocessing.start_processes(compare, (sys.argv[1],), nprocs=RANKS, start_method="fork")
