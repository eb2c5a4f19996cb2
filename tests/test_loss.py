"""The loss."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from a2d_core import loss
from a2d_core.loss import Head

VOCAB = 50


def tensors() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(37, 8, generator=generator, requires_grad=True)
    weight = torch.randn(VOCAB, 8, generator=generator, requires_grad=True)
    bias = torch.randn(VOCAB, generator=generator, requires_grad=True)
    return hidden, weight, bias, torch.randint(0, VOCAB - 1, (37,), generator=generator), torch.rand(37, generator=generator)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("head", [Head(), Head(scale=0.5, excluded_token=49), Head(scale=2.0, softcap=3.0, excluded_token=49)])
@pytest.mark.parametrize("rows_at_once", [5, 1000])
def test_the_sum_and_its_gradients_are_those_of_the_plain_formula(
    rows_at_once: int, head: Head, with_bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden, weight, bias, target, coefficient = tensors()
    inputs = (hidden, weight, bias) if with_bias else (hidden, weight)
    logits = hidden @ weight.T + (bias if with_bias else 0)
    logits = logits * head.scale
    logits = logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)
    if head.excluded_token is not None:
        logits = logits.index_fill(1, torch.tensor(head.excluded_token), -torch.inf)
    expected = torch.nn.functional.cross_entropy(logits, target, reduction="none")
    gradients = torch.autograd.grad((expected * coefficient).sum() / 7, inputs)
    monkeypatch.setattr(loss, "CHUNK_ELEMENTS", rows_at_once * VOCAB)
    monkeypatch.setattr(loss, "CHUNK_ROWS", 1)
    total, each = loss.weighted_cross_entropy(hidden, weight, bias if with_bias else None, target, coefficient, head)
    assert torch.allclose(each, expected, atol=1e-5) and not each.requires_grad
    assert torch.allclose(total, (expected * coefficient).sum(), rtol=1e-5)
    for found, wanted in zip(torch.autograd.grad(total / 7, inputs), gradients, strict=True):
        assert torch.allclose(found, wanted, atol=1e-5)


def test_the_excluded_token_is_no_choice() -> None:
    _, weight, _, target, coefficient = tensors()
    for head, count in ((Head(excluded_token=49), 49), (Head(), 50)):
        _, each = loss.weighted_cross_entropy(torch.zeros(37, 8), weight, None, target, coefficient, head)
        assert torch.allclose(each, torch.full((37,), math.log(count)))


def test_nothing_masked_is_a_loss_of_zero_with_a_gradient() -> None:
    hidden, weight, _, _, _ = tensors()
    total, each = loss.weighted_cross_entropy(hidden[:0], weight, None, torch.empty(0, dtype=torch.long), torch.empty(0), Head())
    total.backward()
    assert total == 0 and len(each) == 0 and (weight.grad == 0).all()


@pytest.mark.parametrize("rows_at_once", [5, 1000])  # 7 groups of 4 chunks, the last one short; and one of all
def test_bfloat16_keeps_the_weights_gradient_in_float32(rows_at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = hidden, weight, bias = tensors()[:3]
    target, coefficient = tensors()[3:]
    exact = torch.autograd.grad(loss.weighted_cross_entropy(*inputs, target, coefficient, Head())[0], inputs)
    monkeypatch.setattr(loss, "CHUNK_ELEMENTS", rows_at_once * VOCAB)
    monkeypatch.setattr(loss, "CHUNK_ROWS", 1)
    with torch.autocast("cpu", torch.bfloat16):
        total, _ = loss.weighted_cross_entropy(hidden, weight, bias, target, coefficient, Head())
    found = torch.autograd.grad(total, inputs)
    for gradient, wanted in zip(found, exact, strict=True):
        assert gradient.dtype == torch.float32 and (gradient - wanted).norm() < 0.01 * wanted.norm()


def test_a_frozen_head_has_no_gradient_spares_its_product_and_leaves_that_of_the_hidden_states_as_it_is() -> None:
    hidden, weight, bias, target, coefficient = tensors()
    with FlopCounterMode(display=False) as trained:
        loss.weighted_cross_entropy(hidden, weight, bias, target, coefficient, Head())[0].backward()
    frozen, still, fixed = hidden.detach().requires_grad_(), weight.detach(), bias.detach()
    with FlopCounterMode(display=False) as spared:
        loss.weighted_cross_entropy(frozen, still, fixed, target, coefficient, Head())[0].backward()
    assert torch.equal(frozen.grad, hidden.grad) and still.grad is None and fixed.grad is None
    assert spared.get_total_flops() * 3 == trained.get_total_flops() * 2
