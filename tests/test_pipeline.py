"""The pipeline as its users meet it: saved and opened elsewhere, asked for images in every way, and asked wrongly."""

import json
import logging
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from PIL import Image
from safetensors.torch import load_file, save_file

from fpdm import DiT, FixedPointDiT, FixedPointDiTPipeline
from fpdm.diffusion import for_sampling, make_schedule
from fpdm.fixedpoint import Anderson, Picard
from fpdm.models.int8 import to_int8
from fpdm.sampling import REUSE, SCHEDULERS, SOLVERS, TunedPlan, cost_of, image_generators, initial_noise
from tests.networks import SIZES, randomised
from tests.pipelines import NAMES, make_pipeline


@pytest.fixture(scope="module")
def pipe():
    return make_pipeline()


def pixels(pipe, *args, **choices):
    return pipe(*args, **{"budget": 12, "output_type": "latent", **choices}).images


# Saved and opened in a new process


READER = """
import sys
import numpy as np
from fpdm import FixedPointDiTPipeline
for folder in sys.argv[1:]:
    pipe = FixedPointDiTPipeline.from_pretrained(folder)
    images = pipe(["owl", "cat"], budget=13, scheduler="ddpm", guidance_scale=2.0, seed=3, output_type="latent").images
    np.save(folder + "/images.npy", images.numpy())
    print(type(pipe.transformer).__name__, pipe.class_names)
"""


def test_a_saved_pipeline_draws_the_same_images_in_a_new_process(tmp_path):
    pipes = {"FixedPointDiT": make_pipeline(num_core=2), "DiT": make_pipeline(DiT, depth=3)}
    for name, pipe in pipes.items():
        pipe.save_pretrained(tmp_path / name)
    # It imports nothing but FixedPointDiTPipeline: the folder has to find the classes of its parts.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, "-c", READER, *(str(tmp_path / name) for name in pipes)],
        env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"{name} {NAMES}" for name in pipes]
    for name, pipe in pipes.items():
        images = pixels(pipe, ["owl", "cat"], budget=13, scheduler="ddpm", guidance_scale=2.0, seed=3)
        assert np.array_equal(np.load(tmp_path / name / "images.npy"), images.numpy())


def test_the_index_names_the_modules_of_the_parts(pipe, tmp_path):
    # Part of the file format: a module that moves leaves every saved model unreadable.
    pipe.save_pretrained(tmp_path)
    index = pipe.load_config(tmp_path)
    assert index["transformer"] == ["fpdm.models.fixed_point_dit", "FixedPointDiT"]
    assert index["scheduler"] == ["diffusers", "DDPMScheduler"]
    assert index["vae"] == [None, None]
    assert (tmp_path / "transformer" / "diffusion_pytorch_model.safetensors").is_file()


@pytest.mark.parametrize("size", [0, 7, 1000])
def test_truncated_weights_are_refused(pipe, tmp_path, size):
    pipe.save_pretrained(tmp_path)
    weights = tmp_path / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:size])
    with pytest.raises(OSError, match="Unable to load weights"):  # diffusers' own exception
        FixedPointDiTPipeline.from_pretrained(tmp_path)


def test_diffusers_has_nothing_to_say_about_a_folder_of_ours(tmp_path, caplog, monkeypatch):
    make_pipeline().save_pretrained(tmp_path)
    monkeypatch.setattr(logging.getLogger("diffusers"), "propagate", True)
    FixedPointDiTPipeline.from_pretrained(tmp_path)
    assert caplog.records == []


def test_a_folder_that_is_no_pipeline_is_refused(pipe, tmp_path):
    with pytest.raises(ValueError, match=r"it has no model_index\.json"):
        FixedPointDiTPipeline.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="there is no folder"):
        FixedPointDiTPipeline.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="there is no folder runs/nowhere"):
        FixedPointDiTPipeline.from_pretrained("runs/nowhere")


