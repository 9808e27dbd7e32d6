"""The sweep draws what it says and reports what fails (`tests/attention/sweep.py`)."""

import itertools

import pytest
import torch

from s2.attention.kernels.hopper import support
from s2.attention.kernels.hopper.problem import TILE
from tests.attention import sweep


def test_a_seed_draws_the_same_case_and_cases_differ():
    drawn = [sweep.draw_case(seed, "hopper", "mixed", 64, 128, seed % 2 == 0, 2000) for seed in range(40)]
    assert drawn == [sweep.draw_case(seed, "hopper", "mixed", 64, 128, seed % 2 == 0, 2000) for seed in range(40)]
    assert len({(c.q_len, c.heads, c.cu_seqlens) for c in drawn}) > 30
    packed = [c.cu_seqlens for c in drawn if c.cu_seqlens]
    assert all(borders[0] == 0 and list(borders) == sorted(borders) for borders in packed)
    assert any(a == b for borders in packed for a, b in itertools.pairwise(borders)), "no empty document"
    assert any(c.q_len % TILE for c in drawn) and all(1 <= c.q_len <= 2000 for c in drawn)
    longer = [c for c in drawn if c.cu_seqlens_k]
    assert 3 < len(longer) < len(packed), "packed queries at the end of longer keys"
    for c in longer:
        assert c.kv_len == c.cu_seqlens_k[-1] and len(c.cu_seqlens_k) == len(c.cu_seqlens)
        pairs = zip(itertools.pairwise(c.cu_seqlens), itertools.pairwise(c.cu_seqlens_k), strict=True)
        assert all(end - begin <= last - first for (begin, end), (first, last) in pairs)


def test_cases_of_the_hopper_kernels_are_such_as_they_take(monkeypatch):
    monkeypatch.setattr(support, "on_hopper", lambda x: True)
    for seed in range(240):
        kind, block = sweep.KINDS[seed % len(sweep.KINDS)], sweep.BLOCKS[seed // 7 % len(sweep.BLOCKS)]
        dim = (64, 128)[seed // 120]
        case = sweep.draw_case(seed, "hopper", kind, block, dim, seed % 2 == 0, 300)
        batch = () if case.cu_seqlens else (case.batch,)
        sizes = ((case.q_len, case.heads), (case.kv_len, case.kv_heads))
        q, k = (torch.empty(*batch, *size, dim, dtype=torch.float16) for size in sizes)
        late = case.cu_seqlens_k is not None
        assert support.supports(q, k, k, case.pattern, packed=bool(case.cu_seqlens), late=late)


@pytest.mark.skipif(torch.cuda.is_available(), reason="small cases in Triton's interpreter")
def test_it_checks_a_backend_and_counts_failures(monkeypatch, capsys):
    run = ["--backend", "triton", "--device", "cpu", "--seed", "5", "--cases", "1", "--max-tokens", "40"]
    monkeypatch.setattr(sweep, "DTYPES", {"triton": (torch.float32,), "hopper": ()})
    monkeypatch.setattr(sweep, "BLOCKS", (16, 32))
    assert sweep.main(run) == 0
    assert "1 cases from seed 5, 0 failed" in capsys.readouterr().out

    def refuse(*args, **kwargs):
        raise AssertionError("too far off")

    monkeypatch.setattr(sweep, "assert_correct", refuse)
    assert sweep.main(run) == 1
    out = capsys.readouterr().out
    assert "FAILED --seed 5:" in out and "too far off" in out and "1 cases from seed 5, 1 failed" in out
