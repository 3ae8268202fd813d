"""One function per recipe, each returning a complete config. The docstring says what it takes and what comes out."""

from collections.abc import Callable

from fpdm.names import unknown
from fpdm.recipes.cifar10 import cifar10
from fpdm.recipes.digits import digits
from fpdm.recipes.fashion_mnist import fashion_mnist
from fpdm.recipes.images import images
from fpdm.recipes.latents import celebahq256, ffhq256, imagenet256, lsun_church256
from fpdm.training.config import Config

RECIPES: dict[str, Callable[[], Config]] = {
    recipe.__name__: recipe
    for recipe in (digits, fashion_mnist, cifar10, images, imagenet256, ffhq256, celebahq256, lsun_church256)
}


def recipe(name: str) -> Config:
    """The config of a named recipe. Raises ValueError for another name."""
    name = name.replace("-", "_")
    if name not in RECIPES:
        raise ValueError(unknown("recipe", name, RECIPES))
    return RECIPES[name]()


__all__ = ["RECIPES", "recipe"]
