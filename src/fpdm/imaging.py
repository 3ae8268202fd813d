"""Many images as one picture."""

from collections.abc import Sequence

from PIL import Image


def grid(images: Sequence[Image.Image | None], columns: int, least: int = 32, gap: int = 2) -> Image.Image:
    """Equally sized images in rows of `columns`, in reading order; tiny ones enlarged to at least `least` pixels. The
    place of None is left white.

    Raises ValueError without images.
    """
    first = next((image for image in images if image is not None), None)
    if first is None:
        raise ValueError("there are no images to make a grid of")
    scale = max(1, -(-least // first.width))
    width, height = first.width * scale, first.height * scale
    across, rows = min(columns, len(images)), -(-len(images) // columns)
    picture = Image.new(first.mode, (across * (width + gap) + gap, rows * (height + gap) + gap), "white")
    for i, image in enumerate(images):
        if image is None:
            continue
        row, column = divmod(i, columns)
        large = image.resize((width, height), Image.Resampling.NEAREST)
        picture.paste(large, (gap + column * (width + gap), gap + row * (height + gap)))
    return picture
