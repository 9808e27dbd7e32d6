"""Chunked cross entropy against torch's, forward and backward."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from s2.model.loss import chunk_rows, chunked_cross_entropy


def problem(dtype, rows=37, width=24, vocab=50, ignored=0.3):
    torch.manual_seed(0)
    hidden = torch.randn(rows, width, dtype=torch.float64).to(dtype).requires_grad_()
    weight = (torch.randn(vocab, width, dtype=torch.float64) * 0.3).to(dtype).requires_grad_()
    labels = torch.randint(vocab, (rows,)).masked_fill(torch.rand(rows) < ignored, -100)
    return hidden, weight, labels


def reference(hidden, weight, labels, scale):
    """Loss and gradients of torch's cross entropy in float64."""
    hidden, weight = (x.detach().double().requires_grad_() for x in (hidden, weight))
    loss = F.cross_entropy(hidden @ weight.t(), labels, reduction="sum", ignore_index=-100)
    return loss.detach(), *torch.autograd.grad(loss * scale, (hidden, weight))


@pytest.mark.parametrize(
    ("chunk_size", "backend"),
    [(1, None), (8, None), (37, None), (1000, None), (None, None), (8, "aot_eager")],
)
def test_equals_torch_in_fp32(chunk_size, backend):
    hidden, weight, labels = problem(torch.float32)
    loss, count = chunked_cross_entropy(hidden, weight, labels, chunk_size=chunk_size, compile_backend=backend)
    (loss / count).backward()
    expected, dhidden, dweight = reference(hidden, weight, labels, 1 / count)
    assert loss.dtype == torch.float32 and count.dtype == torch.int64
    assert int(count) == int((labels != -100).sum()) < len(labels)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(hidden.grad.double(), dhidden, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(weight.grad.double(), dweight, rtol=1e-4, atol=1e-7)


def test_bf16_is_as_good_as_torch_in_bf16():
    hidden, weight, labels = problem(torch.bfloat16, rows=300, width=64, vocab=200)
    loss, count = chunked_cross_entropy(hidden, weight, labels, chunk_size=16)
    ours = torch.autograd.grad(loss / count, (hidden, weight))
    expected, *gradients = reference(hidden, weight, labels, 1 / count)
    torch_loss = F.cross_entropy((hidden @ weight.t()).float(), labels, reduction="sum")
    theirs = torch.autograd.grad(torch_loss / count, (hidden, weight))
    assert abs(loss.item() - expected.item()) <= 2 * abs(torch_loss.item() - expected.item()) + 1e-3
    for mine, other, exact in zip(ours, theirs, gradients, strict=True):
        assert mine.dtype == torch.bfloat16
        error, bound = (x.double().sub(exact).abs().max() for x in (mine, other))
        assert error <= 2 * bound + 1e-6
        assert mine.double().sub(exact).norm() / exact.norm() < 1e-2


def test_scale_of_the_gradient_is_not_rounded_to_bf16():
    hidden, weight, labels = problem(torch.bfloat16, rows=64)
    scale = torch.tensor(1 / 193)  # 0.3 % off in bf16
    loss, _ = chunked_cross_entropy(hidden, weight, labels)
    plain = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    scaled = torch.autograd.grad(loss * scale, (hidden, weight))
    for one, other in zip(plain, scaled, strict=True):
        ratio = (other.double() * one.double()).sum() / (one.double() ** 2).sum()
        assert abs(ratio / scale - 1) < 1e-3


def test_all_ignored_is_zero_and_not_nan():
    hidden, weight, labels = problem(torch.float32)
    loss, count = chunked_cross_entropy(hidden, weight, torch.full_like(labels, -100), chunk_size=8)
    loss.backward()
    assert loss.item() == 0 and count.item() == 0
    assert hidden.grad.count_nonzero() == 0 and weight.grad.count_nonzero() == 0


@pytest.mark.parametrize("trained", ["hidden", "weight"])
def test_only_the_wanted_gradient_is_computed(trained):
    hidden, weight, labels = problem(torch.float32)
    frozen = weight if trained == "hidden" else hidden
    frozen.requires_grad_(False)
    loss, _ = chunked_cross_entropy(hidden, weight, labels, chunk_size=8)
    loss.backward()
    _, dhidden, dweight = reference(hidden, weight, labels, 1.0)
    assert frozen.grad is None
    grad, expected = (hidden.grad, dhidden) if trained == "hidden" else (weight.grad, dweight)
    torch.testing.assert_close(grad.double(), expected, rtol=1e-4, atol=1e-5)


def test_no_grad_gives_the_same_loss():
    hidden, weight, labels = problem(torch.float32)
    with torch.no_grad():
        loss, _ = chunked_cross_entropy(hidden, weight, labels, chunk_size=8)
    assert not loss.requires_grad
    assert loss.item() == pytest.approx(reference(hidden, weight, labels, 1.0)[0].item(), rel=1e-6)


def test_logits_are_never_all_held():
    rows, vocab = 512, 64
    hidden, weight, labels = problem(torch.float32, rows=rows, vocab=vocab)
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.shape[-1:] == (vocab,):
                largest = max(largest, out.numel())
            return out

    with Watch():
        loss, _ = chunked_cross_entropy(hidden, weight, labels, chunk_size=32)
        loss.backward()
    assert 0 < largest <= 32 * vocab


def test_chunk_rows_bounds_the_logits():
    for vocab in (4096, 50_432, 128_256):
        assert chunk_rows(vocab) % 128 == 0 and chunk_rows(vocab) * vocab <= 1 << 27
    assert chunk_rows(1 << 25) == 128


def test_wrong_shapes_are_named():
    hidden, weight, labels = problem(torch.float32)
    with pytest.raises(ValueError, match=r"hidden \[37, 24\] and weight \[24, 50\]"):
        chunked_cross_entropy(hidden, weight.t(), labels)
    with pytest.raises(ValueError, match=r"labels \[36\] must be \[37\]"):
        chunked_cross_entropy(hidden, weight, labels[1:])
    with pytest.raises(ValueError, match="chunk_size=0"):
        chunked_cross_entropy(hidden, weight, labels, chunk_size=0)


def test_autocast_gives_the_loss_and_gradients_of_its_dtype():
    hidden, weight = torch.randn(10, 16, requires_grad=True), torch.randn(32, 16, requires_grad=True)
    labels = torch.randint(0, 32, (10,))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, count = chunked_cross_entropy(hidden, weight, labels, chunk_size=4)
    loss.backward()
    assert int(count) == 10 and hidden.grad.dtype == weight.grad.dtype == torch.float32
    exact = torch.nn.functional.cross_entropy(hidden @ weight.T, labels, reduction="sum")
    torch.testing.assert_close(loss, exact, rtol=2e-2, atol=0)


def test_a_negative_label_other_than_the_ignored_one_is_no_class():
    hidden, weight, labels = torch.randn(4, 8), torch.randn(9, 8), torch.tensor([1, -1, -100, 2])
    with pytest.raises((RuntimeError, IndexError)):
        chunked_cross_entropy(hidden, weight, labels, chunk_size=8)
