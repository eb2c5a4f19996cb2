"""The losses."""

from __future__ import annotations

import math

import pytest
import torch

from a2d_core import loss


def tensors(vocabulary: int = 50) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(37, 8, generator=generator, requires_grad=True)
    weight = torch.randn(vocabulary, 8, generator=generator, requires_grad=True)
    return hidden, weight, torch.randint(0, vocabulary - 1, (37,), generator=generator)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("rows_at_once", [5, 1000])
def test_chunks_change_neither_the_loss_nor_its_gradient(rows_at_once: int, softcap: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, target = tensors()
    logits = hidden @ weight.T * 0.5
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    logits = logits.clone()
    logits[:, 49] = -torch.inf
    expected = torch.nn.functional.cross_entropy(logits, target, reduction="none")
    gradients = torch.autograd.grad(expected.sum(), (hidden, weight))
    monkeypatch.setattr(loss, "CHUNK_ELEMENTS", rows_at_once * 50)
    found = loss.masked_cross_entropy(hidden, weight, target, scale=0.5, softcap=softcap, excluded_token=49)
    assert torch.allclose(found, expected, atol=1e-5)
    for a, b in zip(torch.autograd.grad(found.sum(), (hidden, weight)), gradients, strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def test_the_excluded_token_is_no_choice() -> None:
    _, weight, target = tensors()
    found = loss.masked_cross_entropy(torch.zeros(37, 8), weight, target, excluded_token=49)
    assert torch.allclose(found, torch.full((37,), math.log(49)))
    assert torch.allclose(loss.masked_cross_entropy(torch.zeros(37, 8), weight, target), torch.full((37,), math.log(50)))


def test_nothing_masked_is_a_loss_of_zero_with_a_gradient() -> None:
    hidden, weight, _ = tensors()
    found = loss.weighted_mean(loss.masked_cross_entropy(hidden[:0], weight, torch.empty(0, dtype=torch.long)), torch.empty(0), 10)
    found.backward()
    assert found == 0 and (weight.grad == 0).all()
