"""Cached latents: what is encoded is what training would have seen, and each draw of it is from the posterior."""

import hashlib
import json
import pickle
import shutil

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import load_file
from torch.utils.data import DataLoader

from fpdm.data import (
    ImageFolder,
    Latent,
    LatentFolder,
    LatentPreparation,
    Slots,
    Stream,
    encoding,
    holds_latents,
)
from fpdm.data.encoding import Encoder, open_autoencoder
from fpdm.data.stream import collate, loader
from fpdm.data.transforms import central, pixels, prepare
from fpdm.keyed import generator
from fpdm.weights import digest

SIZE, SIDE = 16, 8  # of the images, and of their latents
COUNT, SHARD = 8, 3


def save_autoencoder(folder, seed=0, attention=True, **changes):
    """An autoencoder of random weights, which halves the sides of images; its folder."""
    settings = {
        "block_out_channels": (8, 16), "norm_num_groups": 4, "layers_per_block": 1, "latent_channels": 4,
        "down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2,
        "mid_block_add_attention": attention, "scaling_factor": 0.5, "shift_factor": 0.1, "sample_size": SIZE,
    }  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        AutoencoderKL(**{**settings, **changes}).save_pretrained(folder)
    return str(folder)


def save_images(folder, count=COUNT, broken=(), classes=("cat", "owl"), seed=0):
    """Images of noise, wide and tall, the first half of one class; those of the numbers in `broken` are none."""
    chance = np.random.default_rng(seed)
    for i in range(count):
        path = folder / classes[i * len(classes) // count] / f"{i}.png" if classes else folder / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        sides = (20 + i, 37) if i % 2 else (37, 20 + i)
        Image.fromarray(chance.integers(0, 256, (*sides, 3), dtype=np.uint8)).save(path)
        if i in broken:
            path.write_bytes(b"no image")
    return folder


def encode(source, vae, out, size=SIZE, dtype=torch.float32, **options):
    """Encode a folder of images; what was left out."""
    network, autoencoder = open_autoencoder(vae)
    encoder = Encoder(ImageFolder(source), network.to(dtype), autoencoder, out, size, **options)
    encoder.claim()
    encoder.run()
    return encoder.finish()


def latents_in(folder):
    """What is there but for locks and torn files: the index less its checksums, and the tensors of each shard."""
    files = [path for path in folder.iterdir() if not path.name.startswith(".")]
    index = json.loads((folder / "latents.json").read_text())
    for shard in index["shards"]:
        assert hashlib.sha256((folder / shard["file"]).read_bytes()).hexdigest() == shard.pop("sha256")
    tensors = {path.name: load_file(path) for path in files if path.suffix == ".safetensors"}
    tensors = {(file, name): t.numpy().tobytes() for file, some in tensors.items() for name, t in some.items()}
    return index, (folder / "request.json").read_text(), tensors, {path.name for path in files}


def flip_a_byte(path):
    damaged = bytearray(path.read_bytes())
    damaged[-20] ^= 1
    path.write_bytes(damaged)


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    return save_autoencoder(tmp_path_factory.mktemp("vae"))


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return save_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(encoding, "SHARD", SHARD)


@pytest.fixture(scope="module")
def made(vae, images, tmp_path_factory):
    """Latents in three shards, with mirrored ones. Not to be written to."""
    out = tmp_path_factory.mktemp("latents")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoding, "SHARD", SHARD)
        assert encode(images, vae, out, mirrored=True) == []
    return out


@pytest.fixture
def copy(made, tmp_path):
    return shutil.copytree(made, tmp_path / "copy")


# What is encoded


def posterior_of(vae, image, mirrored=False):
    x = prepare(image, SIZE, "center", False, generator(0))
    with torch.no_grad():
        found = AutoencoderKL.from_pretrained(vae).encode((x.flip(2) if mirrored else x)[None]).latent_dist
    return found.mean[0].half(), found.std[0].half()


def test_latents_are_the_posteriors_of_images_as_training_crops_them_and_of_their_mirror_images(vae, images, made):
    source, folder = ImageFolder(images), LatentFolder(made)
    assert (len(folder), folder.shape, folder.channels) == (COUNT, (4, SIDE, SIDE), 4)
    for i in range(COUNT):
        image, label = source.load(i)
        latent, same = folder.load(i)
        assert same == label
        assert latent.mean.dtype == latent.std.dtype == torch.float16
        for found, mirrored in ((latent[:2], False), (latent.mirrored, True)):
            for mine, wanted in zip(found, posterior_of(vae, image, mirrored), strict=True):
                torch.testing.assert_close(mine, wanted, rtol=2e-3, atol=1e-3)
        assert (latent.mean - latent.mirrored[0]).abs().max() > 0.1


