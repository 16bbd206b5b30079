"""Statistics files of others: ADM's and EDM2's layouts, what is refused, and that nothing in a pickle runs."""

import contextlib
import os
import pickle
import re
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from mixflow.evaluation.statistics import has_images, has_statistics, read_statistics
from mixflow.runtime.errors import UserError


def gaussian(d, seed=0):
    points = np.random.default_rng(seed).normal(size=(3 * d, d)) + 1
    return points.mean(axis=0), np.cov(points, rowvar=False)


def save_npz(path, **arrays):
    np.savez(path, **arrays)
    return path


def adm(**changes):
    (mu, sigma), (mu_s, sigma_s) = gaussian(6), gaussian(5, seed=1)
    return {"mu": mu, "sigma": sigma, "mu_s": mu_s, "sigma_s": sigma_s} | changes


def edm2(dtype=np.float64):
    """What EDM2's calculate_metrics.py pickles: the number of images, and two arrays for each metric."""
    entries = {metric: gaussian(d, seed) for seed, (metric, d) in enumerate({"fid": 6, "fd_dinov2": 4}.items())}
    statistics = {name: {"mu": mu.astype(dtype), "sigma": sigma.astype(dtype)} for name, (mu, sigma) in entries.items()}
    return {"num_images": 1281167, **statistics}


def other_numpy(data, old, new):
    """A pickle as a NumPy with other module names writes it: opcodes of length, and frames, which need not be there."""
    if data[1] < 4:
        return data.replace(old, new)
    assert data[2:3] == b"\x95"
    return data[:2] + data[11:].replace(struct.pack("B", len(old)) + old, struct.pack("B", len(new)) + new)


def same(found, expected):
    assert all(x.dtype == torch.float64 and x.is_contiguous() for x in found)
    assert all(np.array_equal(x.numpy(), y) for x, y in zip(found, expected, strict=True))


# --- .npz


@pytest.mark.parametrize("compressed", [False, True])
def test_statistics_of_adms_layout(tmp_path, compressed):
    arrays = adm(arr_0=np.zeros((2, 4, 4, 3), np.uint8), mu_clip=np.zeros(3), sigma_clip=np.zeros((3, 3)))
    (np.savez_compressed if compressed else np.savez)(tmp_path / "ref.npz", **arrays)
    found = read_statistics(tmp_path / "ref.npz", "inception")
    assert list(found) == ["pool", "spatial"]
    same(found["pool"], (arrays["mu"], arrays["sigma"]))
    same(found["spatial"], (arrays["mu_s"], arrays["sigma_s"]))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_any_float_becomes_float64(tmp_path, dtype):
    mu, sigma = (x.astype(dtype) for x in gaussian(6))
    path = save_npz(tmp_path / "ref.npz", mu=mu, sigma=np.asfortranarray(sigma))
    same(read_statistics(path, "inception")["pool"], (mu.astype(np.float64), sigma.astype(np.float64)))


def test_files_without_spatial_statistics_give_the_others(tmp_path):
    mu, sigma = gaussian(6)
    path = save_npz(tmp_path / "ref.npz", mu=mu, sigma=sigma)
    assert list(read_statistics(path, "inception")) == ["pool"]
    same(read_statistics(path, "dinov2")["class"], (mu, sigma))


def test_what_an_npz_holds_is_told_from_its_directory(tmp_path):
    images = {"arr_0": np.zeros((2, 4, 4, 3), np.uint8)}
    cases = {"both": adm() | images, "statistics": adm(), "images": images}
    for name, arrays in cases.items():
        path = save_npz(tmp_path / f"{name}.npz", **arrays)
        assert (has_statistics(path), has_images(path)) == (name != "images", name != "statistics")
    (tmp_path / "garbled.npz").write_bytes(b"PK garbled")
    for name in ("garbled.npz", "absent.npz", "."):
        assert not has_statistics(tmp_path / name)
        assert not has_images(tmp_path / name)


def test_images_without_statistics_are_no_reference_by_mistake(tmp_path):
    path = save_npz(tmp_path / "images.npz", arr_0=np.zeros((2, 4, 4, 3), np.uint8))
    told = rf"holds images \(arr_0\) but no statistics \(mu, sigma\), and FID to these few images compares with no " \
        rf"published number: .* evaluate {re.escape(str(path))} --make-reference"  # fmt: skip
    with pytest.raises(UserError, match=told):
        read_statistics(path, "inception")


@pytest.mark.parametrize(
    ("left_out", "told"),
    [
        (
            ["mu"],
            r"lacks mu, which FID needs \(it holds sigma, mu_s, sigma_s\): give ADM's VIRTUAL_imagenet256_labeled",
        ),
        (["sigma_s"], r"lacks sigma_s, which sFID needs \(it holds mu, sigma, mu_s\)"),
        (["mu", "sigma", "mu_s", "sigma_s"], r"lacks mu and sigma, which FID needs \(it holds nothing\)"),
    ],
)
def test_what_an_npz_lacks_is_named(tmp_path, left_out, told):
    path = save_npz(tmp_path / "ref.npz", **{name: x for name, x in adm().items() if name not in left_out})
    with pytest.raises(UserError, match=told):
        read_statistics(path, "inception")


