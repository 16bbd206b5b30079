"""ImageNet, SiT and REPA in rehearsal: stand-ins in the peers' file formats through the commands that a user calls."""

import itertools
import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from mixflow.runtime.files import file_sha256
from tests.conftest import ROOT
from tests.workflow.commands import CONFIG, kill_when_changed, run, sentence, two_processes

pytestmark = pytest.mark.slow

DOWNLOADS = ("sd-vae-ft-ema", "repa-xl2-256", "sit-xl2-256", "dinov2-b")
NUM_IMAGES = 60
CHECKPOINT, SAMPLER = "repa-xl2-256-mixflow", "repa-sde250-cfg1.8"


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Stand-ins, downloads and imported weights."""
    folder = tmp_path_factory.mktemp("prepared")
    run(folder, "make-stand-ins")
    for name in DOWNLOADS:
        run(folder, "download", name)
    run(folder, "import-weights", "repa-xl2-256")
    run(folder, "import-weights", "sit-xl2-256")
    return folder


@pytest.fixture
def copy(prepared, tmp_path):
    """A folder of its own with what `prepared` holds."""
    for part in ("stand-ins", "results"):
        subprocess.run(["cp", "-r", prepared / part, tmp_path / part], check=True)
    return tmp_path


STAGES = {
    # command, what to call a new state, the result
    "cache": (["cache-latents", "imagenet-256", "--batch", "4"], "results/latents/imagenet-256/train-*.safetensors"),
    "pixels": (["cache-latents", "imagenet-256-pixels", "--batch", "4"], None),
    "train": (["train", CHECKPOINT, "--save-every", "0", "--micro-batch", "4"], "scratch/train/*/*/resume.pt"),
    "sample": (["sample", CHECKPOINT, SAMPLER, "--batch", "4"], "scratch/sample/*/*/*/done.npy"),
}
RESULTS = (
    "results/latents/imagenet-256/index.json",
    f"results/checkpoints/{CHECKPOINT}/model.safetensors",
    f"results/samples/{CHECKPOINT}/{SAMPLER}/samples.npz",
)


def test_cache_train_and_sample_killed_twice_each_end_in_the_same_bytes(copy, tmp_path_factory):
    whole = tmp_path_factory.mktemp("whole")
    for part in ("stand-ins", "results"):
        subprocess.run(["cp", "-r", copy / part, whole / part], check=True)
    longer = copy / "longer.yaml"  # so that no command ends before it is killed
    more = {"checkpoints": {"repa-xl2-256-continued": {"train": {"num_steps": 30}}}}
    longer.write_text(yaml.safe_dump({**more, "samplers": {"heun250": {"num_images": NUM_IMAGES}}}))
    config = [*CONFIG, longer]
    kills = 0
    for arguments, pattern in STAGES.values():
        run(whole, *arguments, config=config)
        if pattern is not None:
            for _ in range(2):
                kill_when_changed(copy, pattern, arguments, config)
                kills += 1
        run(copy, *arguments, config=config)
    assert kills == 6
    assert [file_sha256(copy / name) for name in RESULTS] == [file_sha256(whole / name) for name in RESULTS]
    index = json.loads((whole / RESULTS[0]).read_text())
    assert sum(shard["count"] for shard in index["splits"]["train"]["shards"]) == 40
    record = json.loads((copy / "results/samples" / CHECKPOINT / SAMPLER / "run.json").read_text())
    assert record["measured"]["images"] == NUM_IMAGES
    assert record["measured"]["images_this_attempt"] < NUM_IMAGES


def test_two_processes_make_what_one_makes(copy, tmp_path_factory):
    """Shards byte by byte; weights trained with alignment, and images, up to the rounding of sums."""
    from safetensors.numpy import load_file

    other = tmp_path_factory.mktemp("two")
    for part in ("stand-ins", "results"):
        subprocess.run(["cp", "-r", copy / part, other / part], check=True)
    exact = copy / "exact.yaml"
    exact.write_text(yaml.safe_dump({"checkpoints": {"repa-xl2-256-continued": {"train": {"precision": "fp32"}}}}))
    config = [*CONFIG, exact]
    for arguments in (
        ["cache-latents", "imagenet-256"],
        ["cache-latents", "imagenet-256-pixels"],
        ["train", CHECKPOINT],
    ):
        run(copy, *arguments, config=config)
        two_processes(other, *arguments, config=config)
    assert file_sha256(copy / RESULTS[0]) == file_sha256(other / RESULTS[0])
    one, two = (load_file(folder / RESULTS[1]) for folder in (copy, other))
    assert max(abs(one[key] - two[key]).max() for key in one) < 1e-5
    weights = ["--weights", copy / RESULTS[1], "--batch", "5"]
    run(copy, "sample", CHECKPOINT, SAMPLER, *weights, config=config)
    two_processes(other, "sample", CHECKPOINT, SAMPLER, *weights, config=config)
    x, y = (np.load(folder / RESULTS[2])["arr_0"].astype(int) for folder in (copy, other))
    assert abs(x - y).max() <= 1
    assert (x != y).mean() < 0.01


def test_repas_protocol_from_file_to_pixels(copy):
    """REPA's SDE written anew in REPA's own time and float64, on the stored model that its code was run with.

    Reverse time t = 1 ... 0.04, 0: x' = x + ((2 - t) v + x) dt + sqrt(2 t |dt|) n, the last step without n; guidance
    1.8 on all channels for t <= 0.7; then the decoder, and grey levels cut.
    """
    import torch
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    from mixflow.models import load_model
    from mixflow.runtime.seeds import Stream, normal

    weights = ROOT / "tests/golden/repa/model_a.safetensors"
    sizes = {"hidden_size": 64, "depth": 4, "num_heads": 4, "patch_size": 2, "encoder_depth": 2, "z_dims": [32]}
    options = {"family": "repa", **sizes, "projector_dim": 96, "qk_norm": False, "label_dropout": 0.1}
    entry = {"file": str(weights), "latents": "imagenet-256", "interpolant": "linear", "model": options}
    steps, count, seed = 10, 5, 3
    overlay = copy / "golden.yaml"
    overlay.write_text(
        yaml.safe_dump(
            {
                "datasets": {"imagenet-256": {"num_classes": 1000}},
                "checkpoints": {"golden": {"weights": entry}},
                "samplers": {
                    "repa-sde250-cfg1.8": {"num_steps": steps, "num_images": count, "seed": seed},
                    "rae-euler50": {"num_images": 1000},  # a multiple of the classes
                },
            }
        )
    )
    config = [*CONFIG, overlay]
    run(copy, "import-weights", "golden", config=config)
    run(copy, "sample", "golden", SAMPLER, config=config)
    found = np.load(copy / f"results/samples/golden/{SAMPLER}/samples.npz")

    network, index, shape = load_model("repa", weights, num_heads=4, encoder_depth=2), torch.arange(count), (4, 8, 8)
    x = normal(seed, Stream.NOISE, 0, index, shape).double()
    times = [*torch.linspace(1, 0.04, steps, dtype=torch.float64).tolist(), 0.0]
    with torch.inference_mode():
        for k, (t, after) in enumerate(itertools.pairwise(times)):
            at = torch.full((count,), 1 - t)  # told in paper time, velocity turned around: the network's adapter

            def v(y, x=x, at=at):
                return -network(x.float(), at, y).double()

            velocity = v(index)
            if t <= 0.7:
                null = v(torch.full_like(index, 1000))
                velocity = null + 1.8 * (velocity - null)
            dt = after - t
            x = x + ((2 - t) * velocity + x) * dt
            if k < steps - 1:
                x = x + (2 * t * -dt) ** 0.5 * normal(seed, Stream.SOLVER, k, index, shape).double()
        vae = AutoencoderKL.from_pretrained(copy / "stand-ins/sd-vae").eval()
        pixels = vae.decode(x.float() / 0.18215).sample.permute(0, 2, 3, 1)
    expected = (255 * (pixels + 1) / 2).clamp(0, 255).to(torch.uint8).numpy()
    assert found["arr_1"].tolist() == index.tolist()
    difference = np.abs(found["arr_0"].astype(int) - expected)
    assert difference.max() <= 1
    assert (difference > 0).mean() < 1e-3
    assert expected.std() > 1


def test_alignment_trains_the_projectors_and_can_be_left_out(copy):
    from safetensors.numpy import load_file

    run(copy, "cache-latents", "imagenet-256")
    plain = copy / "plain.yaml"
    plain.write_text(yaml.safe_dump({"checkpoints": {CHECKPOINT: {"train": {"align": None}}}}))
    run(copy, "train", CHECKPOINT, "--out", "plain/model.safetensors", config=[*CONFIG, plain])  # needs no pixels
    run(copy, "cache-latents", "imagenet-256-pixels")
    run(copy, "train", CHECKPOINT)
    start = load_file(copy / "results/checkpoints/repa-xl2-256/model.safetensors")
    aligned = load_file(copy / f"results/checkpoints/{CHECKPOINT}/model.safetensors")
    without = load_file(copy / "plain/model.safetensors")
    projector = "projectors.0.4.weight"
    assert not np.array_equal(aligned[projector], start[projector])
    assert np.array_equal(without[projector], start[projector])
    qkv = "blocks.0.attn.qkv.weight"
    assert not np.array_equal(aligned[qkv], without[qkv])
    assert not np.array_equal(without[qkv], start[qkv])


# --- bad input: the sentence, and nothing lost ------------------------------------------------------------------------


def test_a_missing_class_and_truncated_images_are_all_named(copy):
    train = copy / "stand-ins/imagenet/train"
    (train / "n00000003").rename(copy / "aside")
    said = sentence(run(copy, "cache-latents", "imagenet-256", code=2))
    assert "9 class folders instead of 10" in said
    assert "36 images instead of 40" in said
    (copy / "aside").rename(train / "n00000003")

    broken = sorted(train.rglob("*.JPEG"))[::20]
    contents = [path.read_bytes() for path in broken]
    for path in broken:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    said = sentence(run(copy, "cache-latents", "imagenet-256", code=2))
    assert "2 of 40 images cannot be read" in said
    listed = (copy / "results/latents/imagenet-256/unreadable.txt").read_text()
    assert all(path.name in listed for path in broken)
    whole = {path: path.stat().st_mtime_ns for path in copy.glob("results/latents/imagenet-256/*.safetensors")}
    assert len(whole) == 1, "of three shards two hold a broken image"
    for path, content in zip(broken, contents, strict=True):
        path.write_bytes(content)
    run(copy, "cache-latents", "imagenet-256")
    assert all(path.stat().st_mtime_ns == time for path, time in whole.items())


def test_a_latent_cache_of_another_vae_or_resolution_is_refused(copy):
    run(copy, "cache-latents", "imagenet-256")
    other = copy / "other.yaml"
    other.write_text(yaml.safe_dump({"autoencoders": {"sd-vae-ft-ema": {"scale": 0.13025}}}))
    said = sentence(run(copy, "train", "sit-xl2-256-mixflow", config=[*CONFIG, other], code=2))
    assert "were made with autoencoder scale 0.18215, not 0.13025" in said
    run(copy, "cache-latents", "imagenet-512")
    said = sentence(
        run(copy, "train", "sit-xl2-256-mixflow", "--latents", "results/latents/imagenet-512/index.json", code=2)
    )
    assert "takes latents of shape [4, 8, 8]" in said


def test_weights_of_another_resolution_and_changed_downloads_are_refused(copy):
    other = copy / "other.yaml"
    other.write_text(yaml.safe_dump({"downloads": {"sit-xl2-256": {"files": ["SiT-XL-2-512.pt"]}}}))
    run(copy, "download", "sit-xl2-256", config=[*CONFIG, other])
    said = sentence(run(copy, "import-weights", "sit-xl2-256", config=[*CONFIG, other], code=2))
    assert "are made for latents of 16x16" in said
    run(copy, "download", "sit-xl2-256")
    with open(copy / "stand-ins/weights/SiT-XL-2-256.pt", "ab") as file:
        file.write(b"x")
    said = sentence(run(copy, "import-weights", "sit-xl2-256", code=2))
    assert "run the download again" in said


def test_labels_out_of_range_are_refused(copy):
    """A folder with more classes than the network knows."""
    run(copy, "cache-latents", "imagenet-256")
    index = copy / "results/latents/imagenet-256/index.json"
    content = json.loads(index.read_text())
    index.write_text(json.dumps({**content, "num_classes": 11}))
    said = sentence(run(copy, "train", "sit-xl2-256-mixflow", code=2))
    assert "knows 10 classes" in said


def test_the_stand_ins_are_what_they_claim(prepared):
    images = sorted((prepared / "stand-ins/imagenet/train").rglob("*.JPEG"))
    modes, sizes, rotated = set(), set(), 0
    for path in images:
        with Image.open(path) as image:
            modes.add(image.mode)
            sizes.add(image.size)
            rotated += image.getexif().get(0x0112) == 6
    assert modes == {"L", "RGB", "CMYK"}
    assert rotated == 1
    assert len(sizes) > 30


def test_a_folder_of_other_files_is_not_taken_for_stand_ins(tmp_path):
    (tmp_path / "stand-ins").mkdir()
    (tmp_path / "stand-ins/thesis.txt").write_text("years of work")
    said = sentence(run(tmp_path, "make-stand-ins", code=2))
    assert "holds other files" in said
    assert Path(tmp_path / "stand-ins/thesis.txt").exists()


def test_exported_weights_come_back(copy):
    """Ours -> the peer's format -> ours: the same tensors."""
    from safetensors.numpy import load_file

    from mixflow.models import read_state_dict

    for name in ("sit-xl2-256", "repa-xl2-256"):
        weights = f"results/checkpoints/{name}/model.safetensors"
        run(copy, "export-weights", weights, "--out", f"{name}.pt", config=[])
        ours, exported = load_file(copy / weights), read_state_dict(copy / f"{name}.pt")
        assert list(exported) == list(ours) or set(exported) == set(ours)
        assert all(np.array_equal(exported[key].numpy(), ours[key]) for key in ours)


