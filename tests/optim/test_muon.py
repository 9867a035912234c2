import pytest
import torch

from nanochat_ray.optim.muon import MuonRule, muon_update_, orthogonalize


def test_polar_express_is_near_the_polar_factor() -> None:
    torch.manual_seed(0)
    for shape in [(3, 64, 64), (2, 48, 96), (2, 96, 48), (32, 64)]:
        G = torch.randn(shape)
        U, S, V = torch.linalg.svd(G, full_matrices=False)
        singular_values = torch.linalg.svdvals(orthogonalize(G))
        # Singular values above a thousandth of the norm land close to 1; the paper bounds the
        # error of five steps by a few per cent for those well above it.
        large_values = singular_values[S / S.norm(dim=-1, keepdim=True) > 0.02]
        assert ((large_values - 1).abs() < 0.2).all()
        cosine = (orthogonalize(G) * (U @ V)).sum() / (orthogonalize(G).norm() * (U @ V).norm())
        assert cosine > 0.99


def test_update_against_a_reference_written_with_svd_free_loops() -> None:
    """The stacked update equals the paper's steps applied to one matrix at a time in float64."""
    torch.manual_seed(1)
    W, G = torch.randn(3, 8, 4), torch.randn(3, 8, 4)
    momentum, second = torch.randn(3, 8, 4) * 0.1, torch.rand(3, 8, 1)
    references = []
    for w, g, m, v in zip(W.double(), G.double(), momentum.double(), second.double(), strict=True):
        m = 0.9 * m + 0.1 * g
        u = orthogonalize(0.1 * g + 0.9 * m)
        rows = (u**2).mean(dim=1, keepdim=True)
        v = 0.8 * v + 0.2 * rows
        rescaled_grads = u / v.sqrt()
        rescaled_grads = rescaled_grads * (u.norm() / rescaled_grads.norm())
        rate = 0.05 * 2**0.5
        agrees = ((rescaled_grads * w) > 0).double()
        references.append(w - rate * 0.3 * agrees * w - rate * rescaled_grads)
    rates = {"lr": 0.05, "momentum": 0.9, "beta2": 0.8, "weight_decay": 0.3}
    muon_update_(W, G, momentum, second, rule=MuonRule(cautious=True), **rates)
    torch.testing.assert_close(W, torch.stack(references).float(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("shape", [(32, 16), (16, 32), (24, 24)])
def test_plain_muon_is_torchs(shape: tuple[int, int]) -> None:
    """With everything around it off, and in bfloat16, it is ``torch.optim.Muon``."""
    generator = torch.Generator().manual_seed(0)
    theirs = torch.nn.Parameter(torch.randn(shape, generator=generator))
    ours, buffer = theirs.detach().clone()[None], torch.zeros(1, *shape)
    optimizer = torch.optim.Muon([theirs], lr=0.02, momentum=0.9, weight_decay=0.1)
    rule = MuonRule(orthogonalizer="newton_schulz", normuon=False, cautious=False)
    for _ in range(4):
        theirs.grad = torch.randn(shape, generator=generator)
        ratio = max(1.0, shape[0] / shape[1]) ** 0.5
        muon_update_(
            ours,
            theirs.grad[None].clone(),
            buffer,
            torch.empty(0),
            lr=0.02,
            momentum=0.9,
            beta2=0.0,
            weight_decay=0.1 / ratio,  # both scale the update by the ratio, we the decay too
            rule=rule,
            dtype=torch.bfloat16,
        )
        optimizer.step()
    torch.testing.assert_close(ours[0], theirs.detach(), atol=2e-3, rtol=0)


def test_equilibration_makes_the_update_indifferent_to_the_size_of_rows() -> None:
    generator = torch.Generator().manual_seed(0)
    G = torch.randn(1, 8, 12, generator=generator)
    rescaled_grads = G * torch.logspace(-3, 3, 8)[None, :, None]
    rule = MuonRule(row_normalize=True, normuon=False)
    results = []
    for grads in (G, rescaled_grads):
        W = torch.zeros(1, 8, 12)
        muon_update_(
            W,
            grads.clone(),
            torch.zeros_like(W),
            torch.empty(0),
            lr=1.0,
            momentum=0.9,
            beta2=0.0,
            weight_decay=0.0,
            rule=rule,
        )
        results.append(W)
    torch.testing.assert_close(results[0], results[1], atol=1e-5, rtol=1e-4)
