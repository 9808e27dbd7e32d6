"""`make verify` passes a right backend and names what is wrong with others, at lengths a CPU takes seconds for."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from s2.attention import Pattern, s2_attention
from s2.model import ModelConfig
from s2.recipe import load_recipe

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

import verify  # noqa: E402
from attention_calls import Call, calls_of, calls_of_all, recipes_of  # noqa: E402

RECIPE = """
run: {recipe: own, stage: pretrain}
model:
  config: {vocab_size: 64, hidden_size: 64, intermediate_size: 64, num_hidden_layers: 3, num_attention_heads: 4,
           num_key_value_heads: 2, head_dim: 16, attention_layout: L1V3+dense1, block_size: 16}
data: {class_path: data.datamodule.PackedDataModule, init_args: {seq_len: 96, micro_batch_size: 2}}
trainer: {precision: 32-true}
"""


def a_call(kind: str, spec: str = "L1V3", batch: int = 2, dtype: torch.dtype = torch.float32) -> Call:
    return Call("own/pretrain", Pattern.parse(spec, 16), 0, dtype, 4, 2, 16, batch, 96, kind)


def sentences(call: Call, attend: Callable[..., Tensor] = s2_attention, backend: str | None = "reference") -> list[str]:
    return verify.check(call, verify.Settings("cpu", 5, backend, attend)).wrong


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("kind", ["whole", "few documents", "many documents"])
def test_right_backends_are_right(kind: str, backend: str | None) -> None:
    for spec in ("L1V3", "dense"):
        assert sentences(a_call(kind, spec), backend=backend) == []


def test_the_triton_kernels_are_right() -> None:
    call = replace(a_call("few documents", batch=1), length=40, heads=2, kv_heads=1)
    assert sentences(call, backend="triton") == []


def test_low_precision_is_right_within_its_bound() -> None:
    assert sentences(a_call("many documents", dtype=torch.bfloat16)) == []


class _Negated(torch.autograd.Function):
    """Leaves a value as it is and turns the sign of its gradient."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return -gradient


def negates_dk(q, k, v, pattern, **options):
    return s2_attention(q, _Negated.apply(k), v, pattern, **options)


def drops_borders(q, k, v, pattern, cu_seqlens=None, **options):
    borders = None if cu_seqlens is None else torch.cat([cu_seqlens[:2], cu_seqlens[5:]])
    return s2_attention(q, k, v, pattern, cu_seqlens=borders, **options)


def turns_the_residues(q, k, v, pattern, rotation=0, **options):
    return s2_attention(q, k, v, pattern, rotation=rotation + 1, **options)


def sees_the_window_only(q, k, v, pattern, **options):
    window = Pattern.from_ranges(pattern.local, pattern.ranges[:-1], block_size=16)
    return s2_attention(q, k, v, window, **options)


def looks_ahead(q, k, v, pattern, **options):
    return s2_attention(q, torch.roll(k, -1, dims=-3), torch.roll(v, -1, dims=-3), pattern, **options)


def writes_behind_the_border(q, k, v, pattern, cu_seqlens=None, **options):
    out = s2_attention(q, k, v, pattern, cu_seqlens=cu_seqlens, **options)
    out = out.clone()
    out.data[int(cu_seqlens[-1]) :] = 1.0
    return out


def never_repeats(q, k, v, pattern, **options):
    return s2_attention(q, k, v, pattern, **options) * (1 + 1e-7 * torch.rand(1))


def spoils_an_input(q, k, v, pattern, **options):
    out = s2_attention(q, k, v, pattern, **options)
    v.data.view(-1)[0] += 1
    return out


WRONG = [
    (negates_dk, "whole", "dk is off by"),
    (drops_borders, "few documents", "out is off by"),
    (drops_borders, "many documents", "dv is off by"),
    (turns_the_residues, "whole", "dq is off by"),
    (sees_the_window_only, "whole", "out is off by"),
    (looks_ahead, "whole", "token 0 of 96 of row"),
    (writes_behind_the_border, "few documents", "out is not 0 behind the last border"),
    (never_repeats, "whole", "out is not the same bits in a second run"),
    (spoils_an_input, "whole", "an input was written to"),
]


