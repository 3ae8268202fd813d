"""Results of experiments, made by hand."""

from PIL import Image

MODELS = {"fpdm": "FPDM", "dit": "DiT"}
PARAMETERS = {"fpdm": 250_000, "dit": 1_234_567}


def point(model, way, budget, value, seed=0, best=True):
    measures = {"FD-fake": [value, value - 0.1, value + 0.1], "KD": [9.0, 9.0, 9.0]}
    return {"model": model, "way": way, "budget": budget, "seed": seed, "best": best, "measures": measures}


def result_of(points, models=MODELS, ways=("DDIM", "UniPC"), budgets=(24, 560), real=0.125):
    return {
        "question": "Which is better?",
        "models": models,
        "ways": list(ways),
        "budgets": list(budgets),
        "trainings": [{"model": label, "parameters": PARAMETERS[label]} for label in models],
        "points": points,
        "real": real and {"FD-fake": real, "KD": 0.0},
    }


def two_models():
    """FPDM is better at 24, with DDIM; DiT at 560, with UniPC, by which FPDM has none there."""
    return result_of([
        *(point("fpdm", "DDIM", 24, value, seed) for seed, value in enumerate((1.0, 2.0, 3.0))),
        point("fpdm", "UniPC", 24, 0.5, best=False),
        point("fpdm", "DDIM", 560, 1.5),
        point("dit", "DDIM", 24, 7.0, best=False), point("dit", "UniPC", 24, 6.0),
        *(point("dit", "UniPC", 560, value, seed) for seed, value in enumerate((0.5, 1.5))),
    ])  # fmt: skip


def many_models(count):
    """Models m0, m1, ... of 1 M parameters, with a distance of 1, 2, ... at 24 passes, in one training."""
    labels = [f"m{i}" for i in range(count)]
    many = result_of([point(label, "DDIM", 24, 1.0 + i) for i, label in enumerate(labels)], models={}, ways=("DDIM",))
    trainings = [{"model": label, "parameters": 10**6} for label in labels]
    return {**many, "models": {label: label for label in labels}, "trainings": trainings}


def is_drawn(path):
    with Image.open(path) as image:
        return image.format == "PNG" and len(image.convert("RGB").getcolors(10**7)) > 5