def nan(x):
    x = x.copy()
    x.flat[3] = np.nan
    return x


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            {"mu": np.ones(7)},
            r"mu and sigma of '.*' have shapes \[7\] and \[6, 6\] where \[d\] and \[d, d\] are wanted",
        ),
        ({"mu": np.ones((1, 6))}, r"have shapes \[1, 6\] and \[6, 6\]"),
        ({"mu": np.ones(0), "sigma": np.ones((0, 0))}, r"have shapes \[0\] and \[0, 0\]"),
        ({"sigma_s": np.ones(5)}, r"mu_s and sigma_s of '.*' have shapes \[5\] and \[5\]"),
        ({"mu": np.ones(6, dtype=int)}, r"mu of '.*' is int64, not an array of floats"),
        ({"mu": np.ones(6, dtype=complex)}, r"mu of '.*' is complex128, not an array of floats"),
        ({"mu": nan(np.ones(6))}, r"mu of '.*' holds NaN or infinity: fetch the file again"),
        ({"sigma": np.full((6, 6), np.inf)}, r"sigma of '.*' holds NaN or infinity"),
        ({"sigma": np.zeros((6, 6))}, r"sigma of '.*' holds nothing but zeros"),
        ({"mu_s": np.zeros(5)}, r"mu_s of '.*' holds nothing but zeros"),
        ({"sigma": np.triu(np.ones((6, 6)))}, r"sigma of '.*' is no covariance"),
        ({"sigma": -np.eye(6)}, r"sigma of '.*' is no covariance"),
        ({"mu": np.array([{}] * 6, dtype=object)}, r"cannot be read \(ValueError: Object arrays cannot be loaded"),
    ],
)
def test_numbers_that_are_no_mean_and_covariance(tmp_path, changes, told):
    with pytest.raises(UserError, match=told):
        read_statistics(save_npz(tmp_path / "ref.npz", **adm(**changes)), "inception")


def test_a_covariance_may_be_asymmetric_by_rounding(tmp_path):
    mu, sigma = gaussian(6)
    sigma = sigma * (1 + 1e-7 * np.random.default_rng(0).normal(size=sigma.shape))
    same(read_statistics(save_npz(tmp_path / "ref.npz", mu=mu, sigma=sigma), "inception")["pool"], (mu, sigma))


def test_damaged_files_are_told_as_such(tmp_path):
    whole = save_npz(tmp_path / "ref.npz", **adm()).read_bytes()
    with pytest.raises(UserError, match=r"'.*absent.npz' does not exist: fetch it first"):
        read_statistics(tmp_path / "absent.npz", "inception")
    with pytest.raises(UserError, match=r"the statistics in '.*' cannot be read \(IsADirectoryError"):
        read_statistics(tmp_path, "inception")
    for content in (b"", b"<html>not found</html>", b"\x93NUMPY"):
        (tmp_path / "other.npz").write_bytes(content)
        with pytest.raises(UserError, match=r"is neither an .npz nor a .pkl of statistics: give EDM2's img512.pkl"):
            read_statistics(tmp_path / "other.npz", "dinov2")
    middle = whole.index(b"sigma.npy") + 200
    for damaged in (whole[:300], whole[:-10], whole[:middle] + b"?" + whole[middle + 1 :]):
        (tmp_path / "damaged.npz").write_bytes(damaged)
        with pytest.raises(UserError, match=r"the statistics in '.*damaged.npz' cannot be read \(.*\): fetch the file"):
            read_statistics(tmp_path / "damaged.npz", "inception")