@pytest.mark.parametrize(("attend", "kind", "said"), WRONG, ids=[f"{f.__name__}-{kind}" for f, kind, _ in WRONG])
def test_a_wrong_backend_is_named(attend: Callable[..., Tensor], kind: str, said: str) -> None:
    found = sentences(a_call(kind), attend)
    assert any(said in sentence for sentence in found), found


def test_nan_from_next_door_is_seen() -> None:
    def leaks(q, k, v, pattern, **options):
        return s2_attention(q, k, v, pattern, **options) + 0 * q.detach().sum(0, keepdim=True)

    found = sentences(a_call("whole"), leaks)
    assert found == ["out of tokens 0 to 95 changes when its neighbours are NaN"]


def test_a_crash_is_a_row_of_its_own() -> None:
    def crashes(*tensors, **options):
        raise RuntimeError("an illegal memory access")

    assert sentences(a_call("whole"), crashes) == ["RuntimeError: an illegal memory access"]


def test_the_command_ends_in_a_table_and_a_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch
) -> None:
    (tmp_path / "own.yaml").write_text(RECIPE)
    arguments = [str(tmp_path / "own.yaml"), "--device", "cpu", "--max-length", "64", "--seed", "3"]
    assert verify.main(arguments) == 0
    shown = capsys.readouterr().out
    assert shown.count(" right") == 9 and "sdpa has answered in" in shown  # two rotations and dense
    assert ": the hopper backend does not take such calls: it runs on devices of" in shown
    monkeypatch.setattr(verify, "check", lambda call, settings: verify.Result(call, wrong=["dq is off by 1"]))
    assert verify.main(arguments) == 1
    assert "WRONG: " in capsys.readouterr().out
    monkeypatch.setattr(verify, "check", lambda call, settings: verify.Result(call, out_of_memory=True))
    assert verify.main(arguments) == 5


def test_on_a_cpu_the_way_to_shorter_sequences_is_named_for_make_too() -> None:
    with pytest.raises(ValueError, match=r'say --max-length 512 \(from make: ARGS="--max-length 512"\)$'):
        verify.main(["--device", "cpu"])


def test_calls_follow_the_recipes_and_what_they_extend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    calls = [call for path in recipes_of(["7b"]) for call in calls_of(path)]
    assert {(call.length, str(call.pattern), call.heads, call.head_dim) for call in calls} == {
        (length, spec, 32, 128) for length in (8192, 32768, 131072) for spec in ("L8V32+sink1", "dense")
    }
    demo = [call for path in recipes_of(["demo"]) for call in calls_of(path)]
    assert {(str(call.pattern), call.rotation, call.length) for call in demo if not call.pattern.is_dense} == {
        ("L4V4", rotation, length) for rotation in (0, 1) for length in (512, 2048)
    }


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("seq_len: 96", "length: 96", "data.seq_len=None"),
        ("32-true", "64-true", "trainer.precision='64'"),
        ("model:", "model:\n  init_from: runs/other/pretrain/hf", "model.init_from=runs/other/pretrain/hf"),
    ],
)
def test_a_recipe_that_says_too_little_is_refused(tmp_path: Path, old: str, new: str, said: str) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(RECIPE.replace(old, new))
    with pytest.raises(ValueError, match=said):
        calls_of(path)


def test_recipes_that_start_from_a_checkpoint_of_others_wait_until_it_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, recipe in (("own", RECIPE), ("other", RECIPE.replace("model:", "model:\n  init_from: models/other"))):
        Path("recipes", name).mkdir(parents=True)
        Path("recipes", name, "pretrain.yaml").write_text(recipe)
    assert {call.recipe for call in calls_of_all([])} == {"own/pretrain"}
    assert "left out: recipes/other/pretrain.yaml: model.init_from=models/other" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"model.init_from=models/other"):
        calls_of_all(["other"])
    Path("models/other").mkdir(parents=True)
    config = ModelConfig.from_dict(load_recipe(Path("recipes/own/pretrain.yaml"))["model"]["config"])
    Path("models/other/config.json").write_text(json.dumps(config.replace(attention_layout="dense").to_hf_dict()))
    assert {call.recipe for call in calls_of_all(["other"])} == {"other/pretrain"}


def test_an_unknown_recipe_is_refused() -> None:
    with pytest.raises(ValueError, match="recipe '8b' is neither a YAML file nor one of"):
        recipes_of(["8b"])
