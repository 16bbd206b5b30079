"""Interpolants, time laws and the loss: against SiT's numbers, RAE's convention of time, and closed forms."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mixflow.flow import GVP, INTERPOLANTS, LAWS, Linear, draw_time_pair, flow_matching_loss, shift_time, time_pair
from mixflow.runtime.errors import UserError

PATHS = load_file(Path(__file__).parents[1] / "golden" / "sit" / "paths.safetensors")
GAMMAS = (0.4, 0.8, 1.0)


def close(actual, expected, tolerance):
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


def uniforms(n, seed=0):
    return torch.rand(3, n, generator=torch.Generator().manual_seed(seed))


def even_uniforms(side):
    """[3, side^2] midpoints that cover the first two axes evenly, for laws whose third uniform is not used."""
    line = (torch.arange(side, dtype=torch.float64) + 0.5) / side
    u, v = torch.meshgrid(line, line, indexing="ij")
    return torch.stack([u.flatten(), v.flatten(), torch.zeros(side**2, dtype=torch.float64)])


# ---- interpolants


@pytest.mark.parametrize("name", ["Linear", "GVP"])
def test_paths_are_the_peers(name):
    path, g = INTERPOLANTS[name.lower()], {k.removeprefix(f"{name}."): v for k, v in PATHS.items()}
    t, noise, data = g["t"], g["x0"], g["x1"]
    for method, key in [("alpha", "alpha"), ("sigma", "sigma"), ("alpha_dot", "dalpha"), ("sigma_dot", "dsigma")]:
        close(getattr(path, method)(t), g[key].expand(6), 1e-6)
    close(path.interpolate(noise, data, t), g["xt"], 1e-6)
    close(path.velocity(noise, data, t), g["ut"], 1e-6)
    # near t = 1 the score is of the order of 500 and float32 leaves it few digits
    torch.testing.assert_close(path.score(g["ut"], g["xt"], t), g["score_from_ut"], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("path", [Linear(), GVP()])
def test_denoised_and_score_invert_the_path(path):
    generator = torch.Generator().manual_seed(0)
    noise, data = torch.randn(2, 5, 3, 2, 2, generator=generator, dtype=torch.float64)
    t = torch.tensor([0.0, 0.2, 0.5, 0.9, 0.999], dtype=torch.float64)
    x, u = path.interpolate(noise, data, t), path.velocity(noise, data, t)
    close(path.denoised(u, x, t), data, 1e-12)
    close(-path.score(u, x, t) * path.sigma(t)[:, None, None, None], noise, 1e-9)


@pytest.mark.parametrize("path", [Linear(), GVP()])
def test_velocity_is_the_derivative_of_the_path(path):
    noise, data = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    t = torch.tensor([0.1, 0.4, 0.7, 0.9], dtype=torch.float64)
    h = 1e-5
    difference = (path.interpolate(noise, data, t + h) - path.interpolate(noise, data, t - h)) / (2 * h)
    close(path.velocity(noise, data, t), difference, 1e-9)


@pytest.mark.parametrize("path", [Linear(), GVP()])
def test_paths_run_from_noise_to_data_and_keep_the_dtype(path):
    noise, data = torch.randn(2, 1, 2, 2, 2)
    close(path.interpolate(noise, data, torch.tensor(0.0)), noise, 0)
    close(path.interpolate(noise, data, torch.tensor(1.0, dtype=torch.float64)), data, 1e-6)
    assert path.interpolate(noise, data, torch.tensor(0.5, dtype=torch.float64)).dtype == torch.float32


# ---- time laws


def test_gamma_zero_is_beta_bit_for_bit():
    u = uniforms(10_000)
    for shift in (1.0, 6.93):
        t_beta, m_beta = time_pair(u, "beta", shift=shift)
        t, m = time_pair(u, "mixflow", gamma=0.0, shift=shift)
        assert torch.equal(t, t_beta)
        assert torch.equal(m, m_beta)
        assert torch.equal(m, t)


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("shift", [1.0, 6.93])
def test_times_are_float32_inside_the_unit_interval(law, shift):
    edges = torch.tensor([0.0, 1 - 2**-24])
    u = torch.cat([torch.cartesian_prod(edges, edges, edges).T, uniforms(10_000)], dim=1)
    t, m = time_pair(u, law, gamma=1.0, shift=shift)
    for values in (t, m):
        assert values.dtype == torch.float32
        assert values.shape == (10_008,)
        assert 0 <= values.min() <= values.max() <= 1
    if law in ("uniform", "beta", "logit_normal", "matched"):
        assert torch.equal(t, m)


@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("shift", [1.0, 6.93])
def test_slowed_time_lies_below_the_shifted_time(gamma, shift):
    t, m = time_pair(uniforms(100_000), "mixflow", gamma, shift)
    assert (m <= t).all()
    assert (m >= (1 - gamma) * t - 1e-7).all()
    ratio = m / t
    assert ratio.min() < 1 - gamma + 1e-3
    assert ratio.max() > 1 - 1e-3


@pytest.mark.parametrize(
    ("law", "mean_t", "mean_m"),
    [("uniform_slowed", 1 / 2, 0.3), ("uniform_any", 1 / 2, 1 / 2), ("beta_any", 2 / 3, 1 / 2)],
)
def test_the_papers_ablations_of_the_law_of_times(law, mean_t, mean_m):
    """Section 4.1's rows: U[0,1] or Beta(2,1) for t, and U[(1-gamma) t, t] or an independent U[0,1] for m."""
    t, m = (values.double() for values in time_pair(uniforms(400_000), law, gamma=0.8 if "slowed" in law else 0.0))
    assert t.mean().item() == pytest.approx(mean_t, abs=2e-3)
    assert m.mean().item() == pytest.approx(mean_m, abs=2e-3)
    correlation = torch.corrcoef(torch.stack([t, m]))[0, 1].item()
    if law == "uniform_slowed":
        assert ((m <= t) & (m >= 0.2 * t - 1e-7)).all()
        assert correlation > 0.7
    else:
        assert abs(correlation) < 0.01
        assert m.var().item() == pytest.approx(1 / 12, abs=1e-3)


