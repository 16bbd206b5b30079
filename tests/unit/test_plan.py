"""What targets need and cost, before anything runs."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mixflow.autoencoders.rae_decoder import Decoder
from mixflow.config import costs as networks
from mixflow.config import load_config
from mixflow.config.networks import network_flops
from mixflow.evaluation import Classifier
from mixflow.models import build_model
from mixflow.runtime import paths
from mixflow.runtime.errors import UserError
from mixflow.runtime.files import write_json
from mixflow.stages.costs import Cost, Machine, Rates, Works, wall_seconds
from mixflow.stages.jobs import Job
from mixflow.stages.plan import Plan, render

ROOT = Path(__file__).parents[2]
CONFIG = load_config(ROOT / "config.yaml")
REHEARSAL = load_config(ROOT / "config.yaml", ROOT / "rehearsal.yaml")
MACHINE = Machine(gpus=8, cores=2)
LAPTOP = Machine(gpus=0, cores=2)


def one_of_each_network(config):
    """Yield (name, options) of the checkpoints that are networks, of equal ones one."""
    networks = [name for name, checkpoint in config.checkpoints.items() if not checkpoint.exact]
    names = {repr(config.network_options(name)): name for name in networks}
    for name in names.values():
        yield name, config.network_options(name)


def flops_of(call) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


# --- parameters and FLOPs --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [CONFIG, REHEARSAL], ids=["config", "rehearsal"])
def test_counts_of_parameters_and_flops_are_those_of_the_networks(config) -> None:
    for name, options in one_of_each_network(config):
        with torch.device("meta"):
            network = build_model(**options).eval()
            size = options["input_size"]
            inputs = (
                torch.empty(1, options["in_channels"], size, size),
                torch.empty(1),
                torch.zeros(1, dtype=torch.int64),
            )
            alone = flops_of(lambda network=network, inputs=inputs: network(*inputs))
        assert config.num_parameters(name) == sum(parameter.numel() for parameter in network.parameters()), name
        assert config.flops(name) == network_flops(options) == alone, name
        if options["family"] == "repa":
            with torch.device("meta"):
                both = flops_of(lambda network=network, inputs=inputs: network(*inputs, with_projections=True))
            assert both - alone == config.checkpoints[name].origin.model.projector_flops(size)


def test_flops_on_a_cpu_where_attention_is_one_kernel() -> None:
    for name, options in one_of_each_network(REHEARSAL):
        size = options["input_size"]
        inputs = torch.randn(3, options["in_channels"], size, size), torch.rand(3), torch.zeros(3, dtype=torch.int64)
        network = build_model(**options).eval()
        assert flops_of(lambda network=network, inputs=inputs: network(*inputs)) == 3 * REHEARSAL.flops(name), name


def test_parameter_counts_as_published() -> None:
    published = {"sit-b2-256": 131e6, "sit-xl2-256": 675e6, "rae-dhxl-256": 839e6, "rae-dhs-256": 196e6}
    for name, count in published.items():
        assert CONFIG.num_parameters(name) == pytest.approx(count, rel=0.005)


def test_flops_of_released_autoencoders() -> None:
    from diffusers import AutoencoderKL
    from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

    with torch.device("meta"):
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4,
        )  # fmt: skip
        encoder = Dinov2WithRegistersModel(Dinov2WithRegistersConfig(image_size=518, patch_size=14))
        assert sum(parameter.numel() for parameter in vae.parameters()) == networks.SD_VAE_PARAMETERS
        count = sum(parameter.numel() for parameter in encoder.parameters())
        assert networks.dinov2_parameters(768) == pytest.approx(count, rel=1e-3)
        for latents in ("imagenet-256", "imagenet-512"):
            autoencoder, dataset = CONFIG.autoencoder_of(latents), CONFIG.dataset_of(latents)
            side = dataset.resolution
            image, latent = torch.empty(1, 3, side, side), torch.empty(1, 4, side // 8, side // 8)
            assert autoencoder.flops("encode", dataset) == flops_of(lambda image=image: vae.encode(image))
            assert autoencoder.flops("decode", dataset) == flops_of(lambda latent=latent: vae.decode(latent))
        for latents, side in (("imagenet-256-rae", 224), ("imagenet-512-rae", 448)):
            autoencoder, dataset = CONFIG.autoencoder_of(latents), CONFIG.dataset_of(latents)
            grid = side // 14
            decoder = Decoder(
                width=1152, depth=28, num_heads=16, mlp_width=4096, num_channels=768, grid=grid, patch_size=16
            )
            image, tokens = torch.empty(1, 3, side, side), torch.empty(1, grid**2, 768)
            assert autoencoder.flops("encode", dataset) == flops_of(lambda image=image: encoder(image))
            assert autoencoder.flops("decode", dataset) == flops_of(lambda tokens=tokens, net=decoder: net(tokens))
            numbers = sum(tensor.numel() for tensor in decoder.state_dict().values())
            assert autoencoder.file_bytes("decoder", dataset) == 4 * numbers


def test_flops_of_extractors(tmp_path: Path) -> None:
    import timm

    from mixflow.evaluation.inception import load_inception, tiny_inception_state_dict

    with torch.device("meta"):
        dinov2 = timm.create_model("vit_large_patch14_dinov2", img_size=224, num_classes=0)
        counted = flops_of(lambda: dinov2(torch.empty(1, 3, 224, 224)))
    assert CONFIG.extractors["dinov2-l"].flops(3, 256) == counted
    entry = CONFIG.extractors["digits-classifier"]
    classifier = Classifier(1, 10, width=entry.width, num_features=entry.num_features)
    counted = flops_of(lambda: classifier(torch.zeros(1, 1, 32, 32)))
    assert entry.flops(1, 32) == counted - 2 * entry.num_features * 10
    state = tiny_inception_state_dict(0, width_divisor=1)
    torch.save(state, tmp_path / "inception.pth")
    inception = load_inception(tmp_path / "inception.pth")
    counted = flops_of(lambda: inception(torch.zeros(1, 64, 64, 3, dtype=torch.uint8)))
    assert CONFIG.extractors["inception"].flops(3, 64) == counted
    assert CONFIG.extractors["inception"].num_parameters() == sum(tensor.numel() for tensor in state.values())


# --- jobs ------------------------------------------------------------------------------------------------------------


def test_the_plan_of_one_table() -> None:
    plan = Plan(CONFIG, ["imagenet512"])
    assert plan.names("train") == [("rae-dhxl-512-continued",), ("rae-dhxl-512-mixflow",)]
    assert plan.names("import_weights") == [("rae-dhs-512",), ("rae-dhxl-512",)]  # the guide too
    assert plan.latents() == {"imagenet-512-pixels": 1281167 * 3 * 512 * 512}
    assert plan.encoded_while_training() == ["imagenet-512-rae"]
    assert plan.samples() == 3 * 2 * 50_000 * (3 * 512 * 512 + 8)
    assert plan.resume_point() == 8 * 4 * CONFIG.num_parameters("rae-dhxl-512")
    text = render(plan, ["imagenet512"], MACHINE)
    assert "latents imagenet-512-pixels" in text
    assert "1.0 TB" in text
    assert "imagenet-512-rae are encoded while training, from imagenet-512-pixels" in text


def test_tables_share_their_jobs() -> None:
    one, other, both = (Plan(CONFIG, tables) for tables in (["main"], ["table4"], ["main", "table4"]))
    assert both.left == one.left | other.left
    assert len(both.left) < len(one.left) + len(other.left)


def test_what_is_needed_comes_first() -> None:
    jobs = Plan(CONFIG, ["paper"]).jobs
    seen = set()
    for job in jobs:
        assert seen >= set(jobs.needs[job])
        seen.add(job)


@pytest.mark.parametrize(
    ("target", "sentence"),
    [
        ("table9", "'table9' is not one of the tables in the config; did you mean"),
        ("results/nothing/at/all.json", "is no result of the pipeline: name a table"),
        ("results/samples/sit-xl2-256/heun251/samples.npz", "'heun251' is not one of the samplers"),
        ("results/tables/main/sit.json", "'sit' is not a row of table 'main'"),
        ("results/checkpoints/sit-xl2-256/weights.pt", "is no result of the pipeline"),
    ],
)
def test_an_unknown_target(target: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        Plan(CONFIG, [target])


def test_the_command_is_light() -> None:
    code = (
        "import sys, mixflow.stages.plan, mixflow.stages.where, mixflow.stages.status; "
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("table", [*CONFIG.tables, "paper"])
def test_every_table_is_planned_in_seconds(table: str, tmp_path: Path) -> None:
    start = time.perf_counter()
    text = render(Plan(CONFIG, [table], root=tmp_path), [table], MACHINE, tmp_path)
    assert time.perf_counter() - start < 5
    assert "wall time: about" in text


def test_the_command(mixflow) -> None:
    config = ["--config", ROOT / "config.yaml"]
    result = mixflow("plan", "table4", *config, "--tflops", "200", "--gpus", "16")
    assert result.returncode == 0, result.stderr
    assert "assumed are 200 TFLOP/s of a GPU in TF32, 400 in bf16, 50 in float32" in result.stdout
    assert "on 16 GPUs, 8 to a job" in result.stdout
    assert "no GPU is needed" in mixflow("plan", "digits", *config).stdout
    for flag, value in (("--gpus", "-1"), ("--cores", "0"), ("--tflops", "0")):
        result = mixflow("plan", "digits", *config, flag, value)
        assert result.returncode == 2
        assert f"{flag} {value}" in result.stderr


TABLES = [*CONFIG.paper_tables(), "other_metrics", "digits"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("targets", "rehearsal"),
    [
        (TABLES, False),
        (TABLES, True),
        (["paper"], False),
        (["digits_science"], False),
        (["results/tables/table4/sit-xl2-256.json"], False),
        (["results/samples/rae-dhxl-256-mixflow/rae-euler50-ag1.5/samples.npz"], False),
        (["results/samples/sit-b2-256-rollout/heun50-ts/samples.npz"], False),
        (["results/metrics/sit-xl2-256-mixflow/heun250-cfg1.5/dinov2-256/metrics.json"], False),
        (["results/checkpoints/repa-xl2-256-mixflow/model.safetensors"], True),
    ],
    ids=["config", "rehearsal", "paper", "science", "row", "samples", "clock", "further metrics", "weights"],
)
def test_it_counts_the_jobs_of_snakemake(tmp_path: Path, targets: list[str], rehearsal: bool) -> None:
    command = ["snakemake", "--dry-run", *targets, "--directory", str(tmp_path), "--cores", "1"]
    command += ["--configfile", "rehearsal.yaml"] if rehearsal else []
    answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    after = answer.split("Job stats:")[1].splitlines()[3:]
    counts = {line.split()[0]: int(line.split()[1]) for line in after[: after.index("")]}
    total = counts.pop("total")
    plan = Plan(REHEARSAL if rehearsal else CONFIG, targets)
    assert plan.counts() == counts
    assert len(plan.left) == total


# --- what is made already --------------------------------------------------------------------------------------------


def make(plan: Plan, root: Path, job: Job) -> None:
    """Put the files of a job there, as its run would leave them."""
    parents = {}
    for need in plan.jobs.needs[job]:
        file = plan.jobs.outputs(need)[0]
        parents[need.rule] = {"file": file, "sha256": f"of {file}"}
    outputs = plan.jobs.outputs(job)
    for output in outputs:
        (root / output).parent.mkdir(parents=True, exist_ok=True)
        (root / output).touch()
    write_json(
        root / paths.record(outputs[0]),
        {
            "settings": plan.jobs.settings(job),
            "parents": parents,
            "outputs": {Path(outputs[0]).name: f"of {outputs[0]}"},
        },
    )


def test_what_is_made_is_left_out(tmp_path: Path) -> None:
    target = "results/metrics/digits-mixflow-g0.8/euler5/metrics.json"
    every = Plan(CONFIG, [target])
    train, sample = Job("train", ("digits-mixflow-g0.8",)), Job("sample", ("digits-mixflow-g0.8", "euler5"))
    make(every, tmp_path, train)
    # What it was made from is not there, and not asked for.
    left = Plan(CONFIG, [target], root=tmp_path)
    assert every.left - left.left == {train, Job("train", ("digits-base",))}
    make(every, tmp_path, sample)
    assert sample not in Plan(CONFIG, [target], root=tmp_path).left
    for job in every.left:
        make(every, tmp_path, job)
    assert Plan(CONFIG, [target], root=tmp_path).left == set()
    text = render(Plan(CONFIG, [target], root=tmp_path), [target], LAPTOP, tmp_path)
    assert text == f"{target}: nothing to do, all 7 jobs are done"


def test_other_settings_and_other_parents_run_again(tmp_path: Path) -> None:
    target = "results/metrics/digits-mixflow-g0.8/euler5/metrics.json"
    every = Plan(CONFIG, [target])
    for job in every.left:
        make(every, tmp_path, job)
    record = tmp_path / "results/checkpoints/digits-mixflow-g0.8/run.json"
    told = json.loads(record.read_text())
    after = {Job("sample", ("digits-mixflow-g0.8", "euler5")), Job("evaluate", ("digits-mixflow-g0.8", "euler5"))}
    write_json(record, {**told, "outputs": {"model.safetensors": "trained anew"}})
    assert Plan(CONFIG, [target], root=tmp_path).left == after
    told["settings"]["train"]["gamma"] = 0.7
    write_json(record, told)
    assert Plan(CONFIG, [target], root=tmp_path).left == {Job("train", ("digits-mixflow-g0.8",)), *after}
    record.write_text("{")
    assert Job("train", ("digits-mixflow-g0.8",)) in Plan(CONFIG, [target], root=tmp_path).left


# --- time ------------------------------------------------------------------------------------------------------------


def test_training_takes_its_flops() -> None:
    works = Works(CONFIG)
    work = works.of(Job("train", ("sit-xl2-256-mixflow",)))
    assert work.images == 500_000 * 256
    assert work.flops == {"tf32": 3 * CONFIG.flops("sit-xl2-256")}
    cost = Rates(works, Machine(8, 16, 100.0), Path("/nonexistent")).cost(Job("train", ("sit-xl2-256-mixflow",)))
    assert cost.devices == 8
    assert cost.basis == "FLOPs"
    assert cost.seconds == pytest.approx(work.images * 3 * CONFIG.flops("sit-xl2-256") / 8e14, rel=1e-3)
    rollout = works.of(Job("train", ("sit-xl2-256-rollout",)))  # a step without gradient, and training where it ends
    assert rollout.flops == {"tf32": 7 * CONFIG.flops("sit-xl2-256")}
    rae = works.of(Job("train", ("rae-dhxl-256-mixflow",)))  # encodes in float32 as it goes
    assert rae.flops["fp32"] / rae.flops["tf32"] == pytest.approx(0.0486, rel=0.01)


def test_sampling_takes_its_calls() -> None:
    works = Works(CONFIG)
    network, decoder = CONFIG.flops("rae-dhxl-256"), 221_648_320_512
    work = works.of(Job("sample", ("rae-dhxl-256", "rae-euler50-ag1.5")))
    assert work.flops == {"tf32": 49 * (network + CONFIG.flops("rae-dhs-256")), "fp32": decoder}
    assert works.of(Job("sample", ("sit-xl2-256", "heun250"))).flops["tf32"] == 498 * CONFIG.flops("sit-xl2-256")
    assert not works.of(Job("sample", ("sit-xl2-256", "dopri5-cfg1.5"))).countable
    plain, shifted = (works.of(Job("sample", ("sit-b2-256", name))).flops for name in ("heun50", "heun50-ts"))
    assert shifted["tf32"] == plain["tf32"]
    read = CONFIG.samplers["heun50-ts"].clock_times
    assert shifted["fp32"] - plain["fp32"] == len(read) * CONFIG.clocks["imagenet-256"].flops(4, 32)
    assert len(read) == 2 * 34  # of 49 steps, those from and to k/49 in [0.01, 0.7]


def run_record(jobs, job: Job, images_per_second: float, device: str, processes: int = 1) -> dict:
    return {
        "settings": jobs.settings(job),
        "measured": {"images_this_attempt": 100, "images_per_second": images_per_second},
        "machine": {"devices": [device], "processes": processes},
        "started": "2026-01-01T00:00:00+00:00",
    }


def test_measured_rates_hold_for_the_same_network_and_device(tmp_path: Path) -> None:
    jobs = Plan(CONFIG, ["main"]).jobs
    done, other = Job("train", ("sit-xl2-256-mixflow",)), Job("train", ("sit-xl2-256-continued",))
    write_json(tmp_path / paths.record(paths.weights(done.names[0])), run_record(jobs, done, 1600.0, "H100", 8))
    rates = Rates(Works(CONFIG), MACHINE, tmp_path)
    cost = rates.cost(other)
    assert cost.basis == "measured"
    assert cost.seconds == pytest.approx(500_000 * 256 / 1600, rel=0.001)
    assert Rates(Works(CONFIG), Machine(4, 2), tmp_path).cost(other).seconds == pytest.approx(
        2 * cost.seconds, rel=0.001
    )
    assert rates.cost(Job("train", ("sit-b2-256-mixflow",))).basis == "FLOPs"
    # A run on a CPU says nothing about a GPU.
    write_json(tmp_path / paths.record(paths.weights(done.names[0])), run_record(jobs, done, 1.0, "cpu"))
    assert Rates(Works(CONFIG), MACHINE, tmp_path).cost(other).basis == "FLOPs"


def test_a_measured_sampler_tells_of_another_with_more_calls(tmp_path: Path) -> None:
    jobs = Plan(CONFIG, ["digits"]).jobs
    ten, fifty = (Job("sample", ("digits-base", sampler)) for sampler in ("euler10", "euler50"))
    write_json(tmp_path / paths.record(paths.samples(*ten.names)), run_record(jobs, ten, 100.0, "cpu"))
    rates = Rates(Works(CONFIG), LAPTOP, tmp_path)
    start = rates.cost(ten).seconds - 500 / 100
    assert rates.cost(fifty).seconds == pytest.approx(start + 5 * 500 / 100)


def test_jobs_wait_for_what_they_need_and_for_devices() -> None:
    a, b, c, d = (Job(name) for name in "abcd")
    needs = {a: (), b: (a,), c: (a,), d: (b, c)}
    cost = Cost(10.0, 0, 1, "FLOPs")
    costs = dict.fromkeys(needs, cost)
    assert wall_seconds(needs, set(needs), costs, Machine(0, 1)) == 40
    assert wall_seconds(needs, set(needs), costs, Machine(0, 2)) == 30
    assert wall_seconds(needs, {b, c}, costs, Machine(0, 2)) == 10
    costs[b] = costs[c] = Cost(10.0, 8, 1, "FLOPs")
    assert wall_seconds(needs, set(needs), costs, Machine(8, 2)) == 40
    assert wall_seconds(needs, set(needs), costs, Machine(16, 2)) == 30


def test_digits_as_measured() -> None:
    """The README's demo took 478 and 605 s on 2 cores."""
    plan = Plan(CONFIG, ["digits"])
    rates = Rates(Works(CONFIG), LAPTOP, Path("/nonexistent"))
    seconds = wall_seconds(plan.jobs.needs, plan.left, {job: rates.cost(job) for job in plan.left}, LAPTOP)
    assert 605 / 2 < seconds < 478 * 2


def test_downloads_and_their_sizes(tmp_path: Path) -> None:
    plan = Plan(CONFIG, ["imagenet512"])
    sizes = plan.downloads(tmp_path)
    assert sizes["rae-dhxl-512"] == 4 * CONFIG.num_parameters("rae-dhxl-512")
    assert sizes["adm-reference-512"] is None
    write_json(tmp_path / paths.download("adm-reference-512"), {"files": {"a": {"bytes": 5}, "b": {"bytes": 6}}})
    assert plan.downloads(tmp_path)["adm-reference-512"] == 11
    assert "VIRTUAL_imagenet512.npz): size unknown" in render(plan, ["imagenet512"], MACHINE)
