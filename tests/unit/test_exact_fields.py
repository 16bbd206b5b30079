"""Exact velocity fields: against closed forms, regression on draws, and naive sums over components and times."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from mixflow.data.images import load_digits
from mixflow.flow import draw_time_pair
from mixflow.models.exact import GaussianField, MixtureField
from mixflow.runtime.errors import UserError
from mixflow.sampling import sample, time_grid

SAMPLES = 200_000


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


def draws(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def labels(n, value=0):
    return torch.full((n,), value, dtype=torch.int64)


def at(net, x, t, label=0):
    """The velocity [n,d] at x [n,d]."""
    size = net.options["input_size"]
    shaped = x.reshape(len(x), -1, size, size)
    return net(shaped, torch.full((len(x),), t, dtype=torch.float64), labels(len(x), label)).flatten(1)


# ---- a Gaussian


@pytest.fixture(scope="module")
def rotated():
    """(field, mean, covariance) in two channels of 2x2, with null directions."""
    basis = torch.linalg.qr(draws(8, 8))[0]
    covariance = basis @ torch.diag(tensor(4, 2, 1, 0.5, 0.2, 0, 0, 0)) @ basis.T
    mean = draws(2, 2, 2, seed=1)
    return GaussianField.from_moments(mean, covariance), mean.flatten(), covariance


@pytest.mark.parametrize("t", [0.0, 0.3, 0.9])
def test_gaussian_velocity_is_the_conditional_mean(rotated, t):
    """E[u | y] = mean + Cov(u, x_t) Cov(x_t)^-1 (y - t mean)."""
    net, mean, covariance = rotated
    unit = torch.eye(8, dtype=torch.float64)
    gain = (t * covariance - (1 - t) * unit) @ torch.linalg.inv(t**2 * covariance + (1 - t) ** 2 * unit)
    y = draws(5, 8, seed=2)
    torch.testing.assert_close(at(net, y, t), mean + (y - t * mean) @ gain.T, rtol=1e-4, atol=1e-4)


def test_gaussian_takes_a_time_for_each_row(rotated):
    net, times, x = rotated[0], tensor(0.1, 0.5, 0.9), draws(3, 2, 2, 2)
    together = net(x, times, labels(3))
    for row in range(3):
        torch.testing.assert_close(together[row], net(x[row : row + 1], times[row], labels(1))[0])


def test_gaussian_of_samples(rotated):
    net, mean, covariance = rotated
    values, basis = torch.linalg.eigh(covariance)
    data = mean + draws(20_000, 8) * values.clamp(min=0).sqrt() @ basis.T
    fitted = GaussianField.fit(data.reshape(-1, 2, 2, 2))
    y = draws(4, 8, seed=4)
    torch.testing.assert_close(at(fitted, y, 0.5), at(net, y, 0.5), rtol=0, atol=0.1)
    torch.testing.assert_close(fitted.mean.flatten().double(), data.mean(0), rtol=0, atol=1e-6)


def test_no_nan_at_the_ends(rotated):
    fields = [rotated[0], MixtureField.fit(draws(3, 2, 2, 2), torch.tensor([0, 0, 1]), 0.0)]
    fields += [GaussianField.from_spectrum(torch.zeros(2, 2, 2), torch.zeros(8), law="mixflow", gamma=0.8)]
    for net in fields:
        for t in (0.0, 1.0):
            assert at(net, draws(4, 8), t).isfinite().all()
            assert at(net, 1e4 * draws(4, 8), t).isfinite().all()


def test_euler_ends_on_the_support(rotated):
    """Null directions end at their mean, for the last step is h = 1 - t: no noise is left."""
    net, mean, covariance = rotated
    x = sample(lambda x, t: net(x, t, labels(len(x))), draws(100, 2, 2, 2).float(), solver="euler", times=time_grid(20))
    null = torch.linalg.eigh(covariance)[1][:, :3]
    assert ((x.flatten(1).double() - mean) @ null).abs().max() < 1e-4


def test_fields_compute_in_full_precision_under_autocast(rotated):
    x = draws(6, 2, 2, 2).float()
    plain = rotated[0](x, torch.tensor(0.7), labels(6))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(rotated[0](x, torch.tensor(0.7), labels(6)), plain)
    low = rotated[0](x.bfloat16(), torch.tensor(0.7), labels(6))
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), plain, rtol=0.05, atol=0.05)


def test_negative_variances_are_refused():
    with pytest.raises(UserError, match="variance"):
        GaussianField.from_spectrum(torch.zeros(1, 1, 1), torch.tensor([-1.0]))


# ---- mixtures


@pytest.mark.parametrize("t", [0.2, 0.6, 0.95])
def test_two_points(t):
    """D = c tanh(t c y / (1-t)^2) for data +-c, and v = (D - y) / (1 - t)."""
    c = 1.5
    net = MixtureField.fit(torch.tensor([c, -c]).reshape(2, 1, 1, 1), torch.zeros(2, dtype=torch.int64), 0.0)
    y = tensor(-2, -0.3, 0, 0.1, 1)[:, None]
    wanted = (c * torch.tanh(t * c * y / (1 - t) ** 2) - y) / (1 - t)
    torch.testing.assert_close(at(net, y, t), wanted, rtol=1e-6, atol=1e-6)


@pytest.fixture(scope="module")
def mixture():
    """(field, centres [5,4], labels, weights, bandwidth) on 1x2x2 latents."""
    centres, classes = 2 * draws(5, 4).float(), torch.tensor([0, 0, 1, 1, 1])
    weights = tensor(1, 2, 3, 1, 1)
    return (
        MixtureField.fit(centres.reshape(5, 1, 2, 2), classes, 0.3, weights=weights),
        centres.double(),
        classes,
        weights,
    )


def naive_mixture(centres, weights, bandwidth, y, m):
    """(velocity [n,d], density [n]) at y of inputs at time m, component by component."""
    velocity, density = torch.zeros_like(y), torch.zeros(len(y), dtype=torch.float64)
    variance = m**2 * bandwidth**2 + (1 - m) ** 2
    for centre, weight in zip(centres, weights / weights.sum(), strict=True):
        away = y - m * centre
        share = weight * torch.exp(-away.square().sum(1) / (2 * variance)) / variance ** (y.shape[1] / 2)
        slope = (m * bandwidth**2 - (1 - m)) / variance
        velocity += share[:, None] * (centre + slope * away)
        density += share
    return velocity / density[:, None], density


@pytest.mark.parametrize("label", [0, 1, 2])
def test_mixture_is_the_weighted_sum_of_its_components(mixture, label):
    """Labels select their components; the null label (2) takes all."""
    net, centres, classes, weights = mixture
    chosen = classes == label if label < 2 else slice(None)
    y = draws(6, 4, seed=3)
    wanted, _ = naive_mixture(centres[chosen], weights[chosen], 0.3, y, 0.7)
    assert net.null_label == 2
    torch.testing.assert_close(at(net, y, 0.7, label), wanted, rtol=1e-5, atol=1e-5)


def test_rows_of_several_labels_and_times(mixture):
    net, x = mixture[0], draws(6, 1, 2, 2)
    y, t = torch.tensor([0, 1, 2, 1, 0, 2]), tensor(0.1, 0.2, 0.3, 0.4, 0.5, 0.6)
    together = net(x, t, y)
    for row in range(6):
        torch.testing.assert_close(together[row], net(x[row : row + 1], t[row], y[row : row + 1])[0])
    dropped = net(x, t, y, torch.tensor([True, False, False, False, False, False]))
    torch.testing.assert_close(dropped[0], net(x[:1], t[0], torch.tensor([2]))[0])


def test_one_component_is_a_gaussian():
    centre = draws(1, 1, 2, 2)
    mixture = MixtureField.fit(centre, torch.zeros(1, dtype=torch.int64), 0.5)
    single = GaussianField.from_spectrum(centre[0], torch.full((4,), 0.25))
    for law, gamma in (("uniform", 0.0), ("mixflow", 0.8)):
        for net in (mixture, single):
            net.law, net.gamma = law, gamma
        torch.testing.assert_close(at(mixture, draws(5, 4), 0.7), at(single, draws(5, 4), 0.7), rtol=1e-6, atol=1e-6)


def test_chunks_of_rows_change_nothing(mixture, monkeypatch):
    net, y = mixture[0], draws(50, 4)
    whole = at(net, y, 0.6, 2)
    monkeypatch.setattr("mixflow.models.exact.ROWS", 12)
    torch.testing.assert_close(at(net, y, 0.6, 2), whole, rtol=1e-12, atol=1e-12)


def test_far_inputs_in_many_dimensions_stay_finite():
    """4,096 dimensions: likelihoods of e^-1e6, where only their logarithms can be held."""
    centres = draws(20, 4, 32, 32).float()
    net = MixtureField.fit(centres, torch.zeros(20, dtype=torch.int64), 0.01)
    x = (0.98 * centres[7:8] + 0.02 * draws(1, 4, 32, 32)).float()
    velocity = net(x, torch.tensor(0.98), labels(1))
    # Nothing but its own component is near: D = centre up to the bandwidth's small share of the noise.
    torch.testing.assert_close(x + 0.02 * velocity, centres[7:8], rtol=0, atol=0.05)


@pytest.mark.parametrize(("classes", "bandwidth", "word"), [(3, 0.1, "class 2"), (2, -0.1, "bandwidth")])
def test_bad_mixtures(classes, bandwidth, word):
    with pytest.raises(UserError, match=word):
        MixtureField.fit(draws(2, 1, 2, 2), torch.tensor([0, 1]), bandwidth, num_classes=classes)


# ---- the optimum under a law of times

ONE = GaussianField.from_spectrum(torch.tensor([[[0.7]]]), torch.tensor([0.49]))
TWO = MixtureField.fit(torch.tensor([1.5, -1.0]).reshape(2, 1, 1, 1), torch.zeros(2, dtype=torch.int64), 0.2)


def data_of(net, n, seed=0):
    """Draws [n,d] of the data behind a field."""
    noise = draws(n, net.options["input_size"] ** 2, seed=seed)
    if isinstance(net, GaussianField):
        return net.mean.flatten().double() + net.variances.double().sqrt() * noise
    which = torch.randint(len(net.components), (n,), generator=torch.Generator().manual_seed(seed))
    return net.components[which].flatten(1).double() + net.bandwidth.double() * noise


@pytest.mark.parametrize("net", [ONE, TWO], ids=["gaussian", "mixture"])
@pytest.mark.parametrize(
    ("law", "gamma", "t"),
    [
        ("mixflow", 0.4, 0.3),
        ("mixflow", 0.8, 0.9),
        ("uniform_slowed", 1.0, 1.0),
        ("blind", 0.8, 0.5),
        ("blind", 1.0, 0.5),
        ("uniform_any", 0.0, 0.2),
        ("beta_any", 0.0, 0.2),
    ],
)
def test_optimum_of_a_law_is_what_regression_finds(net, law, gamma, t):
    """Averages of u over bins of x_m, with m drawn by the law at (near) this t, against v_mix there."""
    if law in ("mixflow", "uniform_slowed"):
        m = t * (1 - gamma * torch.rand(SAMPLES, generator=torch.Generator().manual_seed(5), dtype=torch.float64))
    else:  # independent of t
        m = draw_time_pair(SAMPLES, law=law, gamma=gamma, generator=torch.Generator().manual_seed(6))[1].double()
    data, noise = data_of(net, SAMPLES)[:, 0], draws(SAMPLES, seed=8)
    x, u = m * data + (1 - m) * noise, data - noise
    field = type(net)(**(net.options | {"law": law, "gamma": gamma}))
    field.load_state_dict(net.state_dict())
    edges = torch.quantile(x, torch.linspace(0.02, 0.98, 25, dtype=torch.float64))
    for low, high in pairwise(edges):
        inside = (x >= low) & (x < high)
        predicted = at(field, x[inside][:400, None], t)[:, 0].mean()
        error = u[inside].std() / inside.sum().sqrt()
        spread = at(field, torch.stack([low, high])[:, None], t).diff(dim=0).abs().item() / math.sqrt(400)
        assert abs(predicted - u[inside].mean()) < 5 * error + 2 * spread


@pytest.mark.parametrize(("law", "gamma"), [("mixflow", 0.8), ("uniform_slowed", 0.4)])
@pytest.mark.parametrize("t", [0.2, 0.7, 0.97])
def test_optimum_is_the_integral(mixture, law, gamma, t):
    """Against the midpoint rule, in 4 dimensions."""
    net, centres, _, weights = mixture
    field = type(net)(**(net.options | {"law": law, "gamma": gamma}))
    field.load_state_dict(net.state_dict())
    y = draws(5, 4, seed=2)
    above, below = torch.zeros_like(y), torch.zeros(5, dtype=torch.float64)
    for m in torch.linspace((1 - gamma) * t, t, 401, dtype=torch.float64)[:-1] + gamma * t / 800:
        velocity, density = naive_mixture(centres, weights, 0.3, y, m)
        above, below = above + velocity * density[:, None], below + density
    torch.testing.assert_close(at(field, y, t, 2), above / below[:, None], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("net", [ONE, TWO], ids=["gaussian", "mixture"])
def test_optimum_tends_to_the_exact_field(net):
    """As gamma falls to 0; and the laws with m = t are the exact field itself."""
    y = tensor(-1, 0, 2)[:, None]
    exact = at(net, y, 0.6)
    errors = []
    for gamma in (0.02, 0.01):
        field = type(net)(**(net.options | {"law": "mixflow", "gamma": gamma}))
        field.load_state_dict(net.state_dict())
        errors.append((at(field, y, 0.6) - exact).abs().max().item())
    assert errors[0] < 0.1
    assert errors[1] < 0.6 * errors[0]
    matched = type(net)(**(net.options | {"law": "matched", "gamma": 0.8}))
    matched.load_state_dict(net.state_dict())
    assert torch.equal(at(matched, y, 0.6), exact)


def test_in_many_dimensions_the_optimum_reads_the_time_off_the_input():
    """Null directions tell m to O(d^-1/2): the field told t is the exact one at the input's own, earlier time."""
    variances = torch.cat([torch.full((4,), 4.0), torch.zeros(1020)])
    exact = GaussianField.from_spectrum(torch.zeros(1, 32, 32), variances)
    field = GaussianField.from_spectrum(torch.zeros(1, 32, 32), variances, law="mixflow", gamma=0.8)
    x = 0.5 * variances.double().sqrt() * draws(20, 1024) + 0.5 * draws(20, 1024, seed=1)
    wanted = at(exact, x, 0.5)
    assert (at(field, x, 0.8) - wanted).norm() < 0.05 * wanted.norm()
    assert (at(exact, x, 0.8) - wanted).norm() > 0.5 * wanted.norm()