def test_the_batch_size_changes_nothing_that_matters(vae, images, made, tmp_path):
    encode(images, vae, tmp_path / "out", mirrored=True, batch_size=2)
    for name in ("mean", "std", "mirrored_mean", "mirrored_std"):
        mine, others = (load_file(out / "latents-00000.safetensors")[name] for out in (made, tmp_path / "out"))
        torch.testing.assert_close(mine, others, rtol=2e-3, atol=1e-3)


def test_mirrored_latents_are_kept_only_where_asked_for(vae, images, tmp_path):
    encode(images, vae, tmp_path / "out")
    folder = LatentFolder(tmp_path / "out")
    assert not folder.mirrored
    assert folder.load(0)[0].mirrored is None
    assert set(load_file(tmp_path / "out/latents-00000.safetensors")) == {"mean", "std", "labels"}


@pytest.mark.parametrize("classes", [(), ("cat", "owl")])
def test_classes_and_their_names_are_kept(classes, vae, tmp_path):
    source = ImageFolder(save_images(tmp_path / "images", 4, classes=classes))
    encode(source.root, vae, tmp_path / "out")
    folder = LatentFolder(tmp_path / "out")
    assert folder.class_names == list(classes) == source.class_names
    assert folder.labels == ([0, 0, 1, 1] if classes else [0] * 4) == source.labels


def test_an_autoencoder_with_attention_encodes_batches(images, tmp_path):
    attentive = save_autoencoder(tmp_path / "vae", attention=True)
    encode(images, attentive, tmp_path / "out")
    image, _ = ImageFolder(images).load(1)
    mean = LatentFolder(tmp_path / "out").load(1)[0].mean
    torch.testing.assert_close(mean, posterior_of(attentive, image)[0], rtol=2e-3, atol=1e-3)


def test_the_index_tells_the_autoencoder_and_a_checksum_of_each_shard(vae, made):
    index = json.loads((made / "latents.json").read_text())
    weights = digest(AutoencoderKL.from_pretrained(vae))
    assert index["autoencoder"] == {"name": vae, "digest": weights, "scale": 0.5, "shift": 0.1}
    assert [shard["images"] for shard in index["shards"]] == [3, 3, 2]
    for number, shard in enumerate(index["shards"]):
        assert shard["file"] == f"latents-{number:05d}.safetensors"
        assert shard["sha256"] == hashlib.sha256((made / shard["file"]).read_bytes()).hexdigest()


def test_broken_images_are_left_out_and_named_even_where_they_fill_a_shard(vae, tmp_path):
    source = save_images(tmp_path / "images", broken=(1, 3, 4, 5))
    broken = encode(source, vae, tmp_path / "out", mirrored=True)
    assert [name.split(":")[0] for name in broken] == ["cat/1.png", "cat/3.png", "owl/4.png", "owl/5.png"]
    folder = LatentFolder(tmp_path / "out")
    assert json.loads((tmp_path / "out/latents.json").read_text())["broken"] == broken
    assert [shard["images"] for shard in folder.shards] == [2, 0, 2]
    assert folder.labels == [0, 0, 1, 1]
    for i, number in enumerate((0, 2, 6, 7)):
        wanted = posterior_of(vae, ImageFolder(source).load(number)[0])[0]
        torch.testing.assert_close(folder.load(i)[0].mean, wanted, rtol=2e-3, atol=1e-3)


def test_images_of_which_none_can_be_read_are_refused(vae, tmp_path):
    source = save_images(tmp_path / "images", 2, broken=(0, 1))
    with pytest.raises(ValueError, match=r"none of the images can be read: cat/0\.png"):
        encode(source, vae, tmp_path / "out")
    assert not (tmp_path / "out/latents.json").exists()


@pytest.mark.parametrize(
    ("size", "changes", "message"),
    [(15, {}, "15 is not a multiple of 2"), (16, {"in_channels": 4}, "takes 4 channels; images have 1 or 3")],
)
def test_what_does_not_fit_the_autoencoder_is_refused(size, changes, message, images, tmp_path):
    with pytest.raises(ValueError, match=message):
        encode(images, save_autoencoder(tmp_path / "vae", **changes), tmp_path / "out", size)


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB")])
def test_images_are_given_the_channels_that_the_autoencoder_takes(channels, mode, images, tmp_path):
    vae = save_autoencoder(tmp_path / "vae", in_channels=channels)
    encode(images, vae, tmp_path / "out")
    folder, image = LatentFolder(tmp_path / "out"), ImageFolder(images).load(0)[0].convert(mode)
    seen = (pixels(central(image, SIZE)).float() / 127.5 - 1)[None]
    with torch.no_grad():
        wanted = open_autoencoder(vae)[0].encode(seen).latent_dist.mean[0]
    torch.testing.assert_close(folder.load(0)[0].mean.float(), wanted, rtol=2e-3, atol=1e-3)


