"""Many images as one picture."""

from collections.abc import Sequence

from PIL import Image


def grid(images: Sequence[Image.Image], columns: int, least: int = 32, gap: int = 2) -> Image.Image:
    """Equally sized images in rows of `columns`, in reading order; tiny ones enlarged to at least `least` pixels."""
    side = images[0].width
    scale = max(1, -(-least // side))
    step, rows = side * scale + gap, -(-len(images) // columns)
    picture = Image.new(images[0].mode, (min(columns, len(images)) * step + gap, rows * step + gap), "white")
    for i, image in enumerate(images):
        large = image.resize((side * scale, side * scale), Image.Resampling.NEAREST)
        picture.paste(large, (gap + i % columns * step, gap + i // columns * step))
    return picture