def test_names_mean_what_they_do_on_the_command_line(pipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pipe.save_pretrained("run/pipeline")
    assert FixedPointDiTPipeline.from_pretrained("run").class_names == NAMES
    (tmp_path / "fashion-mnist").mkdir()  # of data
    assert "sneaker" in FixedPointDiTPipeline.from_pretrained("fashion-mnist").class_names


def test_options_of_saving_reach_the_network(pipe, tmp_path):
    pipe.save_pretrained(tmp_path, variant="fp16")
    weights = [path.name for path in (tmp_path / "transformer").glob("*.safetensors")]
    assert weights == ["diffusion_pytorch_model.fp16.safetensors"]
    again = FixedPointDiTPipeline.from_pretrained(tmp_path, variant="fp16")
    assert torch.equal(pixels(again, 1, seed=2), pixels(pipe, 1, seed=2))


def test_a_network_in_8_bits_leaves_no_folder_behind(tmp_path):
    pipe = make_pipeline()
    to_int8(pipe.transformer)
    with pytest.raises(ValueError, match="a network in 8 bits cannot be saved"):
        pipe.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("class_names", [NAMES, None], ids=["names", "no names"])
def test_a_pipeline_on_the_hub_can_be_opened(class_names, tmp_path, monkeypatch):
    make_pipeline(class_names=class_names).save_pretrained(tmp_path)
    siblings = [
        SimpleNamespace(rfilename=path.relative_to(tmp_path).as_posix())
        for path in tmp_path.rglob("*")
        if path.is_file()
    ]
    hub = {
        "model_info": lambda *_, **__: SimpleNamespace(siblings=siblings, sha="0" * 40, pipeline_tag=None),
        "hf_hub_download": lambda _, name, **__: str(tmp_path / name),
        "snapshot_download": lambda *_, **__: str(tmp_path),
    }
    for module in ("diffusers.pipelines.pipeline_utils", "huggingface_hub", "fpdm.pipeline"):
        for name, stand_in in hub.items():
            monkeypatch.setattr(f"{module}.{name}", stand_in, raising=False)
    assert FixedPointDiTPipeline.from_pretrained("user/model").class_names == (class_names or [])


# What comes out


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB")])
def test_output_types(channels, mode):
    pipe = make_pipeline(in_channels=channels)
    results = {kind: pipe([0, 1], budget=12, seed=0, output_type=kind).images for kind in ("pil", "np", "pt", "latent")}
    assert all(image.mode == mode and image.size == (8, 8) for image in results["pil"])
    assert isinstance(results["pil"][0], Image.Image)
    assert results["np"].shape == (2, 8, 8, channels)
    assert results["pt"].shape == results["latent"].shape == (2, channels, 8, 8)
    torch.testing.assert_close(results["pt"], results["latent"] / 2 + 0.5)
    assert np.array_equal(results["np"].transpose(0, 3, 1, 2), results["pt"].numpy())
    arrays = np.stack([np.asarray(image).reshape(8, 8, channels) for image in results["pil"]])
    assert np.array_equal(arrays, (results["np"] * 255).round())
    assert results["latent"].std() > 0.1  # not all one value


def test_the_report_comes_along(pipe):
    output = pipe([0, 1], budget=13, num_inference_steps=3)
    assert (output.report.images, output.report.asked, output.report.spent) == (2, 13, 13)
    assert output.report.iterations == [2, 2, 3]
    images, report = pipe([0, 1], budget=13, num_inference_steps=3, return_dict=False)
    assert len(images) == 2
    assert report.spent == 13


def test_a_plan_is_told_before_anything_runs(pipe):
    choices = {"budget": 23, "allocation": "falling", "num_inference_steps": 4, "reuse": "linear"}
    plan = pipe.plan(**choices)
    report = pipe(**choices).report
    assert (report.planned, report.iterations) == (plan.planned, list(plan.iterations))


def test_classes_by_number_and_name(pipe):
    by_number = pixels(pipe, [2, 0], seed=0)
    assert torch.equal(pixels(pipe, ["owl", "cat"], seed=0), by_number)
    assert torch.equal(pixels(pipe, torch.tensor([2, 0]), seed=0), by_number)
    torch.testing.assert_close(pixels(pipe, "owl", seed=0), by_number[:1], atol=1e-4, rtol=0)
    assert not torch.allclose(pixels(pipe, [1, 0], seed=0)[0], by_number[0], atol=1e-3)
    assert not torch.allclose(pixels(pipe, None, 2, seed=0)[0], by_number[0], atol=1e-3)


def test_an_unconditional_model_draws_as_many_as_are_asked_for():
    pipe = make_pipeline(num_classes=0, class_names=None)
    assert pixels(pipe, num_images=5).shape == (5, 1, 8, 8)
    for text, choices in (("no classes", {"class_labels": 0}), ("unconditional", {"guidance_scale": 2.0})):
        with pytest.raises(ValueError, match=text):
            pipe(**choices)


def test_an_explicit_network_is_drawn_from_by_the_same_code():
    pipe = make_pipeline(DiT, depth=3)
    report = pipe(["dog"], budget=10).report
    assert (report.planned, report.iterations) == (9, [None] * 3)
    with pytest.raises(ValueError, match="no iterations"):
        pipe(["dog"], iterations=2)


# Chance


@pytest.mark.parametrize("scheduler", ["ddpm", "ddim"])
def test_one_generator_decides_and_moves_on(pipe, scheduler):
    def twice(seed):
        generator = torch.Generator().manual_seed(seed)
        return [pixels(pipe, [0, 1], generator=generator, scheduler=scheduler) for _ in range(2)]

    first, second = twice(4)
    assert all(torch.equal(a, b) for a, b in zip(twice(4), (first, second), strict=True))
    assert not torch.allclose(first, second, atol=1e-2)
    assert not torch.allclose(first, twice(5)[0], atol=1e-2)


def test_a_list_of_generators_is_one_per_image(pipe):
    def generators(*seeds):
        return [torch.Generator().manual_seed(seed) for seed in seeds]

    both = pixels(pipe, [0, 1], generator=generators(1, 2), scheduler="ddpm")
    alone = pixels(pipe, [1], generator=generators(2), scheduler="ddpm")
    torch.testing.assert_close(alone[0], both[1], atol=1e-4, rtol=0)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_image_i_of_a_seed_is_the_same_in_every_batch(pipe, scheduler):
    batch = pixels(pipe, [0, 1, 2, 0], seed=9, scheduler=scheduler)
    some = pixels(pipe, [0, 2], seed=9, image_indices=[3, 2], scheduler=scheduler)
    torch.testing.assert_close(some, batch[[3, 2]], atol=1e-4, rtol=0)
    assert not torch.allclose(batch[0], batch[3], atol=1e-2)


def test_indices_may_be_an_array(pipe):
    assert torch.equal(pixels(pipe, [0, 1], seed=9, image_indices=np.arange(2)), pixels(pipe, [0, 1], seed=9))


def test_without_a_seed_torchs_own_decides(pipe):
    with torch.random.fork_rng():
        outcomes = []
        for seed in (0, 0, 1):
            torch.manual_seed(seed)
            outcomes.append(pixels(pipe, [0]))
    assert torch.equal(outcomes[0], outcomes[1])
    assert not torch.equal(outcomes[0], outcomes[2])


def test_latents_take_the_place_of_the_noise_and_of_nothing_else(pipe):
    noise = initial_noise(pipe.transformer, image_generators(9, [0, 1]))
    for scheduler in ("ddim", "ddpm"):  # the later draws of ddpm do not move either
        given = pixels(pipe, [0, 1], seed=9, latents=noise, scheduler=scheduler)
        assert torch.equal(given, pixels(pipe, [0, 1], seed=9, scheduler=scheduler))
    assert not torch.equal(pixels(pipe, [0, 1], seed=9, latents=-noise), given)


# Callbacks, precision, other parts


def test_the_callback_sees_every_step_and_may_replace_the_latents(pipe):
    seen = []

    def callback(pipeline, index, timestep, tensors):
        assert pipeline is pipe
        seen.append((index, timestep))
        return {"latents": torch.full_like(tensors["latents"], 0.25)} if index == 2 else None

    output = pipe([0], num_inference_steps=3, output_type="latent", callback_on_step_end=callback)
    assert seen == list(enumerate(output.report.timesteps))
    assert (output.images == 0.25).all()
    handed = []
    pipe([0], num_inference_steps=1, callback_on_step_end=lambda *args: handed.append(args[-1]),
         callback_on_step_end_tensor_inputs=[])  # fmt: skip
    assert handed == [{}]


@pytest.mark.parametrize("choices", [{}, {"tolerance": 0.5}, {"guidance_scale": 2.0}], ids=str)
def test_an_interrupt_returns_what_there_is_and_reports_what_was_spent(choices, pipe):
    after = []

    def callback(pipeline, index, timestep, tensors):
        after.append(tensors["latents"])
        pipeline._interrupt = index == 1

    how = {"num_inference_steps": 4, "iterations": 2, "seed": 0, "output_type": "latent", **choices}
    whole = pipe([0, 1], **how).report
    output = pipe([0, 1], callback_on_step_end=callback, **how)
    assert len(after) == len(output.report.timesteps) == len(output.report.iterations) == 2
    assert torch.equal(output.images, after[-1])
    assert output.report.timesteps == whole.timesteps[:2]
    assert output.report.planned == 2 * (1 + 2 + 1)
    assert output.report.spent <= output.report.planned
    assert len(pipe([0, 1], **how).report.timesteps) == 4, "of one call"
    if not choices:
        calls = [{"class_labels": [0], **how} for _ in range(3)]
        calls[1]["callback_on_step_end"] = callback
        done = {number: len(drawn.report.timesteps) for number, drawn in pipe.continuous(calls, batch_size=2)}
        assert done == {0: 4, 1: 2, 2: 4}


@pytest.mark.parametrize("asking", ["__call__", "request", "plan"])
def test_an_argument_that_there_is_not_is_answered_with_the_nearest(asking, pipe):
    with pytest.raises(TypeError, match=r"unknown argument 'num_inference_step'. Did you mean 'num_inference_steps'\?"):
        getattr(pipe, asking)(num_inference_step=3)


def test_a_scheduler_is_named_and_others_are_the_pipeline_s(pipe):
    with pytest.raises(ValueError, match=r"scheduler is DDIMScheduler; it must be a name: ddpm, .* pipe\.scheduler = "):
        pipe([0], budget=12, scheduler=DDIMScheduler())


@pytest.mark.parametrize("latents", [torch.zeros(1, 1, 8, 8), np.zeros((2, 1, 8, 8))], ids=["one image", "array"])
def test_what_a_callback_returns_must_fit(pipe, latents):
    with pytest.raises(ValueError, match=r"callback_on_step_end returned latents .* tensor of \(2, 1, 8, 8\)"):
        pipe([0, 1], num_inference_steps=2, callback_on_step_end=lambda *_: {"latents": latents})


def test_latents_of_a_callback_may_be_in_half_precision(pipe):
    halved = pixels(pipe, [0], callback_on_step_end=lambda *args: {"latents": args[-1]["latents"].half()})
    assert halved.dtype == torch.float32


def test_bfloat16_draws_nearly_the_same():
    pipe = make_pipeline()
    exact = pixels(pipe, [0, 1], seed=0)
    halved = pixels(pipe.to(torch.bfloat16), [0, 1], seed=0)
    assert halved.dtype == torch.float32
    assert 0 < (halved - exact).abs().mean() < 0.1


def make_vae():
    return AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=4, sample_size=16, norm_num_groups=4, block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, scaling_factor=0.5,
        shift_factor=0.1,
    ).eval()  # fmt: skip


