"""Many images as one picture."""

from collections.abc import Sequence

from PIL import Image


def grid(images: Sequence[Image.Image], columns: int, least: int = 32, gap: int = 2) -> Image.Image:
    """Equally sized images in rows of `columns`, in reading order; tiny ones enlarged to at least `least` pixels.

    Raises ValueError without images.
    """
    if not images:
        raise ValueError("there are no images to make a grid of")
    scale = max(1, -(-least // images[0].width))
    width, height = images[0].width * scale, images[0].height * scale
    across, rows = min(columns, len(images)), -(-len(images) // columns)
    picture = Image.new(images[0].mode, (across * (width + gap) + gap, rows * (height + gap) + gap), "white")
    for i, image in enumerate(images):
        row, column = divmod(i, columns)
        large = image.resize((width, height), Image.Resampling.NEAREST)
        picture.paste(large, (gap + column * (width + gap), gap + row * (height + gap)))
    return picture