def counts(result):
    """Jobs by rule, from the table of a dry run."""
    assert result.returncode == 0, result.stderr[-3000:]
    lines = result.stdout.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("job ")) + 2
    rows = [line.split() for line in lines[start:]]
    return {row[0]: int(row[1]) for row in rows[: rows.index([]) if [] in rows else None]}


def test_a_row_of_released_weights_trains_nothing(tmp_path, snakemake):
    target = "results/tables/table4/sit-xl2-256.json"
    needed = {
        "download": 4,
        "import_weights": 1,
        "make_reference": 1,
        "sample": 6,
        "evaluate": 6,
        "row": 1,
        "total": 19,
    }
    assert counts(snakemake(tmp_path, target, "--dry-run")) == needed
    rehearsed = counts(snakemake(tmp_path, target, "--dry-run", "--configfile", ROOT / "rehearsal.yaml"))
    assert rehearsed == {**needed, "stand_ins": 1, "total": 20}


def test_tables_share_what_they_have_in_common(tmp_path, snakemake):
    """main and table4 both want Heun with 250 steps; pixels and encoder are for REPA's alignment alone."""
    both = counts(snakemake(tmp_path, "main", "table4", "--dry-run"))
    alone = [counts(snakemake(tmp_path, table, "--dry-run")) for table in ("main", "table4")]
    assert both["sample"] == alone[0]["sample"] + alone[1]["sample"] - 12
    assert alone[1]["cache_latents"] == 2
    assert alone[0]["cache_latents"] == 3
