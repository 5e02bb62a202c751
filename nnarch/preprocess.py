"""From a photo to the input of an ImageNet classifier, with Pillow and torch only."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def imagenet_input(
    image: Image.Image | np.ndarray, *, resize: int = 256, crop: int = 224
) -> torch.Tensor:
    """The evaluation transform that torchvision's IMAGENET1K_V1 weights were measured with.

    The shorter side is resized (bilinear, antialiased), the centre is cropped, and each channel is
    normalised by ImageNet's mean and standard deviation.

    Args:
        image: a Pillow image of any mode, or a uint8 array [H, W, 3] or [H, W].
        resize: pixels of the shorter side before the crop.
        crop: pixels of each side after the crop, at most `resize`.

    Returns:
        float32 tensor [3, crop, crop].

    Raises:
        ValueError: `crop` is larger than `resize`, or the array holds no 8-bit image.
    """
    if not 0 < crop <= resize:
        raise ValueError(
            f"imagenet_input: crop must be between 1 and resize ({resize}), got {crop}"
        )
    picture = _centre(_shorter_side(_as_rgb(image), resize), crop)
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()
    mean = torch.tensor(IMAGENET_MEAN).view(3, 1, 1)
    std = torch.tensor(IMAGENET_STD).view(3, 1, 1)
    return pixels.float().div_(255).sub_(mean).div_(std)


def _as_rgb(image: Image.Image | np.ndarray) -> Image.Image:
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim not in (2, 3):
            raise ValueError(
                "imagenet_input: image must be a uint8 array [H, W, 3] or [H, W], "
                f"got {image.dtype} {list(image.shape)}"
            )
        image = Image.fromarray(image)
    return as_rgb(image)


def as_rgb(image: Image.Image) -> Image.Image:
    """As 8-bit RGB. 16-bit grey levels are scaled; Pillow by itself cuts them off at 255."""
    if image.mode == "I" or image.mode.startswith("I;16"):
        levels = np.asarray(image)
        image = Image.fromarray((levels >> 8 if levels.max() > 255 else levels).astype(np.uint8))
    return image.convert("RGB")


_LONGEST = 32  # times the shorter side: a strip of one pixel's height would fill the memory


def _shorter_side(image: Image.Image, size: int) -> Image.Image:
    """Resized so that the shorter side has `size` pixels; the longer one is rounded down."""
    width, height = image.size
    short, long = sorted(image.size)
    if long > _LONGEST * short:  # only the centre counts
        image = image.crop(_middle(width, height, _LONGEST * short))
        width, height = image.size
        long = _LONGEST * short
    longer = int(size * long / short)
    target = (size, longer) if width <= height else (longer, size)
    return image.resize(target, Image.Resampling.BILINEAR)


def _middle(width: int, height: int, longest: int) -> tuple[int, int, int, int]:
    """The box that keeps `longest` pixels of the longer side."""
    left, top = max(0, width - longest) // 2, max(0, height - longest) // 2
    return (left, top, left + min(width, longest), top + min(height, longest))


def _centre(image: Image.Image, size: int) -> Image.Image:
    width, height = image.size
    left, top = round((width - size) / 2), round((height - size) / 2)
    return image.crop((left, top, left + size, top + size))
