"""lm-eval's own model on an exported folder with sparse layers, beside ours."""

import pytest
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from eval.adapter import S2LM
from tests.eval.small_checkpoint import make_checkpoint, mark_words, prose


def requests(kind, arguments):
    return [
        Instance(request_type=kind, doc={}, arguments=each, idx=index, metadata=("", index, 1))
        for index, each in enumerate(arguments)
    ]


@pytest.mark.parametrize("change", [lambda folder: folder, mark_words], ids=["bytes", "marked words"])
def test_likelihoods_and_generated_texts_are_ours(change, tmp_path):
    folder = change(make_checkpoint(tmp_path / "hf", layout="L1V3+sink1+dense1", max_length=256))
    ours = S2LM(folder, device="cpu", dtype="float32")
    theirs = HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=4, max_length=256)
    assert type(theirs.model).__name__ == "S2LlamaForCausalLM"
    scored = requests("loglikelihood", [(prose(i + 1, seed=i), f" {prose(1, seed=90 + i)}") for i in range(4)])
    for (own, greedy), (other, also) in zip(ours.loglikelihood(scored), theirs.loglikelihood(scored), strict=True):
        assert abs(own - other) < 1e-3 and greedy == also
    options = {"until": ["\n"], "max_gen_toks": 12, "do_sample": False}
    asked = requests("generate_until", [(prose(i + 1, seed=i), options) for i in range(6)])  # padded on the left
    texts = ours.generate_until(asked)
    assert texts == theirs.generate_until(asked) and all(texts)
