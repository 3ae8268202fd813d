"""`fpdm latents`: killed and gone on with, by several processes, one command at a time per folder."""

import multiprocessing
import os
import shutil
import signal
import socket

import pytest
import torch
from accelerate import PartialState
from diffusers import AutoencoderKL

from fpdm.cli.main import main
from fpdm.data import LatentFolder, encoding
from tests.commands import refusal, wait_for
from tests.data.test_latents import COUNT, SHARD, damaged, latents_in, save_autoencoder, save_images

FORK = multiprocessing.get_context("fork")  # which inherits what a test has patched, and has all imported


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    return save_autoencoder(tmp_path_factory.mktemp("vae"))


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return save_images(tmp_path_factory.mktemp("images"), broken=(2,))


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(encoding, "SHARD", SHARD)


@pytest.fixture
def words(images, vae, tmp_path):
    return command(images, vae, tmp_path / "out", "--flip")


@pytest.fixture(scope="module")
def undisturbed(images, vae, tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoding, "SHARD", SHARD)
        assert main(command(images, vae, out, "--flip")) == 0
    return latents_in(out)


def command(source, vae, out, *options):
    words = ["latents", source, "--vae", vae, "--out", out, "--image-size", 16, "--device", "cpu", *options]
    return [str(word) for word in words]


def member(words, index, count, port, before):
    rank = {"RANK": index, "LOCAL_RANK": index, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    if count > 1:
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), **{k: str(v) for k, v in rank.items()})
        PartialState._reset_state()  # of the tests before
    before(index)
    os._exit(main(words))


