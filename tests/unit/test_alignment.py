"""The alignment loss by its definition; against the peer's numbers it is tested with the network, in test_repa."""

from __future__ import annotations

import pytest
import torch

from mixflow.flow import INTERPOLANTS, flow_matching_loss
from mixflow.training.alignment import aligned_flow_matching_loss, alignment_loss


def features(*widths, n=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, 5, width, generator=generator) for width in widths]


def test_minus_the_mean_cosine_over_tokens_and_encoders():
    projections, targets = features(4, 6), features(4, 6, seed=1)
    expected = torch.zeros(3)
    for p, z in zip(projections, targets, strict=True):
        for sample in range(3):
            for token in range(5):
                a, b = p[sample, token], z[sample, token]
                expected[sample] -= a @ b / (a.norm() * b.norm()) / 10
    torch.testing.assert_close(alignment_loss(projections, targets), expected)


def test_only_directions_count():
    projections = features(4)
    for scale, loss in [(7.0, -1.0), (-0.1, 1.0)]:
        torch.testing.assert_close(alignment_loss(projections, [scale * projections[0]]), torch.full((3,), loss))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_large_low_precision_features_neither_overflow_nor_stop_the_gradient(dtype):
    projections, targets = features(768), features(768, seed=1)
    large = (1000 * projections[0]).to(dtype).requires_grad_()
    assert dtype != torch.float16 or large.square().sum().isinf()
    loss = alignment_loss([large], [(1000 * targets[0]).to(dtype)])
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, alignment_loss(projections, targets), rtol=0, atol=1e-3)
    loss.sum().backward()
    assert large.grad.isfinite().all()
    assert large.grad.abs().max() > 0
    with torch.autocast("cpu", torch.bfloat16):
        assert alignment_loss([large], [targets[0]]).dtype == torch.float32


def test_zero_features_are_harmless():
    zero = torch.zeros(3, 5, 4, requires_grad=True)
    loss = alignment_loss([zero], features(4))
    loss.sum().backward()
    assert torch.equal(loss, torch.zeros(3))
    assert zero.grad.isfinite().all()


def test_combined_loss_is_the_sum_from_one_network_call():
    generator = torch.Generator().manual_seed(2)
    noise, data = torch.randn(2, 3, 4, 8, 8, generator=generator)
    t, m = torch.tensor([0.2, 0.5, 0.9]), torch.tensor([0.1, 0.5, 0.3])
    projections, targets = features(4, 6), features(4, 6, seed=1)
    calls = []

    def network(x, t):
        calls.append(t)
        return torch.sin(x), projections

    path = INTERPOLANTS["linear"]
    loss = aligned_flow_matching_loss(network, noise, data, t, m, path, targets, 0.5)
    plain = flow_matching_loss(lambda x, t: torch.sin(x), noise, data, t, m, path)
    torch.testing.assert_close(loss, plain + 0.5 * alignment_loss(projections, targets))
    assert len(calls) == 1
    assert torch.equal(calls[0], t)