def test_a_law_that_slows_needs_a_gamma():
    with pytest.raises(UserError, match="gamma"):
        GaussianField.from_spectrum(torch.zeros(1, 1, 1), torch.ones(1), law="mixflow", gamma=0.0)


# ---- digits


@pytest.fixture(scope="module")
def digits():
    images = load_digits(8, 360, 0)["train"]
    pixels = torch.from_numpy(images.images).permute(0, 3, 1, 2).float() / 127.5 - 1
    net = MixtureField.fit(pixels, torch.from_numpy(images.labels), 0.1)
    return net, pixels, torch.from_numpy(images.labels)


def test_one_step_falls_behind_on_digits(digits):
    """m* = s + h R2(s) for any data: one Euler step of the exact field, least squares over m for the same pair."""
    net, pixels, classes = digits
    step = 0.05
    noise = draws(len(pixels), 1, 8, 8)
    data = pixels.double() + 0.1 * draws(len(pixels), 1, 8, 8, seed=1)
    u = data - noise
    energy = u.square().sum()
    for start in (0.1, 0.5, 0.8):
        velocity = net((start * data + (1 - start) * noise), torch.tensor(start), classes)
        moved = start * data + (1 - start) * noise + step * velocity
        nearest = ((moved - noise) * u).sum() / energy
        wanted = start + step * velocity.square().sum() / energy
        assert start < wanted < start + step
        assert nearest.item() - start == pytest.approx((wanted - start).item(), rel=0.02)


def test_samples_of_the_digits_field_are_digits(digits):
    """Its Euler samples lie about a bandwidth from a training image of the class asked for."""
    net, pixels, classes = digits
    wanted = torch.arange(20) % 10
    x = sample(lambda x, t: net(x, t, wanted), draws(20, 1, 8, 8), solver="euler", times=time_grid(50))
    distances = torch.cdist(x.flatten(1), pixels.double().flatten(1))
    nearest = distances.min(1)
    assert torch.equal(classes[nearest.indices], wanted)
    assert (nearest.values / 8 < 0.12).all()
