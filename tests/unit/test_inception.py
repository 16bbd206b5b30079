"""The Inception network against torch-fidelity's, and the ADM metrics over files of images."""

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from mixflow.evaluation import (
    ImageArchive,
    Inception,
    adm_metrics,
    frechet_distance,
    frechet_distance_to,
    image_features,
    inception,
    inception_score,
    load_adm_reference,
    load_inception,
    make_adm_reference,
    moments,
    precision_recall,
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


def torch_fidelity_network(state_dict, path):
    """torch-fidelity's network with its layers cut to the widths of `state_dict`."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class Cut(FeatureExtractorInceptionV3):
        def load_state_dict(self, weights):
            self.shapes = {name: tuple(tensor.shape) for name, tensor in self.state_dict().items()}
            for name, tensor in weights.items():
                owner, leaf = self.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
                if isinstance(getattr(owner, leaf), torch.nn.Parameter):
                    tensor = torch.nn.Parameter(tensor)
                setattr(owner, leaf, tensor)

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


def test_tf32_settings_are_left_as_they_were(network):
    before = torch.backends.cudnn.allow_tf32
    network(noise_images(1))
    assert torch.backends.cudnn.allow_tf32 == before


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


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_images_of_an_archive_come_in_pieces(tmp_path, save):
    images = noise_images(11, 8)
    save(tmp_path / "a.npz", arr_1=np.arange(11), arr_0=images)
    archive = ImageArchive(tmp_path / "a.npz")
    assert len(archive) == 11
    assert archive.size == (8, 8)
    pieces = list(archive.batches(4))
    assert [len(piece) for piece in pieces] == [4, 4, 3]
    assert np.array_equal(np.concatenate(pieces), images)


def test_archives_without_usable_images_are_told(tmp_path):
    images = noise_images(3, 8)
    for name, array, text in (
        ("float", images / 255, r"is float64 \[3, 8, 8, 3\]"),
        ("grey", images[..., :1], r"is uint8 \[3, 8, 8, 1\]"),
        ("empty", images[:0], "at least one image"),
        ("objects", np.array([{}, {}], dtype=object), "is object"),
        ("fortran", np.asfortranarray(images), "in Fortran order"),
    ):
        np.savez(tmp_path / f"{name}.npz", arr_0=array)
        with pytest.raises(UserError, match=text):
            ImageArchive(tmp_path / f"{name}.npz")
    np.savez(tmp_path / "none.npz", images=images)
    with pytest.raises(UserError, match="has no array arr_0"):
        ImageArchive(tmp_path / "none.npz")
    (tmp_path / "cut.npz").write_bytes((tmp_path / "none.npz").read_bytes()[:100])
    with pytest.raises(UserError, match=r"is not a whole \.npz file"):
        ImageArchive(tmp_path / "cut.npz")
    with zipfile.ZipFile(tmp_path / "text.npz", "w") as archive:
        archive.writestr("arr_0.npy", b"hello, this is no array at all")
    with pytest.raises(UserError, match=r"is not a whole \.npz file"):
        ImageArchive(tmp_path / "text.npz")
    with pytest.raises(UserError, match="does not exist"):
        ImageArchive(tmp_path / "nowhere.npz")


def test_features_do_not_depend_on_how_they_are_batched(network, tmp_path):
    images = noise_images(70, 16)
    np.savez(tmp_path / "a.npz", arr_0=images)
    features = image_features(network, ImageArchive(tmp_path / "a.npz"))
    for part, expected in zip(features, network(images), strict=True):
        torch.testing.assert_close(part, expected, rtol=0, atol=2e-5 * float(expected.abs().max()))


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


@pytest.fixture(scope="module")
def published(network, tmp_path_factory):
    """A reference file as OpenAI publishes it: float32 means, float64 covariances, images, and keys beyond these."""
    images = noise_images(12, 40, seed=5)
    pool, spatial, _ = network(images)
    (mu, sigma), (mu_s, sigma_s) = moments(pool), moments(spatial)
    path = tmp_path_factory.mktemp("published") / "VIRTUAL.npz"
    statistics = {"mu": mu.float(), "sigma": sigma, "mu_s": mu_s.float(), "sigma_s": sigma_s}
    np.savez(path, arr_0=images, **{name: tensor.numpy() for name, tensor in statistics.items()}, mu_clip=np.zeros(2))
    return path


def test_a_published_reference_becomes_ours(network, published, tmp_path):
    assert make_adm_reference(published, network, "ab12", tmp_path / "reference.safetensors") == 12
    reference = load_adm_reference(tmp_path / "reference.safetensors")
    with np.load(published) as file:
        for name in ("mu", "sigma", "mu_s", "sigma_s"):
            assert getattr(reference, name).dtype == torch.float64
            assert np.array_equal(getattr(reference, name), file[name].astype(np.float64))
    assert torch.equal(reference.pool, network(noise_images(12, 40, seed=5))[0])
    assert reference.size == (40, 40)
    assert reference.extractor == "ab12"


def test_the_metrics_are_those_of_the_parts(network, published, tmp_path):
    make_adm_reference(published, network, "", tmp_path / "reference.safetensors")
    reference = load_adm_reference(tmp_path / "reference.safetensors")
    images = noise_images(9, 40, seed=6)
    np.savez(tmp_path / "samples.npz", arr_0=images)
    metrics = adm_metrics(reference, image_features(network, ImageArchive(tmp_path / "samples.npz")))
    pool, spatial, logits = network(images)
    assert list(metrics) == ["fid", "sfid", "is", "precision", "recall"]
    assert metrics["fid"] == pytest.approx(frechet_distance_to(reference.mu, reference.sigma, pool))
    assert metrics["sfid"] == pytest.approx(frechet_distance_to(reference.mu_s, reference.sigma_s, spatial))
    assert metrics["is"] == pytest.approx(inception_score(logits))
    assert (metrics["precision"], metrics["recall"]) == precision_recall(reference.pool, pool)
    same = adm_metrics(reference, image_features(network, ImageArchive(published)))
    assert same["fid"] == pytest.approx(0, abs=1e-3)  # float32 means in the reference
    assert (same["precision"], same["recall"]) == (1.0, 1.0)


def test_unusable_references_are_told(network, published, tmp_path):
    with np.load(published) as file:
        whole = dict(file)
    bad = {
        "images": ({"arr_0": whole["arr_0"]}, "lacks mu"),
        "shape": ({**whole, "sigma": whole["sigma"][:3, :3]}, r"sigma of .* has shape \[3, 3\] where"),
        "objects": ({**whole, "mu": np.array([{}], dtype=object)}, "cannot be read"),
        "nan": ({**whole, "mu_s": whole["mu_s"] * np.nan}, "mu_s of .* holds NaN"),
    }
    for name, (arrays, text) in bad.items():
        np.savez(tmp_path / f"{name}.npz", **arrays)
        with pytest.raises(UserError, match=text):
            make_adm_reference(tmp_path / f"{name}.npz", network, "", tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()
    save_file({"mu": torch.zeros(1)}, tmp_path / "other.safetensors", {"mixflow": json.dumps({"kind": "else"})})
    (tmp_path / "cut.safetensors").write_bytes(b"12345678")
    for name, text in (("other", "is no reference"), ("cut", "cannot be read"), ("nowhere", "does not exist")):
        with pytest.raises(UserError, match=text):
            load_adm_reference(tmp_path / f"{name}.safetensors")


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