def test_latents_are_decoded():
    vae = make_vae()
    pipe = make_pipeline(in_channels=4, vae=vae)
    latents = pixels(pipe, [0, 1], seed=0)
    assert latents.shape == (2, 4, 8, 8)
    with torch.no_grad():
        expected = vae.decode(latents / 0.5 + 0.1).sample
    images = pipe([0, 1], budget=12, seed=0, output_type="pt").images
    assert images.shape == (2, 3, 16, 16)
    torch.testing.assert_close(images, (expected / 2 + 0.5).clamp(0, 1))
    assert pipe(0, budget=12).images[0].size == (16, 16)


def test_an_autoencoder_that_lacks_weights_is_refused_when_it_is_opened(tmp_path):
    make_pipeline(in_channels=4, vae=make_vae()).save_pretrained(tmp_path)
    (path,) = (tmp_path / "vae").glob("*.safetensors")
    weights = load_file(path)
    save_file({name: weight for name, weight in weights.items() if "decoder.conv_in" not in name}, path)
    with pytest.raises(
        ValueError, match=r"autoencoder in .* is not whole: 2 weights are missing, such as decoder.conv_in"
    ):
        FixedPointDiTPipeline.from_pretrained(tmp_path)


def test_an_autoencoder_that_overflows_in_half_precision_decodes_in_float32(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("diffusers"), "propagate", True)
    monkeypatch.setattr(logging.getLogger("fpdm.pipeline"), "propagate", True)
    vae = make_vae()
    with torch.no_grad():
        vae.decoder.conv_in.weight *= 1e5
    pipe = make_pipeline(in_channels=4, vae=vae)
    pipe.vae.to(torch.float16)
    images = pipe([0, 1], budget=12, seed=0, output_type="pt").images
    assert images.isfinite().all()
    assert pipe.vae.dtype == torch.float32
    assert "overflows in float16" in caplog.text
    caplog.clear()
    assert torch.equal(pipe([0, 1], budget=12, seed=0, output_type="pt").images, images)
    assert not caplog.text


