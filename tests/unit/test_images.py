"""Images out of .npz files and folders: the same pixels from any of them, and a sentence for what cannot be used."""

import hashlib
import io
import os
import pickle
import re
import struct
import threading
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mixflow.evaluation.images import ImageArchive, ImageFolder, open_images, read_ahead
from mixflow.runtime.errors import UserError
from mixflow.runtime.npz import NpzWriter


def noise(n, height=8, width=6, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, height, width, 3), dtype=np.uint8)


def write_folder(folder, images, name="{}.png"):
    for i, image in enumerate(images):
        path = folder / name.format(i)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)


def raises(text):
    return pytest.raises(UserError, match=re.escape(text))


def assert_sentence(text):
    """One sentence: no second line, no full stop before the end, and a fix after the colon."""
    assert "\n" not in text
    assert ". " not in text
    assert not text.endswith(".")
    assert ": " in text


# --- the same pixels from everywhere


@pytest.fixture(
    params=["stored", "compressed", "folder", "ours", "float16", "float64", "int32", "big-endian", "npy-3.0"]
)
def source(request, tmp_path):
    """(path, images) of 11 images in every form that is read."""
    images, path, kind = noise(11), tmp_path / "a.npz", request.param
    if kind == "stored":
        np.savez(path, arr_1=np.arange(11), arr_0=images)
    elif kind == "compressed":
        np.savez_compressed(path, arr_1=np.arange(11), arr_0=images)
    elif kind == "folder":
        write_folder(tmp_path / "images", images)
        path = tmp_path / "images"
    elif kind == "ours":
        writer = NpzWriter(tmp_path, {"arr_0": (images.shape, np.uint8), "arr_1": ((11,), np.int64)})
        writer.create()
        writer.write(0, arr_0=images, arr_1=np.arange(11))
        writer.finish(path)
    elif kind == "npy-3.0":
        with zipfile.ZipFile(path, "w") as archive, archive.open("arr_0.npy", "w") as member:
            np.lib.format.write_array(member, images, version=(3, 0))
    else:
        np.savez(path, arr_0=images.astype({"big-endian": ">f4"}.get(kind, kind)))
    return path, images


def test_every_form_gives_the_same_pixels_in_any_pieces(source):
    path, images = source
    opened = open_images(path)
    assert opened.path == path
    assert (len(opened), opened.size) == (11, (8, 6))
    for start, stop in ((0, 4), (4, 8), (8, 11), (2, 3), (0, 11), (9, 10)):  # onwards, and back
        pixels = opened.read(start, stop)
        assert pixels.dtype == np.uint8
        assert pixels.flags.writeable
        assert pixels.flags.c_contiguous
        assert np.array_equal(pixels, images[start:stop])


def test_labels_are_one_integer_per_image(tmp_path):
    images = noise(3)
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "a.npz", arr_0=images, arr_1=np.array([5, 7, 9], np.uint16))
        opened = open_images(tmp_path / "a.npz")
        assert opened.labels.dtype == np.int64
        assert opened.labels.tolist() == [5, 7, 9]
        assert opened.notes == []
        assert np.array_equal(opened.read(0, 3), images)
    for labels in (np.ones(3), np.arange(4), np.eye(3, dtype=int)):
        np.savez(tmp_path / "a.npz", arr_0=images, arr_1=labels)
        opened = open_images(tmp_path / "a.npz")
        assert opened.labels is None
        (note,) = opened.notes
        assert f"arr_1 of '{tmp_path / 'a.npz'}' is {labels.dtype} {list(labels.shape)} and ignored" in note
    np.savez(tmp_path / "a.npz", arr_0=images)
    assert open_images(tmp_path / "a.npz").labels is None