def test_the_autoencoder_of_a_pipeline_is_found_in_it_and_is_the_same_wherever_it_lies(vae, tmp_path):
    shutil.copytree(vae, tmp_path / "pipe/vae")
    there, here = open_autoencoder(str(tmp_path / "pipe"))[1], open_autoencoder(vae)[1]
    assert there.digest == here.digest
    assert open_autoencoder(save_autoencoder(tmp_path / "other", seed=1))[1].digest != here.digest


def damaged(folder, what):
    if what == "weights":
        path = folder / "diffusion_pytorch_model.safetensors"
        path.write_bytes(path.read_bytes()[:1000])
    elif what == "no weights":
        (folder / "diffusion_pytorch_model.safetensors").unlink()
    elif what == "config":
        (folder / "config.json").write_text("{")
    else:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "scaling_factor": None}))
    return str(folder)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("weights", "cannot be opened"), ("no weights", "cannot be opened"), ("config", "cannot be opened"),
        ("scale", "tells no scaling_factor"),
    ],
)  # fmt: skip
def test_an_autoencoder_that_cannot_be_used_is_named(what, message, vae, tmp_path):
    folder = damaged(shutil.copytree(vae, tmp_path / "vae"), what)
    with pytest.raises(ValueError, match=message) as raised:
        open_autoencoder(folder)
    assert folder in str(raised.value)


# Begun, and gone on with


def test_what_is_there_is_not_encoded_again_and_what_is_torn_is(vae, images, made, copy):
    (copy / "latents.json").unlink()
    (copy / "latents-00001.safetensors").unlink()
    (copy / ".latents-00001.safetensors.1.writing").write_bytes(b"half a fi")
    last = copy / "latents-00002.safetensors"
    last.write_bytes(last.read_bytes()[:-1])
    kept = (copy / "latents-00000.safetensors").stat().st_mtime_ns
    encode(images, vae, copy, mirrored=True)
    assert latents_in(copy) == latents_in(made)
    assert (copy / "latents-00000.safetensors").stat().st_mtime_ns == kept

    times = {path.name: path.stat().st_mtime_ns for path in copy.glob("*.safetensors")}
    encode(images, vae, copy, mirrored=True)
    assert times == {path.name: path.stat().st_mtime_ns for path in copy.glob("*.safetensors")}


def test_the_same_images_give_the_same_files_so_that_a_run_can_go_on_with_a_shard_made_anew(vae, tmp_path, monkeypatch):
    monkeypatch.setattr(encoding, "SHARD", 1)
    source = save_images(tmp_path / "images", 16)
    for name in "ab":
        encode(source, vae, tmp_path / name)
    one, other = (LatentFolder(tmp_path / name).fingerprint for name in "ab")
    assert one == other


def test_processes_share_the_shards_and_leave_those_of_others_alone(vae, images, made, tmp_path):
    network, autoencoder = open_autoencoder(vae)
    done = []
    for process in (3, 1, 2, 0):  # of which one has no shard
        encoder = Encoder(
            ImageFolder(images), network, autoencoder, tmp_path / "out", SIZE, True, process=(process, 4),
            on_image=done.append,
        )  # fmt: skip
        encoder.claim()
        assert encoder.missing() == ([process] if process < 3 else [])  # of its own, whatever others have done
        encoder.run()
    assert done == [3, 2, 3]
    encoder.finish()
    assert latents_in(tmp_path / "out") == latents_in(made)


def test_a_folder_is_of_one_request_and_what_differs_is_named(vae, images, copy, tmp_path):
    other = save_autoencoder(tmp_path / "other", seed=1)
    elsewhere = save_images(tmp_path / "images", seed=1)
    before = latents_in(copy)
    for (source, by, size, mirrored), named in (
        ((images, other, SIZE, True), "autoencoder"),
        ((images, vae, 2 * SIZE, True), "size"),
        ((elsewhere, vae, SIZE, True), "images"),
        ((images, vae, SIZE, False), "mirrored"),
        ((elsewhere, other, SIZE, True), "images, autoencoder"),
    ):
        with pytest.raises(ValueError, match=rf"something else \({named}\)"):
            encode(source, by, copy, size, mirrored=mirrored)
    assert latents_in(copy) == before