# --- EDM2's .pkl


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("core", [b"core", b"_core"], ids=["numpy1", "numpy2"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_statistics_of_edm2(tmp_path, protocol, core, dtype):
    expected = edm2(dtype)
    data = pickle.dumps(expected, protocol)
    for module in (b".multiarray", b".numeric"):
        for written in (b"numpy.core", b"numpy._core"):
            data = other_numpy(data, written + module, b"numpy." + core + module) if written + module in data else data
    assert (b"numpy." + core + b".") in data
    assert (b"numpy.core." in data) != (b"numpy._core." in data)
    path = tmp_path / "img512.pkl"
    path.write_bytes(data)
    for kind, feature, metric in (("inception", "pool", "fid"), ("dinov2", "class", "fd_dinov2")):
        found = read_statistics(path, kind)
        assert list(found) == [feature]
        same(found[feature], (expected[metric]["mu"], expected[metric]["sigma"]))


def test_arrays_in_other_orders(tmp_path):
    mu, sigma = gaussian(6)
    for order in (np.asfortranarray(sigma), np.repeat(np.repeat(sigma, 2, 0), 2, 1)[::2, ::2], sigma.astype(">f8")):
        for protocol in (2, 5):
            (tmp_path / "stats.pkl").write_bytes(pickle.dumps({"fid": {"mu": mu, "sigma": order}}, protocol))
            same(read_statistics(tmp_path / "stats.pkl", "inception")["pool"], (mu, sigma))


class Touch:
    """What a pickle can do to those who load it."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
@pytest.mark.parametrize(
    "make",
    [
        lambda marker: Touch(os.system, f"touch {marker}"),
        lambda marker: Touch(eval, f"__import__('pathlib').Path({marker!r}).touch()"),
        lambda marker: Touch(Path.touch, Path(marker)),
        lambda marker: Touch(np.save, marker, np.zeros(1)),
        lambda marker: {"fid": Touch(os.mkdir, marker)},
    ],
    ids=["system", "eval", "method", "numpy", "nested"],
)
def test_nothing_in_a_pickle_runs(tmp_path, make, protocol):
    marker = tmp_path / "marker"
    data = pickle.dumps(make(str(marker)), protocol)
    (tmp_path / "evil.pkl").write_bytes(data)
    with pytest.raises(
        UserError, match=r"evil.pkl' is (refused, for it names '.*', which may run code|neither an .npz)"
    ):
        read_statistics(tmp_path / "evil.pkl", "inception")
    assert not marker.exists()
    if make(str(marker)).__class__ is Touch:  # the test would notice
        pickle.loads(data)
        assert list(tmp_path.glob("marker*"))


def test_names_within_allowed_modules_are_refused(tmp_path):
    for module, name in [
        ("numpy", "load"),
        ("numpy", "ndarray.tofile"),
        ("_codecs", "lookup"),
        ("builtins", "getattr"),
    ]:
        data = (
            b"\x80\x04" + b"".join(b"\x8c" + struct.pack("B", len(x)) + x.encode() for x in (module, name)) + b"\x93."
        )
        (tmp_path / "evil.pkl").write_bytes(data)
        with pytest.raises(UserError, match=rf"names '{re.escape(f'{module}.{name}')}'"):
            read_statistics(tmp_path / "evil.pkl", "inception")
    data = b"\x80\x02c_codecs\nencode\nX\x01\x00\x00\x00aX\x03\x00\x00\x00zip\x86R."
    (tmp_path / "evil.pkl").write_bytes(data)
    with pytest.raises(UserError, match=r"cannot be read \(UnpicklingError: encoding 'zip'\)"):
        read_statistics(tmp_path / "evil.pkl", "inception")


def test_what_a_pickle_lacks_is_named(tmp_path):
    cases = {
        "dinov2": ({"fid": edm2()["fid"]}, r"lacks fd_dinov2.mu and fd_dinov2.sigma, which FD-DINOv2 needs \(it holds "
                   r"fid.mu, fid.sigma\): give EDM2's img512.pkl or its like"),
        "inception": ({"fid": {"mu": np.ones(2)}}, r"lacks fid.sigma, which FID needs \(it holds fid.mu\)"),
    }  # fmt: skip
    for kind, (payload, told) in cases.items():
        (tmp_path / "stats.pkl").write_bytes(pickle.dumps(payload))
        with pytest.raises(UserError, match=told):
            read_statistics(tmp_path / "stats.pkl", kind)
    for payload, told in [
        ([1, 2], r"holds a list where statistics by the name of their metric are wanted"),
        ({"fid": {"mu": [1.0, 2.0], "sigma": np.eye(2)}}, r"fid.mu of '.*' is a list, not an array of floats"),
        (
            {"fid": {"mu": np.ones(2), "sigma": np.eye(3)}},
            r"fid.mu and fid.sigma of '.*' have shapes \[2\] and \[3, 3\]",
        ),
    ]:
        (tmp_path / "stats.pkl").write_bytes(pickle.dumps(payload))
        with pytest.raises(UserError, match=told):
            read_statistics(tmp_path / "stats.pkl", "inception")


def test_damaged_pickles_are_told_as_such(tmp_path):
    whole = pickle.dumps(edm2())
    rng = np.random.default_rng(0)
    for stop in [1, 2, 20, *rng.integers(20, len(whole) - 1, size=30)]:
        (tmp_path / "cut.pkl").write_bytes(whole[:stop])
        with pytest.raises(
            UserError, match=r"the statistics in '.*cut.pkl' cannot be read \(.*\): fetch the file again"
        ):
            read_statistics(tmp_path / "cut.pkl", "inception")
    for _ in range(200):  # any bytes: a sentence, or other numbers, but no traceback
        noisy = bytearray(whole)
        for place in rng.integers(2, 200, size=2):
            noisy[place] = rng.integers(256)
        (tmp_path / "noisy.pkl").write_bytes(noisy)
        with contextlib.suppress(UserError):
            read_statistics(tmp_path / "noisy.pkl", "inception")