def start(words, count, before=lambda index: None):
    """As many processes as a launcher would start for one command, on gloo; each calls `before` with its index."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    members = [FORK.Process(target=member, args=(words, i, count, port, before)) for i in range(count)]
    for process in members:
        process.start()
    return members


def together(words, count=2, before=lambda index: None):
    """Exit statuses of the processes of a command; once one fails the others are ended, as launchers do it."""
    members = start(words, count, before)
    try:
        wait_for(lambda: any(p.exitcode for p in members) or all(p.exitcode is not None for p in members))
    finally:
        for process in members:
            process.kill()
            process.join()
    return [process.exitcode for process in members]


def test_what_is_done_and_what_is_left_out_is_told(words, tmp_path, capsys):
    assert main(words) == 0
    said = capsys.readouterr().out
    assert said.startswith("left out: cat/2.png: ")
    assert f"{COUNT - 1} latents in {tmp_path / 'out'}, 1 images left out" in said
    assert main(words) == 0
    assert capsys.readouterr().out == said


@pytest.mark.parametrize("flip", [False, True])
def test_mirrored_latents_are_an_option(flip, images, vae, tmp_path):
    assert main(command(images, vae, tmp_path / "out", *["--flip"] * flip)) == 0
    assert LatentFolder(tmp_path / "out").mirrored is flip


def test_another_dtype_encodes_nearly_alike_and_the_autoencoder_is_the_same(words, tmp_path):
    assert main(words) == 0
    other = [*words, "--out", str(tmp_path / "other"), "--dtype", "bfloat16"]
    assert main(other) == 0
    folders = [LatentFolder(tmp_path / name) for name in ("out", "other")]
    assert folders[0].autoencoder == folders[1].autoencoder
    means = [torch.stack([folder.load(i)[0].mean.float() for i in range(len(folder))]) for folder in folders]
    assert 0 < (means[0] - means[1]).abs().max() < 0.1


# Interrupted


def killed_at_shard(number, process=0):
    """Have a process die, by SIGKILL, in the middle of writing a shard."""
    save = encoding.save_file

    def patch(index):
        def half(tensors, path, about):
            if index == process and encoding.NAME.format(number) in path.name:
                path.write_bytes(b"half a fi")
                os.kill(os.getpid(), signal.SIGKILL)
            save(tensors, path, about)

        encoding.save_file = half

    return patch


@pytest.mark.parametrize("number", [0, 2])
def test_killed_in_the_middle_and_run_again_is_as_undisturbed(number, words, undisturbed, tmp_path, capsys):
    out = tmp_path / "out"
    assert together(words, 1, killed_at_shard(number)) == [-signal.SIGKILL]
    assert len(list(out.glob(".latents-*.writing"))) == 1
    times = {path: path.stat().st_mtime_ns for path in out.glob("latents-*.safetensors")}
    assert len(times) == number
    if number:
        with pytest.raises(ValueError, match="is not complete"):
            LatentFolder(out)
    assert main(words) == 0
    assert latents_in(out) == undisturbed
    assert times == {path: path.stat().st_mtime_ns for path in times}


def test_a_torn_file_is_cleared_away(words, tmp_path):
    together(words, 1, killed_at_shard(1))
    assert main(words) == 0
    assert not list((tmp_path / "out").glob(".*.writing"))


# Several processes


def test_two_processes_give_the_latents_of_one_and_tell_it_once(words, undisturbed, tmp_path, capfd):
    save = encoding.save_file

    def noting(index):
        def saving(tensors, path, about):
            (tmp_path / f"{index} {path.name.split('.')[1]}").touch()
            save(tensors, path, about)

        encoding.save_file = saving

    assert together(words, 2, noting) == [0, 0]
    assert {path.name for path in tmp_path.glob("[01] *")} == {"0 latents-00000", "1 latents-00001", "0 latents-00002"}
    assert latents_in(tmp_path / "out") == undisturbed
    assert capfd.readouterr().out.count(" latents in ") == 1


@pytest.mark.parametrize(("number", "process", "count"), [(2, 0, 2), (1, 1, 1)])
def test_of_two_processes_one_is_killed_and_one_or_two_go_on(number, process, count, words, undisturbed, tmp_path):
    assert together(words, 2, killed_at_shard(number, process))[process] == -signal.SIGKILL
    assert not (tmp_path / "out/latents.json").exists()
    assert together(words, count) == [0] * count
    assert latents_in(tmp_path / "out") == undisturbed


def test_what_is_refused_to_two_processes_ends_both_with_one_message(words, vae, tmp_path, capfd):
    assert main(words) == 0
    capfd.readouterr()
    statuses = together([*words, "--image-size", "32"])
    assert statuses[0] == 2
    assert capfd.readouterr().err.count("holds latents of something else (size)") == 1


# Refused


def test_a_second_command_in_the_same_folder_is_refused_and_harms_nothing(words, undisturbed, tmp_path, capsys):
    goes_on, out = FORK.Event(), tmp_path / "out"
    save = encoding.save_file

    def slowly(index):
        def saving(tensors, path, about):
            if encoding.NAME.format(1) in path.name:
                goes_on.wait(60)
            save(tensors, path, about)

        encoding.save_file = saving

    (first,) = start(words, 1, slowly)
    try:
        wait_for((out / encoding.NAME.format(0)).is_file)
        for options in ([], ["--image-size", "32"]):
            assert f"another command is at work in {out}" in refusal(capsys, [*words, *options])
        assert first.is_alive()
        goes_on.set()
        first.join(60)
        assert first.exitcode == 0
    finally:
        first.kill()
    assert latents_in(out) == undisturbed


def test_another_request_for_the_same_folder_is_refused_by_name(words, images, vae, undisturbed, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(words) == 0
    other, elsewhere = save_autoencoder(tmp_path / "vae", seed=1), save_images(tmp_path / "images", seed=1)
    for changed, name in (
        (command(images, other, out, "--flip"), "autoencoder"),
        (command(elsewhere, vae, out, "--flip"), "images"),
        ([*words, "--image-size", "32"], "size"),
        (command(images, vae, out), "mirrored"),
    ):
        assert f"{out} holds latents of something else ({name}): choose another --out" in refusal(capsys, changed)
    assert latents_in(out) == undisturbed


def test_the_same_autoencoder_and_images_elsewhere_are_the_same_request(words, images, vae, undisturbed, tmp_path):
    assert main(words) == 0
    moved = [shutil.copytree(folder, tmp_path / name) for folder, name in ((images, "images"), (vae, "vae"))]
    assert main(command(*moved, tmp_path / "out", "--flip")) == 0
    assert latents_in(tmp_path / "out")[2] == undisturbed[2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--batch-size", "0"], "must be at least 1"), (["--image-size", "-8"], "must be at least 1"),
        (["--image-size", "15"], "15 is not a multiple of 2"), (["--dtype", "int8"], "dtype 'int8' is not one of"),
        (["--device", "tpu"], "device 'tpu' is not available"), (["--split", "tset"], "tset"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_before_anything_is_written(options, message, words, tmp_path, capsys):
    assert message in refusal(capsys, [*words, *options])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("what", ["weights", "no weights", "config", "scale"])
def test_an_autoencoder_that_cannot_be_used_is_refused(what, images, vae, tmp_path, capsys):
    folder = damaged(shutil.copytree(vae, tmp_path / "vae"), what)
    assert folder in refusal(capsys, command(images, folder, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_the_images_folder_is_no_place_for_latents(images, vae, capsys):
    assert "is in the folder of the images" in refusal(capsys, command(images, vae, images / "latents"))
    assert not (images / "latents").exists()


@pytest.mark.parametrize("inside", ["", "transformer"])
def test_a_folder_that_is_no_autoencoder_is_refused(inside, models, images, tmp_path, capsys):
    folder = os.path.join(models["looped"], inside)
    assert folder in refusal(capsys, command(images, folder, tmp_path / "out"))


def test_the_encoder_sees_pixels_of_minus_one_to_one(words, monkeypatch):
    seen, encode = [], AutoencoderKL.encode
    monkeypatch.setattr(AutoencoderKL, "encode", lambda self, x: seen.append(x) or encode(self, x))
    assert main([*words, "--batch-size", "2"]) == 0
    assert {len(x) for x in seen} == {1, 2}
    assert -1 <= min(float(x.min()) for x in seen) < -0.9
    assert 0.9 < max(float(x.max()) for x in seen) <= 1
