"""A small classifier of the data set itself: for tiny images, which networks trained on photographs see nothing in."""

import json
import warnings
from collections.abc import Iterator
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from fpdm.data import BrokenImage, Source, central, pixels
from fpdm.files import check_writable, wait_for, write_aside
from fpdm.keyed import generator, seed_of
from fpdm.weights import digest, fill

FEATURES = 64
WIDTH = 32
LARGEST = 64  # side of the images; beyond, a network trained on photographs is the better eye
BATCH, RATE = 128, 2e-3
EPOCHS, MOST_STEPS = 24, 2000  # few: a network that has memorised images sees those it was shown unlike all others
HEADER = {"data", "size", "channels", "class_names", "accuracy", "held_out"}
MOST_HELD_OUT = 10_000
NOISE = 0.3  # largest standard deviation added in training, in images in [-1, 1]: samples are not quite clean


class Net(nn.Module):
    """Convolutions of stride 2 down to 4 x 4 or less, a linear map to the features, and one to the classes.

    The features are shifted and scaled so that over the data their mean is 0 and their mean square 1: distances then
    are in units of the data's own spread, and the cubic kernel is where it tells sets apart.
    """

    def __init__(self, size: int, channels: int, classes: int):
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(channels, WIDTH, 3, padding=1), nn.ReLU()]
        width = WIDTH
        while size > 4:
            layers += [nn.Conv2d(width, 2 * WIDTH, 3, stride=2, padding=1), nn.ReLU()]
            size, width = (size + 1) // 2, 2 * WIDTH
        self.body = nn.Sequential(*layers, nn.Flatten(), nn.Linear(width * size**2, FEATURES))
        self.head = nn.Linear(FEATURES, classes)
        self.shift, self.scale = nn.Buffer(torch.zeros(FEATURES)), nn.Buffer(torch.ones(()))

    def features(self, x: Tensor) -> Tensor:
        return (self.body(x) - self.shift) / self.scale

    def logits(self, features: Tensor) -> Tensor:
        return self.head(F.relu(features * self.scale + self.shift))

    def forward(self, x: Tensor) -> Tensor:
        return self.logits(self.features(x))

    @torch.no_grad()
    def standardise(self, images: Tensor) -> None:
        """Set shift and scale by (N, C, H, W) uint8."""
        device = self.shift.device
        features = torch.cat([self.body(scaled(part.to(device))) for part in images.split(BATCH)])
        self.shift.copy_(features.mean(0))
        self.scale.copy_((features - self.shift).square().mean().sqrt())