def test_a_folder_is_of_one_dtype(vae, images, copy):
    with pytest.raises(ValueError, match="dtype"):
        encode(images, vae, copy, mirrored=True, dtype=torch.bfloat16)


def test_latents_that_are_not_finite_are_refused(images, tmp_path):
    vae = save_autoencoder(tmp_path / "vae")
    network = AutoencoderKL.from_pretrained(vae)
    with torch.no_grad():
        network.quant_conv.bias.fill_(1e6)  # float16 ends at 65,504
    network.save_pretrained(vae)
    with pytest.raises((ValueError, FloatingPointError), match="finite"):
        encode(images, vae, tmp_path / "out")


# The folder as a source


def test_any_latent_is_loaded_from_any_shard_in_any_order(made):
    folder = LatentFolder(made)
    shards = [load_file(made / shard["file"]) for shard in folder.shards]
    for name, place in (("mean", 0), ("std", 1)):
        whole = torch.cat([shard[name] for shard in shards])
        for i in (7, 0, 3, 2, 6, 5, 1, 4):
            assert torch.equal(folder.load(i)[0][place], whole[i])
    assert len({folder.load(i)[0].mean.numpy().tobytes() for i in range(COUNT)}) == COUNT


def test_the_fingerprint_tells_other_latents_and_not_another_place(made, copy, images, tmp_path):
    assert LatentFolder(copy).fingerprint == LatentFolder(made).fingerprint
    encode(images, save_autoencoder(tmp_path / "other", seed=1), tmp_path / "others", mirrored=True)
    assert LatentFolder(tmp_path / "others").fingerprint != LatentFolder(made).fingerprint


def test_a_folder_in_use_is_pickled_without_its_open_files(made):
    folder = LatentFolder(made)
    folder.load(4)
    twin = pickle.loads(pickle.dumps(folder))
    assert all(torch.equal(a, b) for a, b in zip(twin.load(4)[0][:2], folder.load(4)[0][:2], strict=True))


def test_spawned_workers_give_what_the_process_itself_does(made):
    stream = Stream(LatentFolder(made), LatentPreparation(0.5, 0.1, flip=True), batch_size=4, seed=3)
    slots = Slots(0, 3, 4)
    stream.source.load(0)  # opens a shard
    workers = DataLoader(
        stream, batch_sampler=slots, num_workers=1, collate_fn=collate, multiprocessing_context="spawn"
    )
    for mine, other in zip(loader(stream, slots, 0, False), workers, strict=True):
        assert torch.equal(mine.images, other.images)
        assert torch.equal(mine.labels, other.labels)
        assert mine.images.shape == (4, 4, SIDE, SIDE)


def test_a_flipped_byte_is_noticed_and_its_shard_named(vae, images, made, copy):
    LatentFolder(copy)  # which remembers what it compared
    flip_a_byte(copy / "latents-00001.safetensors")
    with pytest.raises(ValueError, match=r"latents-00001\.safetensors is damaged.*again"):
        LatentFolder(copy)
    # What the message says helps.
    encode(images, vae, copy, mirrored=True)
    assert latents_in(copy) == latents_in(made)
    assert LatentFolder(copy).fingerprint == LatentFolder(made).fingerprint


