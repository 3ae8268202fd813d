"""What a network predicts, and how x0 follows from it.

    x_t = a x0 + s eps,  a = sqrt(alpha_bar_t),  s = sqrt(1 - alpha_bar_t)
    v   = a eps - s x0                                          (Salimans and Ho 2022)

`alpha_bar` is a tensor that broadcasts against the images.
"""

from torch import Tensor

from fpdm.names import unknown

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


def add_noise(x0: Tensor, noise: Tensor, alpha_bar: Tensor) -> Tensor:
    """x_t from images `x0` (B, C, H, W) and noise of their shape."""
    return alpha_bar.sqrt() * x0 + (1 - alpha_bar).sqrt() * noise


def target(kind: str, x0: Tensor, noise: Tensor, alpha_bar: Tensor) -> Tensor:
    """What a network of prediction type `kind` should return (B, C, H, W)."""
    if kind == "epsilon":
        return noise
    if kind == "sample":
        return x0
    if kind == "v_prediction":
        return alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * x0
    raise ValueError(unknown("prediction type", kind, PREDICTION_TYPES))


def predicted_x0(kind: str, prediction: Tensor, x_t: Tensor, alpha_bar: Tensor) -> Tensor:
    """The x0 (B, C, H, W) that follows from a network's `prediction` at `x_t`."""
    a, s = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    if kind == "epsilon":
        return (x_t - s * prediction) / a
    if kind == "sample":
        return prediction
    if kind == "v_prediction":
        return a * x_t - s * prediction
    raise ValueError(unknown("prediction type", kind, PREDICTION_TYPES))
