import pytest
import torch

from nanochat_ray.optim.config import Orthogonalizer
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


@pytest.mark.parametrize(
    ("method", "values"),
    # What the published coefficients give for s / norm(s), with Polar Express's factor 1 / 1.02,
    # by a scalar loop. The largest is not 1: there are five steps, and Jordan's never end at 1.
    [
        ("polar_express", [1.003886823, 1.025472148, 0.979545126, 1.117266110, 0.962479832]),
        ("newton_schulz", [0.739698972, 0.744105605, 1.020841154, 1.012431896, 0.561665566]),
    ],
)
def test_singular_values_by_hand(method: Orthogonalizer, values: list[float]) -> None:
    G = torch.diag(torch.tensor([8.0, 2.0, 0.5, 0.05, 0.01], dtype=torch.float64))
    for stack in (G, torch.stack((G, 3 * G))):
        result = orthogonalize(stack, method)
        golden = torch.diag(torch.tensor(values, dtype=torch.float64)).expand_as(result)
        torch.testing.assert_close(result, golden, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("method", ["polar_express", "newton_schulz"])
def test_tiny_gradients_keep_their_direction(method: Orthogonalizer) -> None:
    G = torch.tensor([[1.0, 2.0], [2.0, -1.0]], dtype=torch.float64)
    for size in (1e-6, 1e-8, 1e-12):
        assert ((orthogonalize(size * G, method) * G) > 0).all()


def test_cautious_decay_is_where_the_update_shrinks() -> None:
    """A row without gradient has no update, and is not decayed either."""
    grads = torch.tensor([[[1.0, 2.0, 3.0], [0.0, 0.0, 0.0]]])
    rates = {"lr": 0.1, "momentum": 0.9, "beta2": 0.9, "weight_decay": 0.5}
    for cautious, factor in ((True, 1.0), (False, 0.95)):
        W = torch.ones(1, 2, 3)
        rule = MuonRule(cautious=cautious, normuon=False)
        muon_update_(W, grads.clone(), torch.zeros_like(W), torch.empty(0), rule=rule, **rates)
        assert W[0, 1].tolist() == pytest.approx([factor] * 3)
        assert (W[0, 0] < 0.95).all()


def test_rule_of_plain_muon() -> None:
    rule = MuonRule()
    assert (rule.orthogonalizer, rule.normuon) == ("polar_express", True)
    assert (rule.row_normalize, rule.cautious) == (False, False)


@pytest.mark.parametrize("shape", [(2, 4, 6), (2, 6, 4), (2, 4, 4)])
@pytest.mark.parametrize("row_normalize", [False, True])
def test_a_gradient_of_zeros_moves_nothing(shape: tuple[int, ...], row_normalize: bool) -> None:
    K, m, n = shape
    W, second = torch.ones(shape), torch.zeros((K, m, 1) if m >= n else (K, 1, n))
    rates = {"lr": 0.1, "momentum": 0.9, "beta2": 0.9, "weight_decay": 0.0}
    zeros = torch.zeros(shape)
    muon_update_(
        W, zeros, zeros.clone(), second, rule=MuonRule(row_normalize=row_normalize), **rates
    )
    assert torch.equal(W, torch.ones(shape))


@pytest.mark.parametrize(("m", "n"), [(8, 4), (4, 8)])
@pytest.mark.parametrize("row_normalize", [False, True])
@pytest.mark.parametrize("cautious", [False, True])
def test_update_by_the_papers(m: int, n: int, row_normalize: bool, cautious: bool) -> None:
    """The stacked update equals the papers' steps applied to one matrix at a time in float64."""
    torch.manual_seed(1)
    axis = 1 if m >= n else 0  # the second moment is that of the longer side's neurons
    W, G, momentum = torch.randn(3, m, n), torch.randn(3, m, n), torch.randn(3, m, n) * 0.1
    second = torch.rand(3, m, 1) if m >= n else torch.rand(3, 1, n)
    references: list[list[torch.Tensor]] = [[], [], []]
    for w, g, mean, v in zip(
        W.double(), G.double(), momentum.double(), second.double(), strict=True
    ):
        mean = 0.9 * mean + 0.1 * g
        u = 0.1 * g + 0.9 * mean
        if row_normalize:
            u = u / u.norm(dim=1, keepdim=True)
        u = orthogonalize(u)
        v = 0.8 * v + 0.2 * (u**2).mean(dim=axis, keepdim=True)
        rescaled_grads = u / v.sqrt()
        rescaled_grads = rescaled_grads * (u.norm() / rescaled_grads.norm())
        rate = 0.05 * (2**0.5 if m > n else 1)
        agrees = ((rescaled_grads * w) > 0).double() if cautious else 1.0
        w = w - rate * 0.3 * agrees * w - rate * rescaled_grads
        for reference, tensor in zip(references, (w, mean, v), strict=True):
            reference.append(tensor)
    rates = {"lr": 0.05, "momentum": 0.9, "beta2": 0.8, "weight_decay": 0.3}
    rule = MuonRule(cautious=cautious, row_normalize=row_normalize)
    muon_update_(W, G, momentum, second, rule=rule, **rates)
    for tensor, reference in zip((W, momentum, second), references, strict=True):
        torch.testing.assert_close(tensor, torch.stack(reference).float(), atol=1e-5, rtol=1e-4)


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