@pytest.mark.parametrize("channels", [2, 4, 16])
def test_latents_without_an_autoencoder_are_not_made_pictures(channels):
    pipe = make_pipeline(in_channels=channels)
    with pytest.raises(ValueError, match=rf"latents of {channels} channels, and the pipeline has no vae"):
        pipe(0, budget=12)
    assert pipe(0, budget=12, output_type="latent").images.shape == (1, channels, 8, 8)
    assert pipe.plan(budget=12).planned == 12


def test_a_network_that_always_saw_classes_draws_nothing_without(tmp_path):
    model = randomised(FixedPointDiT(**SIZES))
    FixedPointDiTPipeline(model, make_schedule(), class_names=NAMES, only_classes=True).save_pretrained(tmp_path)
    pipe = FixedPointDiTPipeline.from_pretrained(tmp_path)
    for again in (pipe, FixedPointDiTPipeline.from_pipe(pipe)):
        with pytest.raises(ValueError, match="never without: give class_labels"):
            again(budget=12)
        with pytest.raises(ValueError, match="never without: there is nothing to guide away from"):
            again(0, budget=12, guidance_scale=2.0)
        assert again.plan(budget=12).planned == 12
        assert len(again([0, 1], budget=12).images) == 2


@pytest.mark.parametrize("name", ["transformer", "scheduler"])
def test_a_component_may_be_left_out_until_it_is_needed(name, pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    opened = FixedPointDiTPipeline.from_pretrained(tmp_path, **{name: None})
    with pytest.raises(ValueError, match=f"this pipeline has no {name}: it was opened without one"):
        opened(0, budget=12)
    opened.register_modules(**{name: getattr(pipe, name)})
    assert torch.equal(pixels(opened, [0], seed=1), pixels(pipe, [0], seed=1))


def test_torchs_defaults_do_not_move_a_seed(pipe):
    generators = image_generators(3, [0])
    noise = initial_noise(pipe.transformer, generators)
    try:
        torch.set_default_dtype(torch.float64)
        with torch.device("meta"):
            again = initial_noise(pipe.transformer, image_generators(3, [0]))
    finally:
        torch.set_default_dtype(torch.float32)
    assert again.dtype == torch.float32
    assert torch.equal(again, noise)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (DDIMScheduler, "ddim"),
        pytest.param(
            DPMSolverMultistepScheduler, "dpm++",
        ),
        (UniPCMultistepScheduler, "unipc"),
        (EulerDiscreteScheduler, "euler"),
        (HeunDiscreteScheduler, "heun"),
    ],
)  # fmt: skip
def test_a_scheduler_swapped_the_diffusers_way_is_honoured(kind, name):
    pipe = make_pipeline()
    by_name, own = pixels(pipe, [0], seed=0, scheduler=name), pixels(pipe, [0], seed=0)
    pipe.scheduler = kind.from_config(pipe.scheduler.config)
    assert torch.equal(pixels(pipe, [0], seed=0), by_name)
    assert not torch.allclose(by_name, own, atol=1e-2)


# Reuse, solvers, tolerance, guidance


def test_reuse_by_name_or_as_a_boolean(pipe):
    kinds = {kind: pixels(pipe, [0, 1], budget=24, seed=0, reuse=kind) for kind in REUSE}
    assert torch.equal(pixels(pipe, [0, 1], budget=24, seed=0), kinds["plain"])
    assert torch.equal(pixels(pipe, [0, 1], budget=24, seed=0, reuse=True), kinds["plain"])
    assert torch.equal(pixels(pipe, [0, 1], budget=24, seed=0, reuse=False), kinds["none"])
    assert all(not torch.allclose(kinds["plain"], kinds[kind], atol=1e-3) for kind in ("none", "linear", "quadratic"))


