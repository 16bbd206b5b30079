"""The Inception network against torch-fidelity's, and distances to few rows of features."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from mixflow.evaluation import (
    Inception,
    frechet_distance,
    frechet_distance_to,
    inception,
    load_inception,
    moments,
    tiny_inception_state_dict,
)
from mixflow.runtime.errors import UserError

GOLDEN = Path(__file__).parents[1] / "golden" / "eval"
DIVISOR = 32


@pytest.fixture(scope="module")
def tiny():
    return tiny_inception_state_dict(seed=1, width_divisor=DIVISOR)


@pytest.fixture(scope="module")
def network(tiny):
    return Inception(tiny)


def noise_images(n, size=40, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, size, size, 3), dtype=np.uint8)


def cut(module, weights):
    """Give a network of the real widths the narrower layers of `weights`."""
    for name, tensor in weights.items():
        owner, leaf = module.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
        setattr(
            owner, leaf, torch.nn.Parameter(tensor) if isinstance(getattr(owner, leaf), torch.nn.Parameter) else tensor
        )


def torch_fidelity_network(state_dict, path):
    """torch-fidelity's network with its layers cut to the widths of `state_dict`."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class Cut(FeatureExtractorInceptionV3):
        def load_state_dict(self, weights):
            self.shapes = {name: tuple(tensor.shape) for name, tensor in self.state_dict().items()}
            cut(self, weights)

    torch.save(state_dict, path)
    peer = Cut("inception", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(path))
    peer.seen = []
    peer.Mixed_6d.branch1x1.register_forward_hook(lambda module, inputs, output: peer.seen.append(output))
    return peer


@torch.inference_mode()
def peer_features(peer, images):
    """Pool, spatial features and logits as torch-fidelity's network makes them."""
    pool, logits = peer(torch.from_numpy(images).permute(0, 3, 1, 2))
    return pool, peer.seen.pop()[:, :7].permute(0, 2, 3, 1).flatten(start_dim=1), logits


@pytest.fixture(scope="module")
def peer(tiny, tmp_path_factory):
    return torch_fidelity_network(tiny, tmp_path_factory.mktemp("peer") / "weights.pth")


@pytest.mark.parametrize("size", [64, 256, 310])
def test_it_equals_torch_fidelitys(network, peer, size):
    images = noise_images(2, size, seed=size)
    features = network(images)
    assert [tuple(part.shape) for part in features] == [(2, network.num_features), (2, 2023), (2, 1008)]
    for ours, theirs in zip(features, peer_features(peer, images), strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5 * float(theirs.abs().max()))


@pytest.fixture(scope="module")
def steady():
    """Weights that magnify rounding little, as trained ones do: filters of sum zero, scales near one, no offsets."""
    generator = torch.Generator().manual_seed(3)
    weights = {}
    for name, tensor in tiny_inception_state_dict(seed=3, width_divisor=8).items():
        if name.endswith("conv.weight"):
            filters = torch.randn(tensor.shape, generator=generator)
            filters -= filters.mean(dim=(1, 2, 3), keepdim=True)
            tensor = filters * (2 / filters[0].numel()) ** 0.5
        elif name.endswith(("bn.weight", "running_var")):
            tensor = torch.rand(tensor.shape, generator=generator) + 0.5
        elif name.endswith(("bn.bias", "running_mean")):
            tensor = torch.zeros(tensor.shape)
        weights[name] = tensor
    return weights


