"""Our lm-eval model beside lm-eval's own on the exported folder."""

import json

import pytest

from eval import parity
from tests.eval.small_checkpoint import make_checkpoint


@pytest.mark.parametrize(
    ("layout", "adds_bos"),
    [("dense", False), pytest.param("dense", True, marks=pytest.mark.nightly), ("L1V3+sink1+dense1", True)],
)
def test_likelihoods_are_those_of_lm_evals_own_model_on_the_export(tmp_path, layout, adds_bos):
    folder = make_checkpoint(tmp_path / "hf", layout=layout, max_length=512, adds_bos=adds_bos)
    command = ["--ckpt", str(folder), "--tasks", "s2_passkey", "--output", str(tmp_path / "out"), "--limit", "24"]
    parity.main([*command, "--tolerance", "1e-4"])
    found = json.loads((tmp_path / "out/parity.json").read_text())
    assert found["tasks"]["s2_passkey"]["requests"] == 24
    assert max(abs(row["ours"] - row["hf"]) for row in found["requests"]) < 1e-4
    assert len({row["ours"] for row in found["requests"]}) == 24
    with pytest.raises(ValueError, match=r"parity\.json: s2_passkey differ by more than 0"):
        parity.main([*command, "--tolerance", "0"])
