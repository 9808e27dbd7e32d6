"""vLLM's own engine with our model, on a GPU: the tokens it chooses are those that our model likes best, with pages
freed or kept, eagerly and in CUDA graphs, and prompts that begin alike. No kernel of ours is compiled while it serves.

Each case is a process of its own, and they may run side by side (`-n 8`): their pages take what they are told. vLLM
stops where other processes give memory back while it measures how much there is, so that case wants the GPU to itself.
"""

import json
import os
import re
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
    folder, skip_tokenizer_init=True, dtype="bfloat16", max_num_batched_tokens=512, max_num_seqs=8, seed=0,
    **case["engine"],
)
parameters = SamplingParams(temperature=0, max_tokens=case["new"], detokenize=False, ignore_eos=True)
rounds = []
for _ in range(2):  # the second finds the prompts of the first
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in case["prompts"]], parameters)
    rounds.append([list(output.outputs[0].token_ids) for output in outputs])
with open(folder + "/served.json", "w") as file:
    json.dump(rounds, file)
"""


LONGEST = 4090  # not whole blocks
NEW = 80


def serve(folder, layout, **engine):
    """The model, prompts, and tokens that vLLM chooses in each round."""
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=4, head_dim=64, max_position_embeddings=LONGEST, attention_layout=layout, block_size=64,
        initializer_range=0.1,
    )  # fmt: skip
    model = Transformer(config).eval()
    save_pretrained(model, config, folder)
    draw = torch.Generator().manual_seed(1)
    start = torch.randint(512, (1500,), generator=draw).tolist()
    longest = (start * 3)[: LONGEST - NEW]
    prompts = [start, start[:1000] + start[:700], start[:64], [7], start[:65], longest]
    case = {"prompts": prompts, "new": NEW, "engine": engine}
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "VLLM_LOGGING_LEVEL": "INFO"}
    command = [sys.executable, "-c", CHILD, str(folder), json.dumps(case)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    said = result.stdout + result.stderr
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-6000:]
    assert "JIT monitor activated" in said, "else vLLM does not say what is compiled"
    assert not re.search(r"compilation during inference: \S*(attention_paged|write_pages)", said), said[-6000:]
    return model.to("cuda", torch.bfloat16), prompts, json.loads((folder / "served.json").read_text())


def assert_liked_best(model, prompts, rounds):
    for served in rounds:
        for prompt, new in zip(prompts, served, strict=True):
            tokens = torch.tensor([prompt + new], device="cuda")
            with torch.inference_mode():
                logits = model(tokens)[0, len(prompt) - 1 : -1]
            chosen = logits.gather(1, tokens[0, len(prompt) :, None])[:, 0]
            # bfloat16: two tokens may be as good as the same
            assert ((logits.amax(dim=1) - chosen) <= 0.02 * logits.std(dim=1) + 0.05).float().mean() > 0.97
            assert (logits.amax(dim=1) - chosen).max() < logits.std(dim=1).min()


@pytest.mark.parametrize("eager", [True, False])
@pytest.mark.parametrize("frees", [True, False])
@pytest.mark.parametrize("layout", ["L2V4+sink1+dense1", "L1V8-inter"])
def test_the_engine_chooses_what_our_model_likes_best(tmp_path, layout, frees, eager):
    engine = {"enforce_eager": eager, "disable_hybrid_kv_cache_manager": not frees}
    assert_liked_best(*serve(tmp_path, layout, **engine, kv_cache_memory_bytes=1 << 30, gpu_memory_utilization=0.05))


@pytest.mark.skipif("PYTEST_XDIST_WORKER" in os.environ, reason="vLLM measures memory: run with -n 0")
def test_vllm_measures_itself_how_much_memory_there_is_for_pages(tmp_path):
    assert_liked_best(*serve(tmp_path, "L2V4+sink1+dense1", gpu_memory_utilization=0.3))
