"""The ImageNet folder: order, labels, what is missing, the peers' crop, and files of every kind."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file

from mixflow.autoencoders.quantise import quantise
from mixflow.data.imagenet import ImageNet, center_crop
from mixflow.data.images import read_ahead
from mixflow.runtime.errors import UserError

GOLDEN = load_file(Path(__file__).parents[1] / "golden" / "sit" / "images.safetensors")


def picture(seed, size=(40, 48), mode="RGB"):
    """A smooth random picture: JPEG keeps it nearly as it is."""
    noise = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC).convert(mode)


@pytest.fixture
def folder(tmp_path):
    """Three classes, written in an order that is not the sorted one."""
    seed = 0
    for name, count in (("n03", 2), ("n01", 3), ("n02", 4)):
        (tmp_path / "train" / name).mkdir(parents=True)
        for number in reversed(range(count)):
            picture(seed).save(tmp_path / "train" / name / f"{name}_{number}.JPEG")
            seed += 1
    return tmp_path


def test_classes_and_images_are_sorted_whatever_their_ending(folder):
    (folder / "train/n01/n01_0.JPEG").rename(folder / "train/n01/n01_0.jpg")
    (folder / "train/n01/n01_1.JPEG").rename(folder / "train/n01/n01_1.JpEg")
    (folder / "train/n01/n01_2.JPEG").unlink()
    picture(9).save(folder / "train/n01/n01_2.PNG")
    (folder / "train/n01/notes.txt").touch()
    (folder / "train/n01/._n01_0.jpg").touch()
    (folder / "train/synsets.txt").touch()
    images = ImageNet(folder, 32, 3, 9)
    assert images.names == [
        *("n01/n01_0.jpg", "n01/n01_1.JpEg", "n01/n01_2.PNG"),
        *(f"n02/n02_{number}.JPEG" for number in range(4)),
        *("n03/n03_0.JPEG", "n03/n03_1.JPEG"),
    ]
    assert images.labels.tolist() == [0, 0, 0, 1, 1, 1, 1, 2, 2]
    assert images.labels.dtype == images.indices.dtype == np.int64
    assert images.indices.tolist() == list(range(9))


def test_what_is_missing_is_said_at_once_and_together(folder):
    for file in (folder / "train/n02").iterdir():
        file.unlink()
    with pytest.raises(UserError) as error:
        ImageNet(folder, 32, 4, 9)
    message = str(error.value)
    assert "3 class folders instead of 4; 5 images instead of 9; no image in n02; fewest in n03 (2), n01 (3)" in message
    assert "unpack what is missing" in message
    for number in range(4):
        (folder / f"train/n02/{number}.png").touch()
    with pytest.raises(UserError, match="9 images instead of 8: remove what is too much"):
        ImageNet(folder, 32, 3, 8)
    with pytest.raises(UserError, match=r"elsewhere/train' cannot be listed .*set the dataset's folder"):
        ImageNet(folder / "elsewhere", 32, 3, 9)


def test_fingerprint_tells_names_and_labels(folder):
    before = [ImageNet(folder, 32, 3, 9).fingerprint(start, start + 3) for start in (0, 3, 6)]
    (folder / "train/n02/n02_3.JPEG").rename(folder / "train/n02/n02_9.JPEG")
    after = [ImageNet(folder, 32, 3, 9).fingerprint(start, start + 3) for start in (0, 3, 6)]
    assert [a == b for a, b in zip(before, after, strict=True)] == [True, True, False]


@pytest.mark.parametrize("key", [key for key in GOLDEN if ".out" in key])
def test_crop_equals_the_peers(key):
    number, size = key.split(".out")
    cropped = center_crop(Image.fromarray(GOLDEN[f"{number}.in"]), int(size))
    assert np.array_equal(cropped, GOLDEN[key])


@pytest.mark.parametrize(("to_uint8", "key"), [("round", "u8.sit"), ("truncate", "u8.repa")])
def test_grey_levels_equal_the_peers(to_uint8, key):
    levels = quantise(torch.from_numpy(GOLDEN["u8.x"]).reshape(1, 1, 1, -1), to_uint8)
    assert np.array_equal(levels[0, 0, :, 0].numpy(), GOLDEN[key])


def read(images, position):
    out = np.empty(images.shape, np.uint8)
    images.read(position, out)
    return out


@pytest.mark.parametrize("size", [(33, 40), (97, 151), (31, 20), (300, 32), (64, 64)])
def test_odd_sizes(folder, size):
    path = folder / "train/n01/n01_0.JPEG"
    picture(3, size).save(path)
    expected = center_crop(Image.open(path).convert("RGB"), 32)
    assert expected.shape == (32, 32, 3)
    assert np.array_equal(read(ImageNet(folder, 32, 3, 9), 0), expected)


@pytest.mark.parametrize(("mode", "ending"), [("L", "JPEG"), ("CMYK", "JPEG"), ("P", "png"), ("RGBA", "png")])
def test_every_kind_of_picture_becomes_rgb(folder, mode, ending):
    path = folder / "train/n01/n01_0.JPEG"
    path.unlink()
    path = path.with_suffix(f".{ending}")
    picture(3, mode=mode).save(path)
    assert Image.open(path).mode == mode
    found = read(ImageNet(folder, 32, 3, 9), 0)
    rgb = read_rgb(picture(3) if mode != "L" else picture(3, mode="L").convert("RGB"))
    assert np.abs(found.astype(int) - rgb).mean() < (12 if mode == "P" else 6)


def read_rgb(image):
    return center_crop(image, 32).astype(int)


def test_exif_rotation_is_not_applied(folder):
    """As in the peers: their loader does not look at EXIF either."""
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees
    path = folder / "train/n01/n01_0.JPEG"
    picture(3, (40, 56)).save(path)
    plain = read(ImageNet(folder, 32, 3, 9), 0)
    picture(3, (40, 56)).save(path, exif=exif)
    assert np.array_equal(read(ImageNet(folder, 32, 3, 9), 0), plain)


def test_reading_ahead_uses_two_buffers_and_names_every_broken_file(folder):
    for name, keep in (("n01/n01_1", 300), ("n02/n02_3", 0), ("n03/n03_1", 9)):
        path = folder / f"train/{name}.JPEG"
        path.write_bytes(path.read_bytes()[:keep])
    images = ImageNet(folder, 32, 3, 9)
    batches = [(images, range(start, min(start + 2, 9))) for start in range(0, 9, 2)]
    buffers = tuple(np.empty((2, 32, 32, 3), np.uint8) for _ in range(2))
    broken, used = {}, []
    for number, (pixels, unreadable) in enumerate(read_ahead(batches, buffers, 3)):
        assert len(pixels) == len(batches[number][1])
        used.append([np.shares_memory(pixels, buffer) for buffer in buffers])
        broken |= unreadable
        for row, position in enumerate(batches[number][1]):
            if images.name(position) not in unreadable:
                assert np.array_equal(pixels[row], read(images, position))
    assert used == [[True, False], [False, True]] * 2 + [[True, False]]
    assert sorted(Path(path).name for path in broken) == ["n01_1.JPEG", "n02_3.JPEG", "n03_1.JPEG"]
    assert "runcated" in broken[str(folder / "train/n01/n01_1.JPEG")]


def test_reading_is_one_batch_ahead_and_never_two(folder):
    class Counted(ImageNet):
        read_so_far = 0

        def read(self, position, out):
            super().read(position, out)
            Counted.read_so_far += 1

    images = Counted(folder, 32, 3, 9)
    batches = [(images, range(start, start + 3)) for start in (0, 3, 6)]
    buffers = tuple(np.empty((3, 32, 32, 3), np.uint8) for _ in range(2))
    reading = read_ahead(batches, buffers, 1)
    next(reading)
    reading.close()
    assert Counted.read_so_far <= 6