class Classifier:
    """The 64 features before the last activation of a small convolutional network, trained on the data set.

    It is kept in one file, whose header tells of which data it was trained on and how many of the images that it was
    not shown it names rightly.
    """

    name, distance = "classifier", "FD-classifier"

    def __init__(self, net: Net, header: dict[str, Any], device: str = "cpu"):
        self.net, self.device = net.requires_grad_(False).eval().to(device), device
        self.header = header
        self.channels = (header["channels"],)
        self.class_names: list[str] = header["class_names"]
        self.accuracy: float = header["accuracy"]
        self.held_out: int = header["held_out"]
        self.identity = {"network": self.name, "weights": digest(net), "size": header["size"]}

    def features(self, images: Tensor) -> Tensor:
        return self.net.features(scaled(images.to(self.device)))

    def classify(self, features: Tensor) -> Tensor:
        """Classes (B,) int64 from features (B, D)."""
        return self.net.logits(features.to(self.device)).argmax(1)

    @classmethod
    def for_data(cls, source: Source, size: int, weights: str | None, device: str, cache: Path) -> Self:
        """The classifier of a data set at a size: the file `weights`, or one that the package carries, or one that was
        trained before, or one trained now.

        Raises ValueError for images that are too large or without classes, or for weights of others.
        """
        if size > LARGEST or len(source.class_names) < 2:
            what = f"{size} x {size} images" if size > LARGEST else "data without classes"
            raise ValueError(
                f"the classifier is for images with classes, at most {LARGEST} x {LARGEST}; these are {what}: "
                "take --features efficientnet-lite0"
            )
        if weights is not None:
            return cls.load(Path(weights), source, size, device)
        # The fingerprint of a folder is the same in grey and in colour.
        wanted = {"data": source.fingerprint, "size": size, "channels": source.channels}
        kept = cache / f"classifier-{size}-{source.channels}-{source.fingerprint[:16]}.safetensors"
        with as_file(files("fpdm.evaluation") / "classifiers") as carried:
            for path in sorted(carried.glob("*.safetensors")):
                if wanted.items() <= read_header(path).items():
                    return cls.load(path, source, size, device)
        if is_sound(kept):
            return cls.load(kept, source, size, device)
        check_writable(cache)
        with wait_for(kept):
            if is_sound(kept):  # another process made it
                return cls.load(kept, source, size, device)
            if kept.is_file():
                warnings.warn(f"{kept.name} in the cache is damaged, and made anew", stacklevel=2)
            trained = cls.train(source, size, device)
            trained.save(kept)
        return trained

    @classmethod
    def load(cls, path: Path, source: Source, size: int, device: str) -> Self:
        """Raises ValueError for a file that is damaged, or of images of another size or with other classes."""
        header = read_header(path)
        wanted = {"size": size, "channels": source.channels, "class_names": source.class_names}
        if wrong := [f"{key} {header[key]}, not {value}" for key, value in wanted.items() if header[key] != value]:
            raise ValueError(f"the classifier {path} is of other images: {'; '.join(wrong)}")
        net = Net(size, source.channels, len(source.class_names))
        fill(net, {name: weight.float() for name, weight in load_file(path).items()}, path)
        return cls(net, header, device)

    def save(self, path: Path) -> None:
        """Write the weights as float16, which they are rounded to, with the header."""
        path.parent.mkdir(parents=True, exist_ok=True)
        weights = {name: weight.cpu().half() for name, weight in self.net.state_dict().items()}
        write_aside(path, lambda aside: save_file(weights, aside, {"classifier": json.dumps(self.header)}))

    @classmethod
    def train(cls, source: Source, size: int, device: str) -> Self:
        """Train on nine tenths of the images; the accuracy is measured on the others (at most 10,000)."""
        images, labels = load_all(source, size)
        order = torch.randperm(len(images), generator=generator("classifier", "held out"))
        held_out = min(len(images) // 10, MOST_HELD_OUT)
        if held_out < 10:
            raise ValueError(f"{len(images)} images are too few to train a classifier on: it takes at least 100")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_of("classifier", "weights"))
            net = Net(size, source.channels, len(source.class_names)).to(device)
        shown = order[held_out:]
        steps = min(MOST_STEPS, -(-EPOCHS * len(shown) // BATCH))
        fit(net, images[shown], labels[shown], steps, device)
        net.standardise(images[shown])
        net.half().float()  # what is measured is what will be stored
        header = {
            "data": source.fingerprint,
            "size": size,
            "channels": source.channels,
            "class_names": source.class_names,
            "images": len(images) - held_out,
            "steps": steps,
            "accuracy": 0.0,
            "held_out": held_out,
        }
        trained = cls(net, header, device)
        rest = order[:held_out]
        named = torch.cat([trained.classify(trained.features(images[part])).cpu() for part in rest.split(BATCH)])
        accuracy = (named == labels[rest]).float().mean().item()
        return cls(net, {**header, "accuracy": round(accuracy, 4)}, device)


def fit(net: Net, images: Tensor, labels: Tensor, steps: int, device: str) -> None:
    """Train with AdamW on (N, C, H, W) uint8; all chance is keyed, so two trainings on one machine are the same."""
    optimizer = torch.optim.AdamW(net.parameters(), lr=RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps)
    parts = batches(len(images), steps)
    for step, part in enumerate(tqdm(parts, "training the classifier", steps, unit="step", leave=False)):
        chance = generator("classifier", "noise", step)
        x = scaled(images[part])
        x = x + NOISE * torch.rand((len(x), 1, 1, 1), generator=chance) * torch.randn(x.shape, generator=chance)
        loss = F.cross_entropy(net(x.to(device)), labels[part].to(device), label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def batches(count: int, steps: int) -> Iterator[Tensor]:
    """`steps` batches of image numbers: epoch after epoch, each in an order of its own."""
    order, epoch = torch.empty(0, dtype=torch.int64), 0
    for _ in range(steps):
        while len(order) < BATCH:
            order = torch.cat([order, torch.randperm(count, generator=generator("classifier", "order", epoch))])
            epoch += 1
        yield order[:BATCH]
        order = order[BATCH:]


def scaled(images: Tensor) -> Tensor:
    return images.float() / 127.5 - 1


def load_all(source: Source, size: int) -> tuple[Tensor, Tensor]:
    """Images (N, C, size, size) uint8 and labels (N,) of all that can be read."""
    images, labels = [], []
    for index in range(len(source)):
        try:
            image, label = source.load(index)
        except BrokenImage:
            continue
        images.append(pixels(central(image, size)))
        labels.append(label)
    if not images:
        raise ValueError("none of the images can be read")
    return torch.stack(images), torch.tensor(labels)


def is_sound(path: Path) -> bool:
    """Whether a classifier's file is there, and whole."""
    if not path.is_file():
        return False
    try:
        return bool(read_header(path))
    except ValueError:
        return False


def read_header(path: Path) -> dict[str, Any]:
    """What a classifier's file says of itself. Raises ValueError if it is none, or damaged."""
    try:
        with safe_open(path, "pt") as file:
            header = json.loads(file.metadata()["classifier"])
        if missing := HEADER - set(header):
            raise ValueError(f"its header lacks {', '.join(sorted(missing))}")
        return header
    except (OSError, SafetensorError, TypeError, KeyError, ValueError) as error:
        raise ValueError(f"{path} is not a classifier's file, or damaged: {error}") from error