def test_stored_statistics_and_other_types_are_noted(tmp_path):
    np.savez(tmp_path / "a.npz", arr_0=noise(2).astype(np.float32), mu=np.zeros(2048), other=np.ones(1))
    first, second = open_images(tmp_path / "a.npz").notes
    assert "is float32: it is read as uint8" in first
    assert "takes 4 times the disk: write uint8" in first
    assert "holds statistics (mu)" in second
    assert "here the images count" in second
    np.savez(tmp_path / "a.npz", arr_0=(noise(2) // 2).astype(np.int8))
    (note,) = open_images(tmp_path / "a.npz").notes
    assert "is int8" in note
    assert "the disk" not in note


def test_no_map_outlives_the_read_and_memory_does_not_grow(tmp_path):
    path = tmp_path / "large.npz"
    writer = NpzWriter(tmp_path, {"arr_0": ((600, 256, 256, 3), np.uint8)})  # 118 MB, nearly all of it a hole
    writer.create()
    np.save(tmp_path / "done.npy", np.ones(600, dtype=bool))
    writer.finish(path)
    opened = open_images(path)
    batch = 64 * 256 * 256 * 3

    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    before = resident()
    for start in range(0, 600, 64):
        pixels = opened.read(start, min(start + 64, 600))
        assert resident() - before < 3 * batch
        assert str(path) not in Path("/proc/self/maps").read_text()
    assert not pixels.any()


def test_sha256_of_files_and_folders(tmp_path):
    images = noise(2)
    np.savez(tmp_path / "a.npz", arr_0=images)
    assert open_images(tmp_path / "a.npz").sha256() == hashlib.sha256((tmp_path / "a.npz").read_bytes()).hexdigest()
    write_folder(tmp_path / "folder", images, "{}/x.png")
    lines = "".join(
        f"{hashlib.sha256((tmp_path / 'folder' / name).read_bytes()).hexdigest()}  {name}\n"
        for name in ("0/x.png", "1/x.png")
    )
    whole = open_images(tmp_path / "folder").sha256()
    assert whole == hashlib.sha256(lines.encode()).hexdigest()
    (tmp_path / "folder" / "0" / "x.png").rename(tmp_path / "folder" / "0" / "y.png")
    assert open_images(tmp_path / "folder").sha256() != whole


# --- archives that cannot be used


@pytest.mark.parametrize(
    ("values", "text"),
    [
        (np.linspace(-1, 1, 144), "image 3 of '{}' has float32 values from -1 to 1, as if -1 were black and 1 white: "),
        (np.linspace(-1, 1, 144), "write uint8, clamp(127.5 x + 128, 0, 255)"),
        (np.linspace(-1.3, 1.2, 144), "from -1.3 to 1.2, as if -1 were black"),
        (
            np.linspace(0, 1, 144),
            "from 0 to 1, as if 0 were black and 1 white: write uint8, clamp(255 x + 0.5, 0, 255)",
        ),
        (np.linspace(0, 255, 144), "from 0 to 255, not all of them whole numbers: write uint8, clamp(x + 0.5, 0, 255)"),
        (np.linspace(0, 300, 144), "from 0 to 300 where 0 to 255 is meant: scale or clamp"),
        (np.full(144, 256), "from 256 to 256 where 0 to 255 is meant"),
        (np.full(144, -1), "from -1 to -1, as if -1 were black"),
        (np.full(144, np.nan), "image 3 of '{}' holds NaN or infinity"),
        (np.r_[np.zeros(143), np.inf], "image 3 of '{}' holds NaN or infinity"),
    ],
)
def test_values_that_are_no_bytes_are_refused_where_they_are_read(tmp_path, values, text):
    images = noise(5).astype(np.float32)
    images[3] = values.reshape(8, 6, 3)
    np.savez(tmp_path / "a.npz", arr_0=images)
    opened = open_images(tmp_path / "a.npz")
    assert np.array_equal(opened.read(0, 3), images[:3])
    with raises(text.format(tmp_path / "a.npz")) as error:
        opened.read(2, 5)
    assert_sentence(str(error.value))


def test_whole_numbers_outside_of_bytes_do_not_wrap_around(tmp_path):
    for kind in ("int16", "uint16", "int64", "uint64", "float64"):
        for value in (256, 256 * 7 + 3, 2**15 - 1) + ((-1, -256) if kind[0] != "u" else ()):
            np.savez(tmp_path / "a.npz", arr_0=np.full((1, 2, 2, 3), value, kind))
            with raises(f"{kind} values from {float(value):g} to"):
                open_images(tmp_path / "a.npz").read(0, 1)


@pytest.mark.parametrize(
    ("array", "text"),
    [
        (
            noise(2).transpose(0, 3, 1, 2),
            "is uint8 [2, 3, 8, 6] where [N,H,W,3] in C order is needed: channels come last",
        ),
        (noise(2).transpose(0, 3, 1, 2), "write images.transpose(0, 2, 3, 1)"),
        (noise(2)[..., 0], "is uint8 [2, 8, 6] where [N,H,W,3] in C order is needed: grey images need three"),
        (noise(2)[..., :1], "grey images need three equal channels, so write numpy.repeat(images, 3, axis=3)"),
        (np.zeros((2, 8, 6, 4), np.uint8), "no room for an alpha channel"),
        (noise(1)[0], "a single image needs an axis in front"),
        (noise(2).reshape(2, -1), "is uint8 [2, 144] where"),
        (np.uint8(3), "is uint8 [] where"),
        (
            np.asfortranarray(noise(2)),
            "in Fortran order where [N,H,W,3] in C order is needed: write numpy.ascontiguous",
        ),
        (noise(0), "is uint8 [0, 8, 6, 3] and so holds no image"),
        (np.zeros((2, 0, 6, 3), np.uint8), "holds no image"),
        (noise(2) > 9, "is bool [2, 8, 6, 3], which are no pixels"),
        (noise(2).astype(complex), "is complex128 [2, 8, 6, 3], which are no pixels"),
        (noise(2).astype(np.longdouble), "which are no pixels"),
        (np.array(["a"]), "which are no pixels"),
        (np.array([{}, []], dtype=object), "is object [2], pickled Python objects, which are never loaded"),
    ],
)
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_arrays_of_another_layout_are_refused(tmp_path, save, array, text):
    save(tmp_path / "a.npz", arr_0=array)
    with raises(text) as error:
        open_images(tmp_path / "a.npz")
    assert_sentence(str(error.value))


class Marker:
    """Leaves a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_nothing_is_unpickled(tmp_path):
    marker = tmp_path / "marker"
    (tmp_path / "a.npz").write_bytes(pickle.dumps(Marker(marker)))
    with raises("is a Python pickle, which is never loaded"):
        open_images(tmp_path / "a.npz")
    np.savez(tmp_path / "a.npz", arr_0=np.array([Marker(marker)], dtype=object))
    with raises("pickled Python objects"):
        open_images(tmp_path / "a.npz")
    np.savez(tmp_path / "a.npz", arr_0=noise(1), arr_1=np.array([Marker(marker)], dtype=object))
    assert "is object [1] and ignored" in open_images(tmp_path / "a.npz").notes[0]
    np.save(tmp_path / "a.npy", np.array([Marker(marker)], dtype=object), allow_pickle=True)
    with raises("is a .npy file where an .npz is needed"):
        open_images(tmp_path / "a.npy")
    assert not marker.exists()


def test_files_that_are_no_archives_are_told_apart(tmp_path):
    path = tmp_path / "a.npz"
    np.save(tmp_path / "a.npy", noise(1))
    (tmp_path / "a.npy").rename(path)
    with raises("is a .npy file where an .npz is needed: write numpy.savez(path, arr_0=images)"):
        open_images(path)
    path.write_bytes(b"")
    with raises("is empty"):
        open_images(path)
    path.write_bytes(b"hello, this is no archive at all")
    with raises("is neither a folder of images nor an .npz file"):
        open_images(path)
    Image.fromarray(noise(1)[0]).save(tmp_path / "a.png")
    with raises("is a single image: name the folder"):
        open_images(tmp_path / "a.png")
    with raises("'nowhere.npz' does not exist: make it first, or correct the path"):
        open_images("nowhere.npz")
    np.savez(path, images=noise(1), labels=np.ones(1))
    with raises(
        "has no array arr_0, where ADM-style files keep their images (it holds images, labels): write numpy.savez"
    ):
        open_images(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(tmp_path / "a.png", "folder/a.png")
    with raises("is a zip file of images: unpack it and name the folder"):
        open_images(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("arr_0.npy", b"hello, this is no array at all")
    with raises("is cut off or damaged"):
        open_images(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("arr_0.npy", b"\x93NUMPY\x09\x00" + b" " * 100)
    with raises("version 9.0 of the .npy format"):
        open_images(path)


def test_members_shorter_than_their_header_says_are_refused(tmp_path):
    array = io.BytesIO()
    np.save(array, noise(4))
    for compression in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        with zipfile.ZipFile(tmp_path / "a.npz", "w", compression) as archive:
            archive.writestr("arr_0.npy", array.getvalue()[:-1])
        with raises("arr_0 has 703 bytes where its header says 704"):
            open_images(tmp_path / "a.npz")


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_cut_and_damaged_files_end_in_a_sentence(tmp_path, save):
    """Whatever is cut or overwritten: an error for users, or, where no checksum is looked at, images."""
    save(tmp_path / "a.npz", arr_0=noise(3), arr_1=np.arange(3))
    whole = (tmp_path / "a.npz").read_bytes()
    for length in range(1, len(whole) - 1, 7):
        (tmp_path / "b.npz").write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"is cut off or damaged|is neither a folder"):
            open_images(tmp_path / "b.npz")
    random = np.random.default_rng(0)
    refused = 0
    for _ in range(300):
        damaged = bytearray(whole)
        damaged[random.integers(len(whole))] ^= int(random.integers(1, 256))
        (tmp_path / "b.npz").write_bytes(damaged)
        try:
            opened = open_images(tmp_path / "b.npz")
            opened.read(0, len(opened))
        except UserError:
            refused += 1
    assert refused > (200 if save is np.savez_compressed else 20)


def test_a_compressed_file_damaged_inside_is_told_when_it_is_read(tmp_path):
    np.savez_compressed(tmp_path / "a.npz", arr_0=noise(50, 32, 32))
    whole = bytearray((tmp_path / "a.npz").read_bytes())
    whole[len(whole) // 2] ^= 255
    (tmp_path / "a.npz").write_bytes(whole)
    opened = open_images(tmp_path / "a.npz")
    opened.read(0, 5)
    with raises("is damaged"):
        opened.read(5, 50)


# --- folders


def test_folders_are_in_natural_order_without_hidden_files(tmp_path):
    names = ["9.png", "10.png", "x/2/a.PNG", "x/10/a.png", "y9/1.png", "y10/01.png", "y10/1.png", "y10/02.png"]
    images = dict(zip(names, noise(8), strict=True))
    for name in reversed(names):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(images[name]).save(tmp_path / name)
    for hidden in (".hidden.png", ".folder/1.png"):
        (tmp_path / hidden).parent.mkdir(exist_ok=True)
        (tmp_path / hidden).write_bytes(b"")
    (tmp_path / "notes.txt").write_text("no image")
    opened = open_images(tmp_path)
    assert isinstance(opened, ImageFolder)
    order = ["9.png", "10.png", "x/2/a.PNG", "x/10/a.png", "y9/1.png", "y10/01.png", "y10/1.png", "y10/02.png"]
    assert np.array_equal(opened.read(0, 8), [images[name] for name in order])
    assert opened.labels is None  # two lie in no folder
    assert opened.notes == []


def test_folders_inside_are_labels_where_every_image_lies_in_one(tmp_path):
    for name in ("n10/a", "n9/b", "n9/deep/c"):
        write_folder(tmp_path, noise(1), name + "{}.png")
    opened = open_images(tmp_path)
    assert opened.labels.tolist() == [0, 0, 1]
    assert opened.notes == [f"the 2 folders in '{tmp_path}' (n9 ... n10) are taken for the labels of its images"]
    assert open_images(tmp_path / "n9").labels is None
    write_folder(tmp_path / "one", noise(3), "images/{}.png")
    assert open_images(tmp_path / "one").labels is None
    assert open_images(tmp_path / "one").notes == []


def png(width, height, bits, colour, rows):
    """A PNG file by hand: Pillow writes no 16-bit colours."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">2I5B", width, height, bits, colour, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + row for row in rows))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def test_grey_palette_and_opaque_images_become_rgb(tmp_path):
    image = Image.fromarray(noise(1)[0])
    grey, palette = image.convert("L"), image.convert("P")
    images = [
        *((grey, grey), (palette, palette), (image.convert("1"), image.convert("1")), (image, image)),
        *((image.convert("RGBA"), image), (grey.convert("LA"), grey)),
    ]
    for i, (written, _) in enumerate(images):
        written.save(tmp_path / f"{i}.png")
    pixels = open_images(tmp_path).read(0, len(images))
    for found, (_, meant) in zip(pixels, images, strict=True):
        assert np.array_equal(found, np.asarray(meant.convert("RGB")))


def test_lossy_and_cmyk_images_are_read_as_pillow_does_and_noted(tmp_path):
    image = Image.fromarray(noise(1)[0])
    image.save(tmp_path / "0.png")
    image.save(tmp_path / "1.jpg")
    image.convert("CMYK").save(tmp_path / "2.jpeg")
    image.save(tmp_path / "3.webp", lossless=True)
    image.save(tmp_path / "4.bmp")
    opened = open_images(tmp_path)
    (note,) = opened.notes
    assert note.startswith(f"3 of the 5 images in '{tmp_path}' are JPEG or WebP")
    pixels = opened.read(0, 5)
    for found, name in zip(pixels, ("0.png", "1.jpg", "2.jpeg", "3.webp", "4.bmp"), strict=True):
        assert np.array_equal(found, np.asarray(Image.open(tmp_path / name).convert("RGB"))), name


def transparent_png(mode):
    image = Image.fromarray(noise(1)[0]).convert(mode)
    file, options = io.BytesIO(), {}
    if mode in ("P", "L", "RGB"):
        options = {"transparency": image.getpixel((2, 3))}
    else:
        image.putalpha(254)
    image.save(file, "PNG", **options)
    return file.getvalue()


UNUSABLE = {
    **{f"{mode} see-through": (transparent_png(mode), "are transparent") for mode in ("RGBA", "LA", "P", "L", "RGB")},
    "16-bit colours": (png(6, 8, 16, 2, [bytes(36)] * 8), "an image of 6x8 pixels with 16 bits per channel"),
    "16-bit grey": (png(6, 8, 16, 0, [bytes(12)] * 8), "with 16 bits per channel"),
    "taller": (png(6, 9, 8, 2, [bytes(18)] * 9), "of 6x9 pixels where '1.png' has 6x8: bring all to one size"),
    "turned": (png(8, 6, 8, 2, [bytes(24)] * 6), "an image of 8x6 pixels where '1.png' has 6x8"),
    "cut header": (png(6, 8, 8, 2, [bytes(18)] * 8)[:20], "cannot be read as an image"),
    "empty": (b"", "cannot be read as an image"),
    "text": (b"no image", "cannot be read as an image"),
    "PostScript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 6 8\n", "cannot be read as an image"),
}


@pytest.mark.parametrize(("data", "text"), UNUSABLE.values(), ids=UNUSABLE)
def test_unusable_images_are_named(tmp_path, data, text):
    write_folder(tmp_path, noise(4))
    (tmp_path / "0.png").unlink()
    (tmp_path / "2.png").write_bytes(data)
    opened = open_images(tmp_path)
    assert opened.read(0, 1).shape == (1, 8, 6, 3)
    with raises(text) as error:
        opened.read(0, 3)
    assert str(error.value).startswith(f"'{tmp_path / '2.png'}' ")
    assert_sentence(str(error.value))


@pytest.mark.parametrize("ending", ["png", "jpg", "webp", "bmp"])
def test_cut_images_are_named(tmp_path, ending):
    write_folder(tmp_path, noise(1, 40, 40), "0." + ending)
    whole = (tmp_path / f"0.{ending}").read_bytes()
    opened = open_images(tmp_path)
    for length in range(0, int(0.98 * len(whole)), 13):  # without the last bytes an image may still be whole
        (tmp_path / f"0.{ending}").write_bytes(whole[:length])
        with raises("cannot be read as an image"):
            opened.read(0, 1)


def test_images_that_vanish_are_named(tmp_path):
    write_folder(tmp_path, noise(2))
    opened = open_images(tmp_path)
    (tmp_path / "1.png").unlink()
    for use in (lambda: opened.read(0, 2), opened.sha256):
        with raises(f"'{tmp_path / '1.png'}' cannot be read as an image (No such file or directory): make it again"):
            use()
    (tmp_path / "0.png").write_bytes(b"")
    with raises(f"'{tmp_path / '0.png'}' cannot be read as an image"):
        open_images(tmp_path)


def test_folders_without_images_are_told(tmp_path):
    with raises(f"the folder '{tmp_path}' holds no image (.png, .jpg, .jpeg, .webp, .bmp): name the folder"):
        open_images(tmp_path)
    np.savez(tmp_path / "samples.npz", arr_0=noise(1))
    with raises("but 'samples.npz': name that file"):
        open_images(tmp_path)


def test_links_to_folders_are_followed_but_not_in_circles(tmp_path):
    write_folder(tmp_path / "real", noise(2))
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "linked").symlink_to(tmp_path / "real")
    assert len(open_images(tmp_path / "set")) == 2
    (tmp_path / "real" / "up").symlink_to(tmp_path / "real")
    with raises("is a link to a folder that it lies in: remove the link"):
        open_images(tmp_path / "real")


