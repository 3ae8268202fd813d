"""The classifier was trained on images that samples are compared with: it must not see others as less like them."""

import numpy as np
import torch

from fpdm.data import digits
from fpdm.evaluation.extractors.classifier import Classifier, load_all
from fpdm.evaluation.metrics import Moments, frechet_distance
from fpdm.keyed import generator


def test_images_it_was_not_shown_are_as_near_as_those_it_was(tmp_path):
    source = digits()
    classifier = Classifier.for_data(source, 8, None, "cpu", tmp_path)
    images, labels = load_all(source, 8)
    with torch.no_grad():
        features = classifier.features(images).double().numpy()
    order = torch.randperm(len(images), generator=generator("classifier", "held out")).numpy()
    held_out, shown = order[: classifier.held_out], order[classifier.held_out :]

    known = Moments.of(features[shown])
    distance = frechet_distance(Moments.of(features[held_out]), known)
    members = [shown[labels.numpy()[shown] == c] for c in range(10)]
    counts = np.bincount(labels.numpy()[held_out], minlength=10)
    others = []
    for i in range(20):
        chance = np.random.default_rng(i)
        chosen = [chance.choice(of_class, n, replace=False) for of_class, n in zip(members, counts, strict=True)]
        part = Moments.of(features[np.concatenate(chosen)])
        others.append(frechet_distance(part, known.without(part)))
    assert distance < np.mean(others) + 2 * np.std(others), (distance, np.mean(others), np.std(others))
