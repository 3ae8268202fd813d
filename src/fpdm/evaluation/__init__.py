"""How good samples are, measured against real images: features, metrics, and statistics that are kept."""

from fpdm.evaluation.evaluate import Instrument
from fpdm.evaluation.extractors import EXTRACTORS, Classifier, Extractor, make_extractor
from fpdm.evaluation.metrics import Frechet, Moments, frechet_distance, kernel_distance, manifolds, nearest
from fpdm.evaluation.result import Evaluation, Measure
from fpdm.evaluation.samples import Samples, open_samples

__all__ = [
    "EXTRACTORS",
    "Classifier",
    "Evaluation",
    "Extractor",
    "Frechet",
    "Instrument",
    "Measure",
    "Moments",
    "Samples",
    "frechet_distance",
    "kernel_distance",
    "make_extractor",
    "manifolds",
    "nearest",
    "open_samples",
]