def test_solvers_by_name_with_a_parameter_or_as_they_are(pipe):
    by_name = {name: pixels(pipe, [0, 1], iterations=4, seed=0, solver=name) for name in SOLVERS}
    assert torch.equal(pixels(pipe, [0, 1], iterations=4, seed=0), by_name["picard"])
    assert torch.equal(pixels(pipe, [0, 1], iterations=4, seed=0, solver=Anderson()), by_name["anderson"])
    assert torch.equal(
        pixels(pipe, [0, 1], iterations=4, seed=0, solver="picard:0.7"),
        pixels(pipe, [0, 1], iterations=4, seed=0, solver=Picard(0.7)),
    )
    assert not torch.allclose(by_name["picard"], by_name["anderson"], atol=1e-3)


def test_a_tolerance_makes_the_budget_a_limit(pipe):
    report = pipe([0, 1], budget=40, tolerance=1e9).report
    assert report.spent == report.most == 3 * len(report.timesteps) < report.planned == 40
    assert report.status == [{"converged": 2}] * len(report.timesteps)


def test_guidance_by_keyword_arguments(pipe):
    choices = {"iterations": [2, 2, 2, 2], "guidance_scale": 3.0}  # at 999, 749, 499, 249
    everywhere = pipe([0, 1], seed=0, **choices).report
    assert everywhere.total_passes == 2 * everywhere.spent == 32
    assert pipe([0, 1], **choices, guidance_interval=(400, 800)).report.total_passes == 16 + 2 * 4
    assert pipe([0, 1], **choices, guidance_share=0.5).report.total_passes == 16 + 4 * 3
    one = pixels(pipe, [0, 1], budget=None, seed=0, **choices, guidance_channels=1)
    assert torch.equal(one, pixels(pipe, [0, 1], budget=None, seed=0, **choices))  # it has one channel


def test_heun_takes_an_odd_number_of_steps_of_a_budget(pipe):
    report = pipe([0], budget=16, scheduler="heun").report
    assert len(report.timesteps) == 3  # four of two iterations would be
    assert report.spent == 16


def test_an_image_that_is_lost_is_told_of_and_the_others_are_drawn(caplog, monkeypatch):
    pipe = make_pipeline()
    noise = initial_noise(pipe.transformer, image_generators(9, [0, 1]))
    clean = pixels(pipe, [0, 1], seed=9, latents=noise)
    noise[1] = torch.inf
    monkeypatch.setattr(logging.getLogger("diffusers"), "propagate", True)
    monkeypatch.setattr(logging.getLogger("fpdm"), "propagate", True)
    output = pipe([0, 1], budget=12, seed=9, latents=noise, output_type="latent")
    assert output.report.diverged == 1
    assert torch.equal(output.images[0], clean[0])
    assert output.images[1].isfinite().all()
    assert "1 of 2 images diverged" in caplog.text
    assert all(image.size == (8, 8) for image in pipe([0, 1], budget=12, seed=9, latents=noise).images)


@pytest.mark.parametrize("output_type", ["pil", "np", "pt", "latent"])
def test_samples_are_decoded_as_a_call_does(pipe, output_type):
    latents = pixels(pipe, [0, 1], seed=0)
    decoded, called = pipe.decode(latents, output_type), pipe([0, 1], budget=12, seed=0, output_type=output_type).images
    assert np.array_equal(np.stack([np.asarray(a) for a in decoded]), np.stack([np.asarray(b) for b in called]))


def test_more_than_ten_classes_keep_their_numbers_through_files(tmp_path):
    """Which diffusers writes with their keys in the order of text: 0, 1, 10, 11, 2."""
    names = [f"class {letter}" for letter in "abcdefghijkl"]
    pipe = make_pipeline(class_names=names, num_classes=12)
    for folder in (tmp_path / "once", tmp_path / "twice"):
        pipe.save_pretrained(folder)
        pipe = FixedPointDiTPipeline.from_pretrained(folder)
        assert pipe.class_names == names
        assert pipe.labels(["class c", "class k"], None).tolist() == [2, 10]
    assert FixedPointDiTPipeline.from_pipe(pipe).class_names == names


# Tuned plans


PLANS = (
    TunedPlan(12, (1, 2, 3), "heun", "linear", "anderson", {"data": "digits"}),
    TunedPlan(48, (2,) * 12, "unipc", "quadratic", "picard:0.9", {"data": "digits"}),
)


def test_tuned_plans_are_saved_and_opened_with_the_pipeline(tmp_path):
    pipe = make_pipeline()
    pipe.save_pretrained(tmp_path / "plain")
    assert not (tmp_path / "plain" / "plans.json").exists()
    assert FixedPointDiTPipeline.from_pretrained(tmp_path / "plain").tuned_plans == ()
    pipe.tuned_plans = PLANS
    pipe.save_pretrained(tmp_path / "tuned")
    again = FixedPointDiTPipeline.from_pretrained(tmp_path / "tuned")
    assert again.tuned_plans == PLANS
    assert make_pipeline().tuned_plans == ()  # not of the class
    again.set_progress_bar_config(disable=True)
    assert torch.equal(pixels(again, [0], seed=0, **again.tuned(12)), pixels(pipe, [0], seed=0, **pipe.tuned(12)))