# --- reading ahead

SPANS = [(4, 8), (0, 4), (8, 11)]


def reader_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith(("read-images", "hash-images"))]


def test_reading_ahead_keeps_the_order_and_gives_the_facts(source):
    path, images = source
    batches = list(read_ahead(open_images(path), SPANS))
    assert [batch.start for batch in batches] == [4, 0, 8]
    for batch, (start, stop) in zip(batches, SPANS, strict=True):
        assert np.array_equal(batch.pixels, images[start:stop])
        expected = [hashlib.blake2b(image.tobytes(), digest_size=8).digest() for image in images[start:stop]]
        assert batch.digests.dtype == np.uint64
        assert batch.digests.tolist() == [int.from_bytes(digest, "little") for digest in expected]
        signed = images[start:stop].astype(np.int64)
        signed[signed > 127] -= 256
        assert (batch.low.dtype, batch.high.dtype) == (np.int8, np.int8)
        assert batch.low.tolist() == signed.min(axis=(1, 2, 3)).tolist()
        assert batch.high.tolist() == signed.max(axis=(1, 2, 3)).tolist()
    assert not reader_threads()
    assert list(read_ahead(open_images(path), [])) == []


class Counting:
    """Images that count how many batches have been read, and break at one."""

    def __init__(self, broken=None):
        self.reads, self.broken = [], broken

    def read(self, start, stop):
        if start == self.broken:
            raise UserError(f"image {start} is broken")
        self.reads.append(start)
        return noise(stop - start)


