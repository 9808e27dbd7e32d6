"""A step's gradient is that of the mean over its valid tokens, however they lie in micro-batches and on ranks."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import s2.training.stage as stage_module
from s2.training.cli import main
from s2.training.config import ModelSection
from s2.training.module import PretrainModule
from tests.training.processes import start
from tests.training.tiny import curve, tiny_recipe, write_recipe

STEP = ("run.tokens_per_step=256",)  # four rows: the second and fourth have no valid token


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("normalization")
    recipe = tiny_recipe(folder, "whole")
    recipe["data"]["class_path"] = "tests.training.masked_data.MaskedDataModule"
    return write_recipe(folder, recipe)


@pytest.fixture(scope="module")
def whole(recipe: Path) -> Path:
    """Each step one micro-batch, without DeepSpeed."""
    assert main([str(recipe), *STEP, "data.micro_batch_size=4", "trainer.strategy=auto"]) == 0
    return recipe.parent / "runs" / "tiny" / "whole"


@pytest.fixture(scope="module")
def norms(recipe: Path, whole: Path) -> dict[int, float]:
    """Gradient norms of the same run under DeepSpeed, which alone tells them."""
    assert main([str(recipe), *STEP, "data.micro_batch_size=4", "run.stage=norms"]) == 0
    values = curve(whole.with_name("norms"), "grad_norm")
    assert max(values.values()) > 1.0  # or nothing would be clipped
    return values


def assert_same_steps(run: Path, whole: Path, *, rel: float = 1e-4) -> None:
    assert curve(run) == pytest.approx(curve(whole), rel=rel)
    assert curve(run, "val/heldout/loss") == pytest.approx(curve(whole, "val/heldout/loss"), rel=rel)


OFFLOADS = [pytest.param(name, marks=pytest.mark.nightly) for name in ("zero_2_offload", "zero_3_offload")]


@pytest.mark.parametrize("strategy", ["auto", "zero_1", "zero_2", "zero_3", *OFFLOADS])
def test_masked_micro_batches_do_not_weaken_a_step(
    recipe: Path, whole: Path, norms: dict[int, float], strategy: str
) -> None:
    stage = f"split-{strategy}"
    split = (*STEP, "data.micro_batch_size=1", f"trainer.strategy={strategy}", f"run.stage={stage}")
    assert main([str(recipe), *split]) == 0
    assert_same_steps(whole.with_name(stage), whole)
    if strategy != "auto":
        assert curve(whole.with_name(stage), "grad_norm") == pytest.approx(norms, rel=1e-4)


@pytest.mark.parametrize(
    "strategy", ["zero_1", *(pytest.param(f"zero_{n}", marks=pytest.mark.nightly) for n in (2, 3))]
)
def test_in_bf16_too(
    recipe: Path, whole: Path, norms: dict[int, float], monkeypatch: pytest.MonkeyPatch, strategy: str
) -> None:
    """ZeRO-1 in bf16 is another optimizer of DeepSpeed's; a run on the CPU is in fp32 unless told otherwise here."""
    monkeypatch.setattr(stage_module, "CPU_PRECISION", "bf16-mixed")
    stage = f"bf16-{strategy}"
    split = (*STEP, "data.micro_batch_size=1", f"trainer.strategy={strategy}", f"run.stage={stage}")
    assert main([str(recipe), *split]) == 0
    assert_same_steps(whole.with_name(stage), whole, rel=5e-3)
    assert curve(whole.with_name(stage), "grad_norm") == pytest.approx(norms, rel=3e-2)


@pytest.mark.nightly
@pytest.mark.parametrize("strategy", ["zero_1", "zero_2", "zero_3"])
def test_on_two_ranks_of_which_one_has_no_valid_token(
    recipe: Path, whole: Path, norms: dict[int, float], strategy: str
) -> None:
    stage = f"ranks-{strategy}"
    ranks = (*STEP, "data.micro_batch_size=1", "trainer.devices=2", f"trainer.strategy={strategy}")
    process = start(recipe, *ranks, f"run.stage={stage}")
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert_same_steps(whole.with_name(stage), whole)
    assert curve(whole.with_name(stage), "grad_norm") == pytest.approx(norms, rel=1e-4)


def test_every_step_is_divided_by_its_own_share(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two valid tokens in eight places; a step knows nothing of those before it."""
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    module = PretrainModule(ModelSection(config={**dict.fromkeys(sizes, 8), "num_attention_heads": 1}))
    module.weight = torch.nn.Parameter(torch.ones(1))
    loop = SimpleNamespace(_should_accumulate=lambda: False)
    trainer = SimpleNamespace(world_size=1, accumulate_grad_batches=1, fit_loop=loop, strategy=None)
    monkeypatch.setattr(PretrainModule, "trainer", trainer)
    monkeypatch.setattr(PretrainModule, "_loss", lambda self, batch: (2 * self.weight.sum(), torch.tensor(2)))
    batch = {"labels": torch.zeros(1, 8, dtype=torch.int64), "position": torch.tensor(0)}
    for step in range(3):
        module.zero_grad()
        module.training_step(batch, step).backward()
        module.on_before_optimizer_step(None)
        assert module.weight.grad is not None and module.weight.grad.item() == pytest.approx(1.0)