def test_a_cache_that_cannot_be_written_to_hides_no_damage(copy, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("FPDM_CACHE", str(tmp_path / "file/cache"))
    assert len(LatentFolder(copy)) > 0
    flip_a_byte(copy / "latents-00001.safetensors")
    with pytest.raises(ValueError, match=r"latents-00001\.safetensors is damaged"):
        LatentFolder(copy)


@pytest.mark.parametrize(
    "gone",
    [("latents.json",), ("*.sha256",), (), ("*1.sha256", "latents.json")],
    ids=["no index", "index of an older version", "both", "neither"],
)
def test_a_damaged_shard_is_encoded_again_and_never_taken_for_sound(gone, vae, images, made, copy):
    for path in (path for name in gone for path in copy.glob(name)):
        path.unlink()
    flip_a_byte(copy / "latents-00001.safetensors")
    kept = (copy / "latents-00000.safetensors").stat().st_mtime_ns
    encode(images, vae, copy, mirrored=True)
    assert LatentFolder(copy).fingerprint == LatentFolder(made).fingerprint
    assert (copy / "latents-00000.safetensors").stat().st_mtime_ns == kept


@pytest.mark.parametrize("text", [b"", b"\xff\xfe", b"0" * 64 + b"  latents-00001.safetensors\n"])
def test_a_shard_whose_checksum_is_damaged_is_encoded_again(text, vae, images, made, copy):
    (copy / "latents-00001.sha256").write_bytes(text)
    (copy / "latents.json").write_text("{")
    encode(images, vae, copy, mirrored=True)
    assert latents_in(copy) == latents_in(made)


def test_a_checksum_is_kept_as_sha256sum_reads_it(made):
    shard = made / "latents-00002.safetensors"
    assert (
        shard.with_suffix(".sha256").read_text() == f"{hashlib.sha256(shard.read_bytes()).hexdigest()}  {shard.name}\n"
    )


@pytest.mark.parametrize(
    ("gone", "message"),
    [
        (["latents.json"], "is not complete: run the same `fpdm latents` again"),
        (["latents-00001.safetensors"], r"latents-00001\.safetensors is missing: run the same `fpdm latents` again"),
        (
            ["latents.json", *(f"latents-0000{i}.safetensors" for i in range(3))],
            r"holds no latents\.json\. .* are made",
        ),
    ],
)
def test_what_is_missing_is_told_with_what_to_do(gone, message, copy):
    for name in gone:
        (copy / name).unlink()
    with pytest.raises(ValueError, match=message) as raised:
        LatentFolder(copy)
    assert str(copy) in str(raised.value)
    assert holds_latents(copy) is (len(gone) == 1)


@pytest.mark.parametrize(("text", "message"), [("{", "is damaged"), ('{"format": 2}', "is of format 2, not 1")])
def test_an_index_that_cannot_be_read_is_named(text, message, copy):
    (copy / "latents.json").write_text(text)
    with pytest.raises(ValueError, match=rf"latents\.json {message}"):
        LatentFolder(copy)


# Draws


DRAWS = 4000


def latent_of(mirrored=True):
    """Means and deviations that differ by place, and mirrored ones far from the others."""
    mean = torch.linspace(-2, 2, 4).reshape(1, 2, 2).half()
    std = torch.tensor([0.1, 0.5, 1.0, 2.0]).reshape(1, 2, 2).half()
    return Latent(mean, std, (mean + 100, std.flip(0, 1, 2)) if mirrored else None)


def draws(latent, count=DRAWS, **options):
    prepare = LatentPreparation(0.5, 0.1, **options)
    return torch.stack([prepare(latent, generator("draw", i)) for i in range(count)])


@pytest.mark.parametrize("mirrored", [False, True])
def test_draws_have_the_mean_and_deviation_of_the_posterior_scaled_and_shifted(mirrored):
    latent = latent_of(mirrored)
    found = draws(latent)
    error = 5 * 0.5 * latent.std.float() / DRAWS**0.5
    assert ((found.mean(0) - (latent.mean.float() - 0.1) * 0.5).abs() < error).all()
    assert ((found.std(0) - 0.5 * latent.std.float()).abs() < error).all()
    assert found.dtype == torch.float32


def test_half_of_the_draws_are_of_the_mirrored_image_where_asked_for():
    latent = latent_of()
    found = draws(latent, flip=True)
    mirrored = found.mean((1, 2, 3)) > 25
    assert abs(float(mirrored.float().mean()) - 0.5) < 5 * 0.5 / DRAWS**0.5
    torch.testing.assert_close(found[mirrored].std(0), 0.5 * latent.mirrored[1].float(), rtol=0.1, atol=0)
    torch.testing.assert_close(found[~mirrored].std(0), 0.5 * latent.std.float(), rtol=0.1, atol=0)


def test_a_draw_follows_from_its_generator_and_nothing_else():
    latent, prepare = latent_of(), LatentPreparation(0.5, 0.1, flip=True)
    torch.manual_seed(1)
    one = prepare(latent, generator("draw", 1))
    torch.manual_seed(2)
    assert torch.equal(one, prepare(latent, generator("draw", 1)))
    assert not torch.equal(one, prepare(latent, generator("draw", 2)))


def test_each_epoch_draws_anew(made):
    stream = Stream(LatentFolder(made), LatentPreparation(0.5, 0.1), batch_size=COUNT, seed=0)
    epochs = [{stream[step, slot].image.numpy().tobytes() for slot in range(COUNT)} for step in range(2)]
    assert not epochs[0] & epochs[1]