@pytest.mark.parametrize("gamma", GAMMAS)
def test_mixflow_moments_and_density_of_m(gamma):
    """E t = 2/3, Var t = 1/18, E m = (2/3)(1 - gamma/2), p(m) = (2/gamma)(min(1, m/(1-gamma)) - m)."""
    t, m = (values.double() for values in time_pair(even_uniforms(1000), "mixflow", gamma))
    assert t.mean().item() == pytest.approx(2 / 3, abs=1e-4)
    assert t.var().item() == pytest.approx(1 / 18, abs=1e-4)
    assert m.mean().item() == pytest.approx({0.4: 0.5333, 0.8: 0.4, 1.0: 0.3333}[gamma], abs=1e-4)

    q = torch.linspace(0.02, 0.98, 49, dtype=torch.float64)
    knee = 1 - gamma  # the density rises up to here and falls beyond
    rising = q**2 / (2 * knee) if knee > 0 else torch.zeros_like(q)
    cdf = 2 / gamma * (torch.where(q < knee, rising, knee / 2 + (q - knee)) - q**2 / 2)
    close((m[:, None] <= q).double().mean(dim=0), cdf, 2e-3)


def test_pairs_are_uniform_on_the_wedge():
    """Beta(2,1) makes every admissible pair equally likely: equal cells of the wedge hold equal mass."""
    gamma = 0.8
    t, m = time_pair(even_uniforms(1000), "mixflow", gamma)
    inside = []
    for low_t, low_m in [(0.5, 0.2), (0.6, 0.45), (0.8, 0.2), (0.9, 0.6), (0.9, 0.75)]:  # cells of 0.1 x 0.1
        inside.append(((t >= low_t) & (t < low_t + 0.1) & (m >= low_m) & (m < low_m + 0.1)).double().mean())
    close(torch.stack(inside), torch.full((5,), 0.01 * 2 / gamma, dtype=torch.float64), 5e-4)


@pytest.mark.parametrize("shift", [1.0, 6.93])
def test_matched_has_mixflows_inputs_and_blind_has_its_marginals(shift):
    u = uniforms(100_000)
    t, m = time_pair(u, "mixflow", 0.8, shift)
    t_matched, m_matched = time_pair(u, "matched", 0.8, shift)
    assert torch.equal(m_matched, m)
    assert torch.equal(t_matched, m)

    t_blind, m_blind = time_pair(u, "blind", 0.8, shift)
    assert torch.equal(t_blind, t)
    levels = torch.linspace(0.05, 0.95, 19)
    close(m_blind.quantile(levels), m.quantile(levels), 5e-3)
    assert abs(torch.corrcoef(torch.stack([t_blind, m_blind]))[0, 1]) < 0.015
    assert torch.corrcoef(torch.stack([t, m]))[0, 1] > 0.4


def test_logit_normal_is_the_sigmoid_of_a_normal():
    t, _ = time_pair(even_uniforms(300), "logit_normal")
    z = t.double().logit()
    assert z.mean().item() == pytest.approx(0, abs=1e-3)
    assert z.var().item() == pytest.approx(1, abs=0.02)
    assert (t < torch.sigmoid(torch.tensor(1.0))).double().mean().item() == pytest.approx(0.8413, abs=2e-3)


def test_shift_is_the_peers_rule_in_reversed_time():
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    for shift in (0.5, 1.0, 6.9282, 13.8564):
        reverse = 1 - t
        close(shift_time(t, shift), 1 - shift * reverse / (1 + (shift - 1) * reverse), 1e-14)
    assert torch.equal(shift_time(t, 1.0), t)
    assert (shift_time(t, 6.93)[1:-1] < t[1:-1]).all()  # towards noise


