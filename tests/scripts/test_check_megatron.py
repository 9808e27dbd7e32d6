"""`scripts/check_megatron.py` on the CPU: its report, its verdict, and a machine without megatron-core."""

import json
import runpy
import sys
from itertools import count
from pathlib import Path

import pytest
import torch
from torch import nn

from s2 import settings
from s2.attention import s2_attention
from s2.model import ModelConfig
from s2.recipe import load_recipe
from s2.training.optim import OptimizerConfig, ScheduleConfig

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "scripts"
sys.path.insert(0, str(SCRIPTS))
import check_megatron  # noqa: E402

SIZES = "--layers 3 --hidden 32 --ffn 48 --heads 4 --kv-heads 2 --vocab 61 --block-size 16 --steps 4 --seq-len 90"


@pytest.fixture
def script(monkeypatch, tmp_path):
    pytest.importorskip("megatron.core", reason="megatron-core is not installed (the extra `megatron`)")
    options = f"x {SIZES} --layout L1V2+dense1 --commit abc --output {tmp_path}".split()
    monkeypatch.setattr(sys, "argv", options)
    return check_megatron


def read(folder):
    return json.loads(next(folder.glob("*-megatron.json")).read_text())


def test_the_report_has_all_models_and_layers(script, tmp_path):
    counters = torch._dynamo.utils.counters
    counters.clear()
    assert script.main() == 0
    assert not counters["frames"]  # eager, Megatron's modules too
    page = next(tmp_path.glob("*-megatron.md")).read_text()
    names = ["our model", "our model, backend reference", "GPTModel, S2", "GPTModel, Megatron's attention"]
    for wanted in (*(f"| {name} | 4." for name in names), "losses 1e-04, gradients 1e-03; of the halves 1e-04"):
        assert wanted in page
    record = read(tmp_path)
    assert list(record["halves"]) == ["L1V2, rotation 0", "dense, rotation 0"]
    rows = record["models"]
    assert list(rows) == names and all(len(row["loss"]) == 4 for row in rows.values())
    assert ["apart" in row for row in rows.values()] == [False, True, True, False]
    assert max(rows["GPTModel, S2"]["apart"].values()) < 1e-5
    loss = rows["our model"]["loss"]
    assert f"loss changes by {loss[-1] - loss[0]:+.2f} in 4 steps" in page


def test_bf16_keeps_to_its_limits_beside_the_noise_of_other_kernels(script, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--dtype", "bfloat16", "--steps", "8", "--lr", "0.1"])
    assert script.main() == 0
    record = read(tmp_path)
    assert record["limits"]["losses"] == 1e-3
    rows = record["models"]
    assert rows["our model"]["loss"][-1] < rows["our model"]["loss"][0] - 0.1
    assert 0 < rows["our model, backend reference"]["apart"]["gradients"] < 0.05


@pytest.mark.parametrize("wrong", ["offset", "nan"])
def test_losses_that_differ_end_in_exit_code_1(script, monkeypatch, tmp_path, wrong):
    calls, right = count(), script.megatron_loss
    off = {"offset": lambda call: 0.01, "nan": lambda call: float("nan") if call == 3 else 0.0}[wrong]
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--dtype", "bfloat16"])
    monkeypatch.setattr(script, "megatron_loss", lambda *a, **k: right(*a, **k) + off(next(calls)))
    assert script.main() == 1
    assert read(tmp_path)["models"]["GPTModel, S2"]["apart"]["gradients"] < 0.05


def test_gradients_that_differ_end_in_exit_code_1(script, monkeypatch, tmp_path):
    def half_of_dq(q, *rest, **more):
        return s2_attention(q / 2 + q.detach() / 2, *rest, **more)

    monkeypatch.setattr("s2.integrations.megatron.core_attention.s2_attention", half_of_dq)
    assert script.main() == 1
    apart = read(tmp_path)["models"]["GPTModel, S2"]["apart"]
    assert apart["losses"] < 1e-4 and apart["gradients"] == pytest.approx(0.5, abs=0.01)  # the losses do not show it


def test_heads_that_two_ranks_cannot_share_are_refused(script, monkeypatch):
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--kv-heads", "1"])
    with pytest.raises(ValueError, match="--kv-heads 1 must be even"):
        script.main()


def test_without_megatron_it_says_what_to_install(monkeypatch):
    for name in ("megatron", "megatron.core"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(sys, "argv", ["x"])
    with pytest.raises(ValueError, match=r"megatron.*pip install -e '\.\[megatron\]'"):
        runpy.run_path(str(SCRIPTS / "check_megatron.py"))["main"]()


# ---------------------------------------------------------------- training


class Weights(nn.Module):
    """Whose gradients are the rows."""

    def __init__(self, dtype, *shape):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(shape, dtype=dtype))

    def loss(self, row):
        return (self.weight * row).sum()


def test_it_trains_as_the_recipe_does():
    recipe = load_recipe(ROOT / "recipes" / "1.3b" / "pretrain.yaml")
    model, trainer = recipe["model"], recipe["trainer"]
    assert settings.read(OptimizerConfig, model["optimizer"], "model.optimizer") == check_megatron.OPTIMIZER
    assert settings.read(ScheduleConfig, model["schedule"], "model.schedule") == check_megatron.SCHEDULE
    assert (trainer["max_steps"], trainer["gradient_clip_val"]) == (check_megatron.STEPS, check_megatron.CLIP)


def test_steps_are_adamws_with_clipped_gradients_in_the_warm_up():
    model, expected = Weights(torch.float32, 1, 2), torch.ones(1, 2, requires_grad=True)
    rows = [torch.tensor([[300.0, 400.0]]), torch.tensor([[0.3, -0.4]]), torch.tensor([[-6.0, 8.0]])]
    adamw = torch.optim.AdamW([expected], betas=(0.9, 0.95), weight_decay=0.1)
    for step, row in enumerate(rows):
        expected.grad = row / max(1.0, float(row.norm()))
        adamw.param_groups[0]["lr"] = 5.0 * (step + 1) / 501
        adamw.step()
    found = check_megatron.train(model, model.loss, rows, OptimizerConfig(lr=5.0))
    torch.testing.assert_close(model.weight.detach(), expected.detach())
    assert found["loss"][0] == 700


def test_updates_below_the_last_bit_of_bf16_add_up():
    model = Weights(torch.bfloat16, 3)
    check_megatron.train(model, model.loss, [torch.ones(3)] * 10, OptimizerConfig(lr=0.05))
    moved = 0.05 * sum(range(1, 11)) / 501  # each by less than half a bit
    assert torch.equal(model.weight, torch.full((3,), 1 - moved).bfloat16()) and (model.weight < 1).all()


def test_documents_are_new_every_step_and_some_tokens_common():
    config = ModelConfig(
        vocab_size=50, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        attention_layout="dense",
    )  # fmt: skip
    rows = check_megatron.batches(config, 400, 3, "cpu")
    assert len({tuple(row.input_ids[0].tolist()) for row in rows}) == 3
    shares = torch.cat([row.input_ids for row in rows]).flatten().bincount(minlength=50) / 1200
    expected = 1 / torch.arange(1, 51)
    torch.testing.assert_close(shares, expected / expected.sum(), rtol=0, atol=0.05)
    for row in rows:
        inside = torch.ones(400, dtype=torch.bool)
        inside[row.cu_seqlens[1:].long() - 1] = False
        assert (row.labels[0][~inside] == -100).all()
        assert torch.equal(row.labels[0, :-1][inside[:-1]], row.input_ids[0, 1:][inside[:-1]])