def test_a_plan_of_heun_fits_the_least_budgets_where_two_calls_are_the_fewest():
    pipe = make_pipeline()
    pipe.scheduler = make_schedule(beta_schedule="cosine")
    pipe.tuned_plans = (TunedPlan(12, (4, 4), "heun", "plain", "picard", {}),)
    cost = cost_of(pipe.transformer)
    least = 2 * cost.passes(1)
    for budget in range(least, 60):
        plan = pipe.plan(budget=budget)
        assert plan.num_steps % 2 == 0
        assert budget - cost.per_iteration < sum(plan.passes) <= budget
    with pytest.raises(ValueError, match=f"2 timesteps need at least {least}"):
        pipe.plan(budget=least - 1)


@pytest.mark.parametrize("part", ["scheduler", "transformer"])
def test_plans_of_other_parts_are_neither_saved_nor_handed_on(part, tmp_path):
    pipe = make_pipeline()
    pipe.tuned_plans = PLANS
    assert FixedPointDiTPipeline.from_pipe(pipe).tuned_plans == PLANS
    setattr(pipe, part, getattr(make_pipeline(), part))
    assert not pipe.request(0, budget=12).tuned
    assert not FixedPointDiTPipeline.from_pipe(pipe).request(0, budget=12).tuned
    pipe.save_pretrained(tmp_path)
    assert FixedPointDiTPipeline.from_pretrained(tmp_path).tuned_plans == ()


