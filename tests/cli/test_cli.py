"""The command line as its users meet it: what works, and one clear message for what cannot."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import save_file

from fpdm.cli import train
from fpdm.cli.main import main, make_parser
from fpdm.recipes import recipe
from fpdm.training import checkpoints
from tests.commands import refused

TINY = [
    "--form", "1+1+1", "--no-grad-max", "2", "--with-grad-max", "2",
    "--hidden-size", "16", "--num-heads", "2", "--patch-size", "4", "--batch-size", "8", "--steps", "4",
    "--log-every", "2", "--checkpoint-every", "2", "--sample-every", "4", "--sample-budget", "12",
]  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    assert main(["train", "digits", "--runs-dir", str(folder), *TINY]) == 0
    return folder


@pytest.fixture
def model(runs):
    return str(runs / "digits")


def test_help_loads_neither_torch_nor_diffusers():
    code = (
        "import sys; from fpdm.cli.main import make_parser; from fpdm.recipes import recipe; "
        "make_parser().format_help(); "
        "recipe('digits'); import fpdm; dir(fpdm); "
        "sys.exit(bool({'torch', 'diffusers', 'accelerate', 'numpy', 'matplotlib'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize(
    "arguments", [["--help"], ["train", "--help"], ["sample", "--help"], ["demo", "--help"], ["--version"]]
)
def test_help(arguments, capsys):
    with pytest.raises(SystemExit) as exit:
        main(arguments)
    assert exit.value.code == 0
    assert "fpdm" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["trian"], ["trian", "'train'"]),
        (["train", "digitz"], ["digitz", "'digits'"]),
        (["train", "digits", "--batchsize", "4"], ["--batchsize", "'--batch-size'"]),
        (["train", "digits", "--batch-size", "many"], ["--batch-size", "many"]),
        (["train", "digits", "--batch-size", "0"], ["batch_size", "at least 1"]),
        (["train", "digits", "--patch-size", "3"], ["3", "8", "[1, 2, 4, 8]"]),
        (["train", "digits", "--crop", "centre"], ["centre", "'center'"]),
        (["train", "digits", "--device", "cuda"], ["cuda", "cpu"]),
        (["train", "images"], ["--data PATH"]),
        (["train", "images", "--data", ""], ["--data PATH"]),
        (["train", "digits", "--lr", "inf"], ["lr is inf", "finite"]),
        (["train", "digits", "--min-snr-gamma", "nan"], ["min_snr_gamma is nan", "finite"]),
        (["train", "images", "--data", "/nowhere"], ["there is no /nowhere"]),
        (["train", "images", "--data", "{tmp}"], ["holds no images"]),
        (["train", "fashion_mnist", "--data", "{tmp}"], ["holds no images"]),
        (["train", "digits", "--init-from", "{tmp}"], ["not a model folder"]),
        (["train", "digits", "--model", "S/3"], ["S/3", "'S/"]),
        (["train", "digits", "--channels", "3"], ["channels is 3", "1"]),
        (["train", "digits", "--depth", "3"], ["depth"]),
        (["train", "digits", "--network", "dit", "--depth", "3", "--num-core", "2"], ["num_core"]),
        (["sample", "/nowhere", "--out", "{tmp}/o"], ["no folder /nowhere"]),
        (["sample", "{tmp}", "--out", "{tmp}/o"], ["not a model"]),
    ],
)  # fmt: skip
def test_refused(arguments, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = refused([argument.replace("{tmp}", str(tmp_path)) for argument in arguments], capsys)
    assert all(word in said for word in words), said
    assert not (tmp_path / "runs").exists(), "nothing is left behind by a refused command"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--classes", "11"], ["class 11", "0 to 9"]),
        (["--classes", "0-10"], ["class 10", "0 to 9"]),
        (["--classes", "0-99999999999999"], ["class 10", "0 to 9"]),
        (["--classes", "5-3"], ["3-5"]),
        (["--classes", "cat"], ["cat"]),
        (["--budget", "5", "--steps", "10"], ["5", "30", "1 timestep"]),
        (["--budget", "2"], ["3"]),
        (["--steps", "1001"], ["1001", "1000"]),
        (["--iterations", "two"], ["two"]),
        (["--iterations", "2,3", "--steps", "3"], ["2 iteration counts for 3"]),
        (["--allocation", "rizing", "--budget", "40", "--steps", "4"], ["rizing", "'rising'"]),
        (["--scheduler", "dpm"], ["dpm", "dpm++"]),
        (["--guid", "2"], ["--guid", "'--guidance-scale'"]),
        (["--device", "cuda"], ["cuda", "cpu"]),
        (["--dtype", "int4"], ["int4", "float32"]),
        (["--num-images", "0"], ["at least 1"]),
    ],
)
def test_sampling_that_cannot_be_done_is_refused(arguments, words, model, capsys, tmp_path):
    out = tmp_path / "out"
    said = refused(["sample", model, "--out", out, *arguments], capsys)
    assert all(word in said for word in words), said
    assert not out.exists()


def test_a_mistyped_run_is_not_looked_for_on_the_hub(runs, capsys, monkeypatch):
    monkeypatch.chdir(runs.parent)
    assert "Did you mean" in refused(["sample", f"{runs.name}/digts", "--out", "o"], capsys)


def test_fine_tuning_from_a_run_and_what_contradicts_it(model, capsys, tmp_path):
    start = ["train", "digits", "--runs-dir", tmp_path, "--init-from", model]
    assert "hidden_size is 16" in refused([*start, "--hidden-size", "32"], capsys)
    assert "model is None" in refused([*start, "--model", "B/4"], capsys)
    assert main([str(word) for word in [*start, "--steps", "1", "--batch-size", "8", "--log-every", "1"]]) == 0


def test_a_disk_without_room_is_refused_before_training(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    said = refused(["train", "digits", "--runs-dir", tmp_path / "runs"], capsys)
    assert "MB free" in said
    assert not (tmp_path / "runs").exists()


def test_a_disk_that_fills_up_is_one_message_and_keeps_what_was_saved(capsys, tmp_path, monkeypatch):
    def full(tensors, path):
        if "00000004" in str(path):
            raise SafetensorError("No space left on device (os error 28)")
        save_file(tensors, path)

    monkeypatch.setattr(checkpoints, "save_file", full)
    said = refused(["train", "digits", "--runs-dir", tmp_path, *TINY], capsys)
    assert "step 4 cannot be written" in said
    assert checkpoints.all_steps(tmp_path / "digits/checkpoints") == [2]


CRASHING = """
import os, signal, warnings
from fpdm.cli import main, runs

