"""Our lm-eval model beside lm-eval's own on the exported folder."""

import json
import math

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


def test_a_likelihood_that_is_no_number_is_a_difference(tmp_path, monkeypatch):
    """Whichever request it is of: NaN is not above any tolerance."""
    folder = make_checkpoint(tmp_path / "hf", max_length=512)
    original = parity._Both.loglikelihood

    def broken(self, *args, **kwargs):
        answers = original(self, *args, **kwargs)
        self.rows[2]["hf"] = math.nan
        return answers

    monkeypatch.setattr(parity._Both, "loglikelihood", broken)
    command = ["--ckpt", str(folder), "--tasks", " s2_passkey, s2_passkey", "--output", str(tmp_path / "out")]
    with pytest.raises(ValueError, match=r"parity\.json: s2_passkey differ by more than"):
        parity.main([*command, "--limit", "4"])


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("--limit=0", "--limit 0: expected at least 1"),
        ("--batch-size=0", "--batch-size 0: expected at least 1"),
        ("--tolerance=nan", "--tolerance nan: expected a number from 0 on"),
        ("--tolerance=-1", "--tolerance -1.0: expected a number from 0 on"),
    ],
)
def test_numbers_that_say_nothing_are_refused(option, said):
    with pytest.raises(ValueError, match=f"^{said}$"):
        parity.main(["--ckpt", "nowhere", "--tasks", "piqa", option])