def test_a_pipeline_without_a_network_is_not_saved(tmp_path):
    pipe = make_pipeline()
    pipe.transformer = None
    with pytest.raises(ValueError, match="no transformer"):
        pipe.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_what_else_is_in_a_config_is_no_hindrance(tmp_path):
    make_pipeline().save_pretrained(tmp_path)
    config = tmp_path / "transformer/config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "note": "hi"}))
    pipe = FixedPointDiTPipeline.from_pretrained(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    pipe.transformer.register_to_config(quantization_config=object())
    assert torch.equal(pixels(pipe, [0], budget=12, seed=0), pixels(make_pipeline(), [0], budget=12, seed=0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_default_dtype_changes_no_image(dtype, pipe):
    how = {"budget": 36, "num_inference_steps": 6, "seed": 0, "scheduler": "ddim"}
    shared = {**how, "guidance_scale": 2.0, "guidance_share": 0.5}
    expected = [pixels(pipe, [0, 1], **some) for some in (how, shared)]
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        found = [pixels(pipe, [0, 1], **some) for some in (how, shared)]
    finally:
        torch.set_default_dtype(before)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_call_that_begins_beside_another_leaves_an_interrupt_alone():
    pipe = make_pipeline()

    def calls():
        yield {"class_labels": 0, "budget": 24, "num_inference_steps": 6, "seed": 0}
        pipe._interrupt = True  # as another thread would
        yield {"class_labels": 1, "budget": 24, "num_inference_steps": 6, "seed": 1}

    found = dict(pipe.continuous(calls(), batch_size=2))
    assert sorted(len(output.report.timesteps) for output in found.values()) == [1, 6]


def test_a_pipeline_saved_over_another_does_not_take_its_plans_over(tmp_path):
    tuned = make_pipeline()
    tuned.tuned_plans = PLANS
    tuned.save_pretrained(tmp_path)
    make_pipeline(num_core=2).save_pretrained(tmp_path)
    assert FixedPointDiTPipeline.from_pretrained(tmp_path).tuned_plans == ()


def test_a_damaged_file_of_plans_is_refused_by_name(tmp_path):
    make_pipeline().save_pretrained(tmp_path)
    (tmp_path / "plans.json").write_text("[{")
    with pytest.raises(ValueError, match=r"plans\.json"):
        FixedPointDiTPipeline.from_pretrained(tmp_path)


@pytest.mark.parametrize("budget", [8, 12, 13, 24, 25, 48, 49, 100, 333])
def test_a_call_with_the_tuned_plan_spends_the_budget(budget):
    pipe = make_pipeline()
    pipe.tuned_plans = PLANS
    report = pipe([0, 1], **pipe.tuned(budget)).report
    assert report.spent == report.planned == budget
    if budget in (12, 48):
        plan = PLANS[budget == 48]
        assert tuple(report.iterations) == plan.iterations
    assert (len(report.timesteps) % 2 == 1) or budget > 24  # heun's


@pytest.mark.parametrize("budget", [8, 12, 13, 48, 100])
def test_a_budget_alone_takes_the_tuned_plan(budget):
    pipe = make_pipeline()
    pipe.tuned_plans = PLANS
    assert pipe.plan(budget=budget) == pipe.plan(**pipe.tuned(budget))
    assert torch.equal(pixels(pipe, [0], seed=0, budget=budget), pixels(pipe, [0], seed=0, **pipe.tuned(budget)))
    assert pipe.plan(budget=torch.tensor(budget)) == pipe.plan(budget=budget)


@pytest.mark.parametrize(
    "more",
    [
        {"num_inference_steps": 3},
        {"iterations": 1},
        {"allocation": "constant"},
        {"reuse": False},
        {"solver": "picard"},
        {"scheduler": "ddpm"},
        {"tolerance": 0.1},
        {"tolerance": 0.1, "pooled": True},
        {"guidance_scale": 2.0},
    ],
    ids=str,
)
def test_whatever_else_is_said_of_a_plan_leaves_the_tuned_one_out(more, pipe):
    tuned = make_pipeline()
    tuned.tuned_plans = PLANS
    assert torch.equal(pixels(tuned, [0], seed=0, budget=12, **more), pixels(pipe, [0], seed=0, budget=12, **more))
    assert not torch.equal(pixels(tuned, [0], seed=0, budget=12), pixels(pipe, [0], seed=0, budget=12))


def test_a_pipeline_of_another_scheduler_or_network_takes_no_tuned_plan_by_itself(tmp_path, pipe):
    saved = make_pipeline()
    saved.tuned_plans = PLANS
    saved.save_pretrained(tmp_path)
    other = make_pipeline(num_pre=2, num_post=2)
    for part in ({"scheduler": for_sampling(pipe.scheduler)}, {"transformer": other.transformer}):
        opened = FixedPointDiTPipeline.from_pretrained(tmp_path, **part)
        assert opened.plan(budget=12).planned <= 12
        assert opened.plan(budget=12) != saved.plan(budget=12)
    given, plain = make_pipeline(), make_pipeline()
    given.tuned_plans = PLANS
    given.scheduler = plain.scheduler = for_sampling(given.scheduler)
    assert torch.equal(pixels(given, [0], seed=0, budget=12), pixels(plain, [0], seed=0, budget=12))
    assert given.tuned_plans == PLANS, "they can be asked for"


@pytest.mark.parametrize("budget", [0, -1, "12", 1.5])
def test_a_budget_that_cannot_be_is_refused_beside_tuned_plans_too(budget, pipe):
    tuned = make_pipeline()
    tuned.tuned_plans = PLANS
    with pytest.raises((TypeError, ValueError)) as plain:
        pipe([0], budget=budget)
    with pytest.raises(plain.type, match=re.escape(str(plain.value))):
        tuned([0], budget=budget)


def test_a_tuned_plan_among_other_calls_is_solved_by_picard():
    pipe = make_pipeline()
    pipe.tuned_plans = PLANS
    alone = pipe([0], seed=0, output_type="pt", **{**pipe.tuned(12), "solver": "picard"})
    calls = [{"class_labels": [0], "seed": 0, "budget": 12, "output_type": "pt"}] * 2
    for given in (calls, iter(calls)):
        for _, drawn in pipe.continuous(given):
            torch.testing.assert_close(drawn.images, alone.images)
            assert drawn.report.iterations == alone.report.iterations
    with pytest.raises(ValueError, match='say solver="picard"'):
        list(pipe.continuous([{"class_labels": [0], **pipe.tuned(12)}]))


def test_a_tuned_plan_of_many_iterations_serves_a_budget_below_one_of_its_timesteps():
    pipe = make_pipeline()
    pipe.tuned_plans = (TunedPlan(24, (10, 10), "ddim", "plain", "picard", {}),)
    assert pipe.plan(budget=8).planned == 8  # it can be
    assert pipe([0], **pipe.tuned(8)).report.spent == 8


def test_a_tuned_plan_of_an_explicit_network_spends_what_fits():
    pipe = make_pipeline(DiT, depth=3)
    pipe.tuned_plans = (TunedPlan(9, (None,) * 3, "heun", "plain", "picard", {}),)
    for budget, spent in ((9, 9), (8, 3), (20, 15), (21, 21)):  # an odd number of timesteps of three blocks
        assert pipe([0], **pipe.tuned(budget)).report.spent == spent


def test_a_model_that_was_not_tuned_says_how_to(pipe):
    with pytest.raises(ValueError, match="fpdm tune"):
        pipe.tuned(80)


@pytest.mark.parametrize("budget", [None, 80.5, "80", 0])
def test_a_tuned_plan_is_asked_for_by_a_budget_that_can_be(pipe, budget):
    with pytest.raises(ValueError, match="budget"):
        pipe.tuned(budget)


def test_a_pipeline_of_the_parts_of_another_has_its_plans(tmp_path):
    pipe = make_pipeline()
    pipe.tuned_plans = (TunedPlan(40, (2, 2), "ddim", "plain", "picard", {}),)
    assert FixedPointDiTPipeline.from_pipe(pipe).tuned_plans == pipe.tuned_plans


@pytest.mark.parametrize("network", [FixedPointDiT, DiT])
def test_a_network_may_be_compiled_as_a_whole(network):
    pipe = make_pipeline(network, **({"depth": 2} if network is DiT else {}))
    exact = pixels(pipe, [0, 2], seed=1)
    pipe.transformer = torch.compile(pipe.transformer, backend="eager")
    torch.testing.assert_close(pixels(pipe, [0, 2], seed=1), exact, rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match="compile_repeated_blocks"):
        next(pipe.continuous([{"budget": 12}]))


# Asked wrongly


TWICE = {"guidance_scale": 2.0}


@pytest.mark.parametrize(
    ("choices", "text"),
    [
        ({"class_labels": 3}, "classes 0 to 2"),
        ({"class_labels": -1}, "classes 0 to 2"),
        ({"class_labels": [0, 3]}, "class 3 is out of range"),
        ({"class_labels": "cot"}, "Did you mean 'cat'"),
        ({"class_labels": []}, "at least 1"),
        ({"class_labels": [0, 1], "num_images": 3}, "num_images is 3 and there are 2 class labels"),
        ({"num_images": 0}, "at least 1"),
        ({"budget": 2}, "too small"),
        ({"budget": 12, "num_inference_steps": 5}, "at least 15"),
        ({"num_inference_steps": 1001}, "1 to 1000"),
        ({"scheduler": "dimm"}, "Did you mean 'ddim'"),
        ({"output_type": "pill"}, "Did you mean 'pil'"),
        ({"latents": torch.zeros(1, 1, 4, 4)}, r"\(1, 1, 8, 8\)"),
        ({"latents": torch.zeros(2, 1, 8, 8)}, r"\(1, 1, 8, 8\)"),
        ({"generator": torch.Generator(), "seed": 1}, "not both"),
        ({"generator": [torch.Generator()] * 2}, "2 generators for 1 images"),
        ({"seed": 1, "image_indices": [1, 2]}, "2 image_indices for 1 images"),
        ({"callback_on_step_end_tensor_inputs": ["noise"]}, "noise"),
        ({"allocation": "liner:1"}, "Did you mean 'linear"),
        ({"allocation": "linear:2"}, "between -2 and 2"),
        ({"reuse": "linaer"}, "Did you mean 'linear'"),
        ({"solver": "andersen"}, "Did you mean 'anderson'"),
        ({"solver": "anderson:x"}, "'x' is not a whole number"),
        ({"solver": "anderson:0"}, "at least 1"),
        ({"solver": "picard:0"}, r"in \(0, 1\]"),
        ({"tolerance": 0.0}, "tolerance is 0"),
        ({"tolerance": float("nan")}, "tolerance is nan"),
        ({"guidance_scale": 2.0}, "no class_labels are given"),
        ({"class_labels": 0, "guidance_scale": float("inf")}, "guidance_scale is inf"),
        ({"guidance_interval": (5, 4)}, "the lower one first"),
        ({"guidance_channels": 0}, "at least 1"),
        ({"guidance_scale": 2.0, "guidance_channels": 2}, "there are 1 channels"),
        ({"guidance_share": 0.0}, r"in \(0, 1\]"),
        ({"scheduler": "heun", "num_inference_steps": 4}, "take 3 or 5"),
        ({"scheduler": "heun", "iterations": [2, 2]}, "take 1 or 3"),
        ({"generator": 42}, "generator is 42; it must be a torch.Generator"),
        ({"seed": 1.5}, "seed is 1.5; it must be a whole number"),
        ({"seed": "0"}, "seed is '0'; it must be a whole number"),
        ({"num_images": 2.5}, "num_images is 2.5; it must be a whole number"),
        ({"class_labels": 0, **TWICE, "guidance_interval": (0.1, 0.8)}, "none of the 40 timesteps from 999"),
        ({"class_labels": 0, **TWICE, "guidance_interval": (1000, 2e3)}, "none of the 40 timesteps"),
        ({"class_labels": 0, "guidance_scale": None}, "guidance_scale is None"),
        ({"class_labels": 0, "guidance_scale": "2"}, "guidance_scale is '2'"),
        ({"class_labels": 0, "guidance_scale": 2.0, "guidance_interval": (None, 800)}, "must be two timesteps"),
        ({"class_labels": 0, "num_images": 2.0}, "num_images is 2.0; it must be a whole number"),
        ({"class_labels": 0, "num_images": "2"}, "num_images is '2'; it must be a whole number"),
        ({"latents": np.zeros((1, 1, 8, 8))}, r"latents are ndarray; these images need a tensor of \(1, 1, 8, 8\)"),
        ({"seed": 1, "image_indices": [1.0]}, "image_indices is 1.0; it must be a whole number"),
        ({"seed": 1, "image_indices": 5}, "image_indices is 5; it must be a list"),
        ({"allocation": 3}, "allocation is 3"),
        ({"num_inference_steps": 2, "allocation": ["a", 1]}, "weights must be positive"),
        pytest.param({"guidance_interval": (1, 2, 3)}, "guidance_interval"),
        pytest.param({"guidance_interval": ()}, "guidance_interval"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_refused_before_the_network_is_called(pipe, choices, text):
    calls = []
    hook = pipe.transformer.register_forward_pre_hook(lambda *_: calls.append(1))
    with pytest.raises(ValueError, match=text):
        pipe(**choices)
    hook.remove()
    assert not calls


def test_more_names_than_classes_are_refused():
    with pytest.raises(ValueError, match="class_names"):
        make_pipeline(class_names=[*NAMES, "yak"])


def test_indices_next_to_generators_are_refused(pipe):
    with pytest.raises(ValueError, match="image_indices"):
        pipe(0, budget=12, generator=[torch.Generator()], image_indices=[4])


def test_numbers_and_arrays_of_numpy_are_taken(pipe):
    asked = {"guidance_scale": 2.0, "guidance_interval": (100, 800), "tolerance": 0.02, "allocation": [1.0, 2.0, 1.0]}
    plain = pixels(pipe, [0, 1], **asked, num_inference_steps=3, budget=20, seed=0, image_indices=[4, 2])
    arrays = {name: np.asarray(value) for name, value in asked.items()}
    arrays |= {"tolerance": np.float64(0.02), "guidance_scale": np.float32(2)}
    found = pixels(pipe, [0, 1], **arrays, num_inference_steps=3, budget=20, seed=0, image_indices=np.array([4, 2]))
    assert torch.equal(found, plain)


def test_callbacks_may_be_handed_nothing(pipe):
    handed = []
    pipe(0, budget=12, callback_on_step_end=lambda *args: handed.append(args[-1]),
         callback_on_step_end_tensor_inputs=None)  # fmt: skip
    assert handed == [{}] * len(handed) != []
