"""From an image file to a square of uint8: the centre crop of ADM.

The shorter side is halved with a box filter while it is at least twice the size wanted, brought to that size by bicubic
interpolation, and the centre is cropped, as in the preprocessing that the published ImageNet statistics of Dhariwal and
Nichol (2105.05233) and the latents of DiT (2212.09748) use. It moves every metric, so it is stated with every number.
An image that has the size is left as it is.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gearshift.runtime.errors import RunError

if TYPE_CHECKING:
    from PIL.Image import Image

Box = tuple[int, int, int, int]


def read_image(source: Path | Any, size: int, channels: int, what: str = "", box: Box | None = None) -> np.ndarray:
    """One image file (path or binary stream) as uint8 [channels, size, size], channels 1 (grey) or 3 (RGB).

    `box` (left, top, right, bottom in pixels) is cut out first. Raises RunError naming the file (or `what`) when it is
    not an image that can be read to its end, or is smaller than `box`.
    """
    what = what or str(source)
    return square(open_image(source, channels, what), size, what, box)


def open_image(source: Path | Any, channels: int, what: str) -> Image:
    """The whole image, grey or RGB. Raises RunError naming it as `what` when it cannot be read to its end."""
    from PIL import Image

    try:
        with Image.open(source) as opened:
            # Through RGBA, because a palette with transparency loses it with a warning otherwise.
            image: Image.Image = opened.convert("RGBA") if opened.mode == "P" else opened
            return image.convert("L" if channels == 1 else "RGB")
    except (OSError, SyntaxError, ValueError) as error:
        raise RunError(f"{what} is not an image that can be read ({error}); replace or remove it") from error


def square(image: Image, size: int, what: str, box: Box | None = None) -> np.ndarray:
    """A grey or RGB image as uint8 [1 or 3, size, size]; `box` and errors as for `read_image`."""
    if box is not None:
        if box[2] > image.width or box[3] > image.height:
            raise RunError(
                f"{what} is {image.width} x {image.height}, too small to cut out {box}; replace or remove it"
            )
        image = image.crop(box)
    pixels = np.asarray(centre_crop(image, size), dtype=np.uint8)
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def centre_crop(image: Image, size: int) -> Image:
    """The image as size x size pixels, by the rule at the top of this file."""
    from PIL.Image import Resampling

    if image.size == (size, size):
        return image
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Resampling.BOX)
    scale = size / min(image.size)
    width, height = max(size, round(image.width * scale)), max(size, round(image.height * scale))
    image = image.resize((width, height), Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return image.crop((left, top, left + size, top + size))