def test_few_batches_are_ahead_and_an_abandoned_reader_stops():
    images = Counting()
    batches = read_ahead(images, ((i, i + 2) for i in range(0, 2000, 2)))
    assert images.reads == []
    next(batches)
    next(batches)
    assert len(images.reads) <= 2 + 4
    batches.close()
    assert not reader_threads()
    assert len(images.reads) <= 2 + 4
    for _ in read_ahead(images, [(0, 1)] * 100):
        break  # letting go of the iterator closes it
    assert not reader_threads()


def test_errors_surface_where_their_batch_would_have_come():
    for broken in (0, 2, 8):
        batches = read_ahead(Counting(broken), [(i, i + 2) for i in range(0, 10, 2)])
        assert [next(batches).start for _ in range(broken // 2)] == list(range(0, broken, 2))
        with raises(f"image {broken} is broken"):
            next(batches)
        assert not reader_threads()


def test_reading_is_the_same_from_several_threads(tmp_path):
    images = noise(40)
    np.savez_compressed(tmp_path / "a.npz", arr_0=images)
    opened = ImageArchive(tmp_path / "a.npz")
    found = {}

    def read(first):
        for start in range(first, 40, 4):
            found[start] = opened.read(start, start + 1)

    threads = [threading.Thread(target=read, args=(first,)) for first in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert np.array_equal(np.concatenate([found[i] for i in range(40)]), images)