@pytest.mark.parametrize("gamma", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("shift", [1.0, 6.9282])
def test_paper_time_agrees_with_raes_reversed_time(gamma, shift):
    """MixFlow as RAE's code states it (its t=1 is noise) is the same training after t -> 1-t and v -> -v."""
    u = uniforms(512).double()
    generator = torch.Generator().manual_seed(1)
    noise, data = torch.randn(2, 512, 3, 2, 2, generator=generator, dtype=torch.float64)

    t_r = 1 - u[0].sqrt()
    t_r = shift * t_r / (1 + (shift - 1) * t_r)
    m_r = t_r + u[1] * gamma * (1 - t_r)
    m_r_ = m_r[:, None, None, None]
    x_r = (1 - m_r_) * data + m_r_ * noise
    target_r = noise - data

    t, m = time_pair(u, "mixflow", gamma, shift)
    close(t.double(), 1 - t_r, 1e-7)
    close(m.double(), 1 - m_r, 1e-7)
    close(Linear().interpolate(noise, data, m), x_r, 1e-6)
    close(Linear().velocity(noise, data, t), -target_r, 1e-15)

    def network_r(x, t):  # a network in RAE's convention
        return torch.sin(x) * (1 + t)[:, None, None, None]

    loss_r = (network_r(x_r, t_r) - target_r).square().mean(dim=(1, 2, 3))
    loss = flow_matching_loss(lambda x, t: -network_r(x, 1 - t), noise, data, t, m, Linear())
    torch.testing.assert_close(loss.double(), loss_r, rtol=2e-6, atol=0)


def test_draws_follow_the_generator_and_the_law():
    def draw(law, seed=3):
        return draw_time_pair(50_000, law=law, gamma=0.8, generator=torch.Generator().manual_seed(seed))

    t, m = draw("mixflow")
    assert torch.equal(t, draw("mixflow")[0])
    assert not torch.equal(t, draw("mixflow", seed=4)[0])
    assert torch.equal(t, draw("beta")[0])  # all laws use up the same random numbers
    assert t.mean().item() == pytest.approx(2 / 3, abs=5e-3)
    assert m.mean().item() == pytest.approx(0.4, abs=5e-3)
    assert draw("uniform")[0].mean().item() == pytest.approx(0.5, abs=6e-3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(law="mixflwo"), r"'mixflwo' is not a law of time; did you mean 'mixflow'\?"),
        (dict(law="mixflow", gamma=1.2), "gamma is 1.2"),
        (dict(law="mixflow", gamma=-0.1), "gamma is -0.1"),
        (dict(law="mixflow", gamma=float("nan")), "gamma is nan"),
        (dict(law="beta", shift=0.0), "shift is 0.0"),
    ],
)
def test_bad_input_is_named(arguments, message):
    with pytest.raises(UserError, match=message):
        draw_time_pair(4, **arguments)


# ---- loss


@pytest.mark.parametrize("name", ["Linear", "GVP"])
def test_loss_is_the_peers(name):
    g = PATHS
    loss = flow_matching_loss(
        lambda x, t: g[f"pred.{name}"], g["x0"], g["x1"], g["t"], g["t"], INTERPOLANTS[name.lower()]
    )
    close(loss, g[f"loss.{name}"], 1e-6)


def test_loss_feeds_m_tells_t_and_aims_at_t():
    noise, data = torch.randn(2, 4, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    t, m = torch.tensor([0.3, 0.5, 0.9, 1.0]), torch.tensor([0.1, 0.5, 0.2, 0.7])
    seen = {}

    def network(x, t):
        seen.update(x=x, t=t)
        return torch.zeros_like(x).bfloat16()

    loss = flow_matching_loss(network, noise, data, t, m, GVP())
    assert torch.equal(seen["x"], GVP().interpolate(noise, data, m))
    assert torch.equal(seen["t"], t)
    assert loss.dtype == torch.float32
    close(loss, GVP().velocity(noise, data, t).square().mean(dim=(1, 2, 3)), 1e-6)


def test_weight_2t_with_uniform_t_has_the_gradient_of_beta():
    """E[2t g(t)] over U[0,1] is E[g(t)] over Beta(2,1): both integrals by the midpoint rule, same noise and data."""
    nodes, pairs = 4000, 8
    u = ((torch.arange(nodes, dtype=torch.float64) + 0.5) / nodes).repeat_interleave(pairs)
    noise, data = torch.randn(2, pairs, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    noise, data = noise.repeat(nodes, 1), data.repeat(nodes, 1)

    def gradient(law, weight):
        theta = torch.tensor([0.3, -0.7, 0.2], dtype=torch.float64, requires_grad=True)

        def network(x, t):
            return theta[0] + theta[1] * x + theta[2] * t[:, None] * x

        t, m = time_pair(u.expand(3, -1), law)
        loss = flow_matching_loss(network, noise, data, t, m, Linear())
        (loss.double() * weight(t)).mean().backward()
        return theta.grad

    weighted = gradient("uniform", lambda t: 2 * t.double())
    torch.testing.assert_close(weighted, gradient("beta", torch.ones_like), rtol=1e-4, atol=1e-5)
    assert (gradient("uniform", torch.ones_like) - weighted).abs().max() > 0.01
