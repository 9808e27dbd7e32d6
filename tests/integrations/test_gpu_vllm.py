"""vLLM's own engine with our model, on a GPU: the tokens it chooses are those that our model likes best, with pages
freed or kept, eagerly and in CUDA graphs, and prompts that begin alike."""

import json
import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("vllm.v1.core.kv_cache_manager", reason="needs vLLM 0.24")

from s2.model.config import ModelConfig
from s2.model.hf import save_pretrained
from s2.model.transformer import Transformer

pytestmark = [pytest.mark.gpu, pytest.mark.nightly]

CHILD = """
import json
import sys

from vllm import LLM, SamplingParams

folder, case = sys.argv[1], json.loads(sys.argv[2])
llm = LLM(
    folder, skip_tokenizer_init=True, dtype="bfloat16", gpu_memory_utilization=0.3, max_num_batched_tokens=512,
    max_num_seqs=8, seed=0, **case["engine"],
)
parameters = SamplingParams(temperature=0, max_tokens=case["new"], detokenize=False, ignore_eos=True)
rounds = []
for _ in range(2):  # the second finds the prompts of the first
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in case["prompts"]], parameters)
    rounds.append([list(output.outputs[0].token_ids) for output in outputs])
with open(folder + "/served.json", "w") as file:
    json.dump(rounds, file)
"""


@pytest.mark.parametrize("eager", [True, False])
@pytest.mark.parametrize("frees", [True, False])
@pytest.mark.parametrize("layout", ["L2V4+sink1+dense1", "L1V8-inter"])
def test_the_engine_chooses_what_our_model_likes_best(tmp_path, layout, frees, eager):
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=4, head_dim=64, max_position_embeddings=4096, attention_layout=layout, block_size=64,
        initializer_range=0.1,
    )  # fmt: skip
    model = Transformer(config).eval()
    save_pretrained(model, config, tmp_path)
    draw = torch.Generator().manual_seed(1)
    start = torch.randint(512, (1500,), generator=draw).tolist()
    prompts = [start, start[:1000] + start[:700], start[:64], [7], start + start]
    engine = {"enforce_eager": eager, "disable_hybrid_kv_cache_manager": not frees}
    case = {"prompts": prompts, "new": 80, "engine": engine}
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", CHILD, str(tmp_path), json.dumps(case)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-6000:]
    model = model.to("cuda", torch.bfloat16)
    for served in json.loads((tmp_path / "served.json").read_text()):
        for prompt, new in zip(prompts, served, strict=True):
            tokens = torch.tensor([prompt + new], device="cuda")
            with torch.inference_mode():
                logits = model(tokens)[0, len(prompt) - 1 : -1]
            chosen = logits.gather(1, tokens[0, len(prompt) :, None])[:, 0]
            # bfloat16: two tokens may be as good as the same
            assert ((logits.amax(dim=1) - chosen) <= 0.02 * logits.std(dim=1) + 0.05).float().mean() > 0.97
            assert (logits.amax(dim=1) - chosen).max() < logits.std(dim=1).min()