def crash(options):
    warnings.warn("few images")
    warnings.warn("of a library", RuntimeWarning)
    os.kill(os.getpid(), signal.SIGSEGV)

runs.run = crash
main(["runs"])
"""


def test_warnings_are_one_line_for_users_and_a_crash_in_native_code_leaves_a_trace():
    ended = subprocess.run([sys.executable, "-c", CRASHING], capture_output=True, text=True)
    assert ended.returncode == -signal.SIGSEGV
    first, second, *trace = ended.stderr.splitlines()
    assert first == "fpdm runs: warning: few images"
    assert second == "<string>:7: RuntimeWarning: of a library"
    assert any("Segmentation fault" in line for line in trace)
    assert any("line 8 in crash" in line for line in trace)


def test_damaged_models_are_refused(model, capsys, tmp_path):
    damaged = tmp_path / "damaged"
    subprocess.run(["cp", "-r", model + "/pipeline", damaged], check=True)
    weights = damaged / "transformer/diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "cannot be opened" in refused(["sample", damaged, "--out", tmp_path / "o"], capsys)
    weights.unlink()
    assert "diffusion_pytorch_model" in refused(["sample", damaged, "--out", tmp_path / "o"], capsys)
    (damaged / "transformer/config.json").write_text("{")
    assert str(damaged) in refused(["sample", damaged, "--out", tmp_path / "o"], capsys)
    (damaged / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    assert "StableDiffusionPipeline" in refused(["sample", damaged, "--out", tmp_path / "o"], capsys)
    (damaged / "model_index.json").write_text("[]")
    assert "is a list, not a FixedPointDiTPipeline" in refused(["sample", damaged, "--out", tmp_path / "o"], capsys)


def test_places_that_cannot_be_written_to_are_refused(model, capsys, tmp_path):
    (tmp_path / "file").write_text("")
    assert "is a file" in refused(["sample", model, "--out", tmp_path / "file/out"], capsys)
    assert "is a file" in refused(["train", "digits", "--runs-dir", tmp_path / "file"], capsys)
    if os.geteuid() != 0:  # root may write anywhere
        (tmp_path / "locked").mkdir(mode=0o500)
        assert "cannot be written" in refused(["sample", model, "--out", tmp_path / "locked/out"], capsys)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.\nat C"),
        RuntimeError("CUDA out of memory. Tried to allocate 20.00 MiB"),
        MemoryError("Unable to allocate 9 GiB"),
    ],
)
def test_memory_that_is_not_there_is_told_in_one_message(error, model, capsys, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("fpdm.cli.sample.draw", fail)
    said = refused(["sample", model, "--out", tmp_path / "o"], capsys)
    assert "not enough memory (" in said
    assert "take a smaller --batch-size" in said
    assert len(said.splitlines()) == 1


def test_errors_that_nobody_foresaw_keep_their_traceback(model, tmp_path, monkeypatch):
    monkeypatch.setattr("fpdm.cli.sample.draw", lambda *_, **__: torch.zeros(2).view(3))
    with pytest.raises(RuntimeError, match="invalid for input"):
        main(["sample", model, "--out", str(tmp_path / "o")])


def test_debug_shows_the_traceback(tmp_path):
    with pytest.raises(ValueError, match="not a model"):
        main(["sample", str(tmp_path), "--out", str(tmp_path / "o"), "--debug"])


def test_a_finished_run_says_so_and_another_config_is_refused(runs, capsys):
    assert main(["train", "digits", "--runs-dir", str(runs), *TINY]) == 0
    said = capsys.readouterr().out
    assert "is finished" in said
    assert "--steps" not in said, "a cosine that is over cannot be prolonged"
    assert "lr was 0.001, is 0.5" in refused(["train", "digits", "--runs-dir", runs, *TINY, "--lr", "0.5"], capsys)


def test_a_finished_run_of_a_constant_rate_can_be_asked_for_more(tmp_path, capsys):
    words = ["train", "digits", "--runs-dir", str(tmp_path), *TINY, "--lr-schedule", "constant"]
    assert main(words) == 0
    assert "note: all 4 steps are warm-up, of 100" in capsys.readouterr().out
    assert main(words) == 0
    assert "Ask for more with --steps" in capsys.readouterr().out


def sampled(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.png")}


def test_sample_writes_images_grid_and_report(model, tmp_path, capsys):
    out = tmp_path / "out"
    command = ["sample", model, "--budget", "40", "--steps", "8", "--classes", "3,5-6", "--num-images", "7"]
    assert main([*command, "--batch-size", "4", "--out", str(out)]) == 0
    assert "8 timesteps x 3 iterations, 40 block passes" in capsys.readouterr().out
    assert sorted(sampled(out)) == [f"{i:06d}.png" for i in range(7)] + ["grid.png"]
    with Image.open(out / "000000.png") as image:
        assert (image.size, image.mode) == ((8, 8), "L")
    kept = json.loads((out / "report.json").read_text())
    assert kept["request"]["classes"] == [3, 5, 6]
    assert kept["report"]["images"] == 7
    assert kept["report"]["spent"] == kept["report"]["planned"] == kept["report"]["asked"] == 40


def test_a_model_that_always_saw_classes_is_not_guided(tmp_path, capsys):
    command = ["train", "digits", "--runs-dir", str(tmp_path), *TINY, "--class-dropout", "0"]
    assert main(command) == 0
    sample = ["sample", tmp_path / "digits", "--budget", "12", "--num-images", "2", "--out", tmp_path / "o"]
    assert "nothing to guide away from" in refused([*sample, "--guidance-scale", "2"], capsys)
    assert main([str(word) for word in sample]) == 0


def test_sample_makes_only_what_is_missing(model, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    command = ["sample", model, "--budget", "20", "--seed", "4", "--num-images"]
    assert main([*command, "9", "--out", str(whole)]) == 0
    assert main([*command, "5", "--out", str(parts), "--batch-size", "2"]) == 0
    (parts / "000003.png").unlink()
    untouched = (parts / "000001.png").stat().st_mtime_ns
    assert main([*command, "9", "--out", str(parts)]) == 0
    assert sampled(parts) == sampled(whole)
    assert (parts / "000001.png").stat().st_mtime_ns == untouched
    assert main([*command, "9", "--out", str(parts)]) == 0, "nothing is missing"
    assert json.loads((parts / "report.json").read_text())["report"]["images"] == 9

    (parts / "report.json").unlink()  # as if killed between images and report
    assert main([*command, "9", "--out", str(parts)]) == 0
    assert sampled(parts) == sampled(whole)
    assert json.loads((parts / "report.json").read_text())["report"]["images"] == 9


def test_sample_does_not_mix_requests_or_folders(model, tmp_path, capsys):
    out = tmp_path / "out"
    command = ["sample", model, "--budget", "20", "--num-images", "2", "--out", str(out)]
    assert main(command) == 0
    assert "seed was 0, is 1" in refused([*command, "--seed", "1"], capsys)
    changed = shutil.copytree(f"{model}/pipeline", tmp_path / "changed")
    config = changed / "scheduler/scheduler_config.json"
    config.write_text(config.read_text().replace('"v_prediction"', '"epsilon"'))
    said = refused([command[0], changed, *command[2:]], capsys)
    assert "noise_schedule: prediction_type was 'v_prediction', is 'epsilon'" in said
    request = json.loads((out / "request.json").read_text())
    older = {key: value for key, value in request.items() if key not in ("noise_schedule", "vae")}
    (out / "request.json").write_text(json.dumps(older))  # of a version that kept less
    assert main(command) == 0
    (tmp_path / "album").mkdir()
    Image.new("L", (4, 4)).save(tmp_path / "album/me.png")
    assert "holds images already" in refused([*command[:-1], tmp_path / "album"], capsys)


def test_a_file_of_no_kind_is_not_said_to_be_missing(tmp_path, capsys):
    (tmp_path / "photos.zip").write_bytes(b"PK")
    assert "photos.zip is of no kind that is read: name a folder" in refused(
        ["train", "images", "--data", tmp_path / "photos.zip"], capsys
    )


def test_images_whose_names_are_no_text_are_named_too(tmp_path, capsys):
    folder = tmp_path / "photos"
    folder.mkdir()
    for place in range(3):
        Image.new("RGB", (8, 8), (place, 0, 0)).save(folder / f"{place}.png")
    Path(os.fsdecode(os.fsencode(folder) + b"/bad\xff.png")).write_bytes(b"no image")
    words = [
        "train", "images", "--data", folder, "--image-size", 8, "--model", "none", "--hidden-size", 16,
        "--num-heads", 2, "--patch-size", 4, "--batch-size", 4, "--steps", 2, "--warmup", 0,
        "--workers", 0, "--device", "cpu", "--runs-dir", tmp_path / "runs",
    ]  # fmt: skip
    assert main([str(word) for word in words]) == 0
    said = capsys.readouterr().out
    assert "1 images could not be read" in said
    assert "bad\\udcff.png" in said


@pytest.mark.parametrize(
    ("saved", "said"),
    [
        (True, "Saved at step 6. The same command goes on from there."),
        (False, "Stopped at step 6, which could not be saved. The same command goes on from what was saved before."),
    ],
)
def test_an_interrupted_training_says_whether_it_is_saved(saved, said):
    assert said in train.closing_words("interrupted", 6, saved, Path("runs/a"), [], recipe("digits"))


def resolved(*words):
    config = train.resolve(make_parser().parse_args(["train", *words]))
    return {**vars(config.model), **vars(config.gradient)}


def test_a_form_says_which_blocks_there_are_and_how_they_are_trained():
    between, shared = (resolved("images", "--form", form) for form in ("2+4+1", "0+4+0"))
    blocks = ("num_pre", "num_core", "num_post", "no_grad_max", "with_grad_max", "warm_share")
    assert [between[name] for name in blocks] == [2, 4, 1, 6, 6, 0.0]
    assert [shared[name] for name in blocks] == [0, 4, 0, 0, 4, 0.5]
    assert between["input_skip"] is between["time_in_pre_post"] is True
    assert resolved("digits", "--form", "1+1+1", "--num-post", "2")["num_post"] == 2, "single fields override it"
    gated = resolved("images", "--form", "0+3+0", "--injection", "gate")
    assert (gated["injection"], gated["input_skip"]) == ("gate", False)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--form", "1-1-1"], "form is '1-1-1'; it must be explicit, shared .* like 1\\+1\\+1"),
        (["--form", "1+0+1"], "form is '1\\+0\\+1'"),
        (["--form", "1+1+1", "--network", "dit", "--depth", "3"], "an explicit network has --depth, and no --form"),
        (["--form", "1+1+1", "--init-from", "folder"], "the model in folder has its form"),
    ],
)
def test_a_form_that_cannot_be_is_refused(words, message):
    with pytest.raises(ValueError, match=message):
        resolved("images", *words)


@pytest.mark.parametrize("flag", ["--exit-loss", "--sharding", "--tracker"])
def test_none_is_a_word_where_it_is_a_choice(flag):
    options = make_parser().parse_args(["train", "digits", flag, "none", "--min-snr-gamma", "none"])
    config = train.resolve(options)
    assert config == recipe("digits")
