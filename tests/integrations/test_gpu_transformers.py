"""A hybrid export in transformers on a GPU: our logits, tokens and gradients, with this package and without it."""

import json
import os
import subprocess
import sys

import pytest
import torch

from s2.inference import generate
from s2.model import ModelConfig, Transformer
from s2.model.hf import save_pretrained

pytestmark = pytest.mark.gpu

LAYOUT = "L8V16+sink1+dense2"
NEW = 200
CHILD = """
import json
import sys

folder, case = sys.argv[1], json.loads(sys.argv[2])
if case["plain"]:
    sys.modules["s2"] = None  # as where the package is not installed
import torch
from transformers import AutoModelForCausalLM

dtype = getattr(torch, case["dtype"])
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=dtype).cuda().eval()
given = torch.load(folder + "/given.pt", weights_only=True)
with torch.inference_mode():
    logits = [model(ids.cuda()).logits.cpu() for ids in given["texts"]]
    prompt = given["prompt"].cuda()
    tokens = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=case["new"], do_sample=False)
ids = given["texts"][0].cuda()
model(ids, labels=ids).loss.backward()
gradients = {name: parameter.grad.cpu() for name, parameter in model.named_parameters()}
is_plain = sys.modules[type(model).__module__].s2_attention is None
torch.save({"logits": logits, "tokens": tokens.cpu(), "gradients": gradients, "plain": is_plain}, folder + "/found.pt")
"""


def build(dtype):
    config = ModelConfig(
        vocab_size=512, hidden_size=512, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=2, head_dim=64, max_position_embeddings=32768, attention_layout=LAYOUT, block_size=64,
        initializer_range=0.05, bos_token_id=0, eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    return Transformer(config).to("cuda", dtype)


def in_transformers(folder, **case):
    """What a process of its own finds, which sees this package or does not."""
    paths = [path for path in sys.path if not (case["plain"] and os.path.isdir(os.path.join(path or ".", "s2")))]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "HF_MODULES_CACHE": str(folder / "modules")}
    command = [sys.executable, "-c", CHILD, str(folder), json.dumps(case)]
    result = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=False)
    assert not result.returncode, result.stderr[-3000:]
    return torch.load(folder / "found.pt", weights_only=True)


@pytest.mark.parametrize("plain", [False, True], ids=["package", "plain"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_export_gives_our_logits_at_8k_and_32k_our_tokens_and_our_gradients(tmp_path, dtype, plain):
    model = build(torch.float32)
    save_pretrained(model, model.config, tmp_path, dtype=torch.float32)
    texts = [
        torch.randint(512, (1, length), generator=torch.Generator().manual_seed(length)) for length in (8192, 32768)
    ]
    torch.save({"texts": texts, "prompt": texts[0][:, :1000]}, tmp_path / "given.pt")
    found = in_transformers(tmp_path, dtype=dtype, plain=plain, new=NEW)
    assert found["plain"] == plain

    exact, exact_gradients = logits_of(model, texts), gradients(model, texts[0])
    model = model.to(getattr(torch, dtype))
    for theirs, ours, truth in zip(found["logits"], logits_of(model, texts), exact, strict=True):
        assert_as_near(theirs, ours, truth)
    for name, ours in gradients(model, texts[0]).items():
        assert_as_near(found["gradients"][name], ours, exact_gradients[name])

    tokens = found["tokens"][0]
    assert len(tokens) == 1000 + NEW
    own = generate(model, [tokens[:1000].cuda()], NEW)[0].cpu()
    if dtype == "float32":
        assert torch.equal(tokens[1000:], own)
    with torch.inference_mode():  # in bfloat16 the first of two nearly equal ones may be either
        liked = model(tokens[None].cuda())[0, 999:-1].float().cpu()
    chosen = liked.gather(1, tokens[1000:, None])[:, 0]
    assert (liked.amax(dim=1) - chosen).max() < (1e-4 if dtype == "float32" else 2**-6) * liked.abs().max()


def assert_as_near(theirs, ours, truth):
    """To what float32 gives, as near as ours in the same dtype."""
    assert (theirs.float() - truth).norm() < 1.5 * (ours.float() - truth).norm() + 1e-4 * truth.norm()


@torch.inference_mode()
def logits_of(model, texts):
    return [model(ids.cuda()).cpu() for ids in texts]


def gradients(model, ids):
    """By the names of the export."""
    logits = model(ids.cuda())
    torch.nn.functional.cross_entropy(logits[0, :-1].float(), ids[0, 1:].cuda()).backward()
    found = {name: parameter.grad.cpu() for name, parameter in model.named_parameters()}
    model.zero_grad()
    return found