@pytest.fixture(scope="module")
def two_sets(steady):
    """Images of 299 pixels, so that nobody resizes, coarse and fine; and our distance between the two sets."""
    rng = np.random.default_rng(7)
    sets = []
    for n, contrast in ((20, 256), (18, 160)):
        patches = rng.integers(0, contrast // 2, (n, 13, 13, 3), dtype=np.uint8).repeat(23, axis=1).repeat(23, axis=2)
        sets.append(patches + rng.integers(0, contrast // 2, patches.shape, dtype=np.uint8))
    network = Inception(steady)
    return sets, frechet_distance(*moments(network(sets[0])[0]), *moments(network(sets[1])[0]))


def test_fid_equals_torch_fidelitys(steady, two_sets, tmp_path):
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric

    peer = torch_fidelity_network(steady, tmp_path / "weights.pth")
    sets, ours = two_sets
    real, fake = (fid_features_to_statistics(peer_features(peer, images)[0]) for images in sets)
    assert ours == pytest.approx(fid_statistics_to_metric(real, fake, verbose=False)[KEY_METRIC_FID], rel=1e-6)


def test_fid_equals_pytorch_fids(steady, two_sets, monkeypatch):
    import scipy.linalg
    import torchvision
    from pytorch_fid import fid_score, inception

    def sqrtm(matrix, disp=True):  # takes the argument that SciPy 1.18 no longer takes
        root = scipy.linalg.sqrtm(matrix)
        return root if disp else (root, None)

    monkeypatch.setattr(inception, "load_state_dict_from_url", lambda url, progress: steady)
    monkeypatch.setattr(torchvision.models.Inception3, "load_state_dict", cut)
    monkeypatch.setattr(fid_score, "linalg", SimpleNamespace(sqrtm=sqrtm))
    peer = inception.InceptionV3().eval()
    sets, ours = two_sets
    statistics = []
    for images in sets:
        # Its command divides by 255, which stretches the values that the network of 2015 was trained with.
        with torch.inference_mode():
            (pool,) = peer(torch.from_numpy(images).permute(0, 3, 1, 2) / 256)
        pool = pool.flatten(start_dim=1).double().numpy()
        statistics += [np.mean(pool, axis=0), np.cov(pool, rowvar=False)]
    assert ours == pytest.approx(fid_score.calculate_frechet_distance(*statistics), rel=1e-6)


def test_it_is_as_exact_as_torch_fidelitys(tiny, network, peer, tmp_path):
    """Folded batch norms round differently, not worse: the yardstick is torch-fidelity's network in float64."""
    double = torch_fidelity_network(tiny, tmp_path / "weights.pth").double()
    double.feature_extractor_internal_dtype = torch.float64
    images = noise_images(2, 299)  # no resize, which would differ in float64
    for ours, theirs, exact in zip(
        network(images), peer_features(peer, images), peer_features(double, images), strict=True
    ):
        error, their_error = ((part - exact).norm() / exact.norm() for part in (ours, theirs))
        assert error < 5e-6
        assert error < 2 * their_error


def test_widths_and_names_of_the_real_file_are_torch_fidelitys(peer):
    shapes = {name: tuple(tensor.shape) for name, tensor in tiny_inception_state_dict(0, width_divisor=1).items()}
    assert shapes == {name: shape for name, shape in peer.shapes.items() if "num_batches" not in name}


def test_pools_and_the_spatial_layout_are_tensorflows():
    golden = {name: torch.from_numpy(x) for name, x in np.load(GOLDEN / "pooling_and_spatial_layout.npz").items()}
    x = golden["x_nhwc"].permute(0, 3, 1, 2)
    for pool, name in (
        (inception._average, "avg3x3_same"),
        (inception._maximum, "max3x3_same"),
        (inception._shrink, "max3x3s2_valid"),
    ):
        torch.testing.assert_close(pool(x).permute(0, 2, 3, 1), golden[name], rtol=0, atol=1e-6)
    x = golden["spatial_nhwc_first16ch"].permute(0, 3, 1, 2)
    assert torch.equal(inception._spatial(x), golden["spatial_flat"])


def test_stand_ins_are_alive_and_follow_their_seed(tiny, network):
    images = noise_images(8, 64)
    pool, spatial, logits = network(images)
    assert (pool.std(dim=0) > 0).all()
    assert 0.05 < float(pool.std()) < 100
    assert (spatial.std(dim=0) > 0).any()
    assert torch.isfinite(logits).all()
    again, other = (tiny_inception_state_dict(seed, DIVISOR) for seed in (1, 2))
    assert all(torch.equal(tiny[name], again[name]) for name in tiny)
    assert not torch.equal(tiny["fc.weight"], other["fc.weight"])


@pytest.fixture
def precision_settings():
    """The settings that a test may change, as (of convolutions, of products)."""
    cudnn, product = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.allow_tf32, product.allow_tf32
    yield cudnn.conv, product
    cudnn.allow_tf32, product.allow_tf32 = before


@pytest.mark.parametrize("tf32", [False, True])
@pytest.mark.parametrize("others", [False, True])
def test_tf32_is_used_only_when_asked_and_settings_stay_as_they_were(tiny, precision_settings, tf32, others):
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = others
    before = [operation.fp32_precision for operation in precision_settings]
    seen = []

    class Watched(Inception):
        def _forward(self, x):
            seen.append([operation.fp32_precision for operation in precision_settings])
            return super()._forward(x)

    network = Watched(tiny, tf32=tf32)
    network(noise_images(1))
    assert network.tf32 == tf32
    assert seen[-1] == ["tf32" if tf32 else "ieee"] * 2
    assert [operation.fp32_precision for operation in precision_settings] == before
    assert (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32) == (others, others)


def test_precisions_set_one_by_one_do_not_stop_it(network, precision_settings):
    """They make `allow_tf32` unreadable."""
    torch.backends.cudnn.conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision = "ieee", "tf32"
    network(noise_images(1))
    assert [operation.fp32_precision for operation in precision_settings] == ["ieee", "tf32"]


def test_tf32_changes_nothing_on_a_cpu(tiny, network):
    images = noise_images(2)
    assert all(torch.equal(*parts) for parts in zip(network(images), Inception(tiny, tf32=True)(images), strict=True))


@pytest.mark.parametrize("size", [40, 299])
def test_features_do_not_depend_on_the_batch(network, size):
    images = noise_images(9, size)
    whole = network(images)
    before = images.copy()
    parts = [network(part) for part in (images[:1], images[1:4], images[4:])]
    for i, expected in enumerate(whole):
        part = torch.cat([features[i] for features in parts])
        torch.testing.assert_close(part, expected, rtol=0, atol=2e-6 * float(expected.abs().max()))
    assert np.array_equal(images, before)


def test_a_weights_file_is_read_without_running_code(tiny, tmp_path):
    torch.save(tiny, tmp_path / "good.pth")
    assert load_inception(tmp_path / "good.pth").num_features > 0
    marker = tmp_path / "ran"

    class Evil:
        def __reduce__(self):
            return Path.touch, (marker,)

    torch.save({"fc.weight": Evil()}, tmp_path / "evil.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "good.pth").read_bytes()[:1000])
    torch.save([1], tmp_path / "list.pth")
    torch.save({name: tensor for name, tensor in tiny.items() if "6d" not in name}, tmp_path / "part.pth")
    torch.save(tiny | {"Mixed_5b.branch1x1.conv.weight": torch.zeros(3, 5, 1, 1)}, tmp_path / "shape.pth")
    torch.save(tiny | {"fc.weight": torch.zeros(1008, 5)}, tmp_path / "classes.pth")
    for name, text in {
        "evil": "is truncated or is no plain state dict",
        "cut": "is truncated or is no plain state dict",
        "list": "holds a list",
        "part": "'Mixed_6d.branch1x1.conv.weight' and 49 more are missing",
        "shape": "make no Inception network",
        "classes": "make no Inception network",
        "none": "does not exist",
    }.items():
        with pytest.raises(UserError, match=text):
            load_inception(tmp_path / f"{name}.pth")
    assert not marker.exists()


@pytest.mark.parametrize("n", [2, 20, 40, 41, 90])
@pytest.mark.parametrize("rank", [10, 40])
def test_the_distance_to_few_rows_equals_that_of_their_moments(n, rank):
    rng = np.random.default_rng(n)
    mix = rng.normal(size=(rank, 40))
    mu, sigma = moments(rng.normal(size=(300, rank)) @ mix)
    features = rng.normal(size=(n, rank)) @ mix * 1.3 + 0.2
    expected = frechet_distance(mu, sigma, *moments(features))
    assert frechet_distance_to(mu, sigma, features) == pytest.approx(expected, rel=1e-6)


def test_the_distance_to_few_rows_is_checked():
    mu, sigma = moments(np.random.default_rng(0).normal(size=(50, 8)))
    with pytest.raises(UserError, match="sigma1 has shape"):
        frechet_distance_to(mu, sigma[:7, :7], np.zeros((3, 8)))
    with pytest.raises(UserError, match="at least 2 images"):
        frechet_distance_to(mu, sigma, np.zeros((1, 8)))
    with pytest.raises(UserError, match="row 1 of features holds NaN"):
        frechet_distance_to(mu, sigma, np.full((2, 8), [[0.0], [np.nan]]))


def test_evaluating_starts_light():
    """Some fifty processes of a rehearsal evaluate a few images: torch is all they may wait for."""
    heavy = ["torchvision", "torch_fidelity", "diffusers", "timm", "sklearn", "scipy", "sympy", "accelerate"]
    code = (
        "import sys, numpy as np, mixflow.stages.evaluate\n"
        "from mixflow.evaluation import Inception, tiny_inception_state_dict\n"
        "Inception(tiny_inception_state_dict(0, 64))(np.zeros((1, 8, 8, 3), np.uint8))\n"
        f"print([name for name in {heavy} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
