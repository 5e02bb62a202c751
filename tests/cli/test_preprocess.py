"""The input transform against torchvision's, pixel for pixel."""

import numpy as np
import pytest
import torch
from PIL import Image

from nnarch.preprocess import imagenet_input


def _noise(width: int, height: int, mode: str = "RGB") -> Image.Image:
    generator = np.random.default_rng(width * 1000 + height)
    pixels = generator.integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "CMYK"])
@pytest.mark.parametrize(
    "size", [(300, 200), (200, 300), (256, 256), (257, 511), (30, 401), (1, 1)]
)
def test_equals_torchvision(size, mode):
    torchvision = pytest.importorskip("torchvision")
    transform = torchvision.models.MobileNet_V2_Weights.IMAGENET1K_V1.transforms()
    image = _noise(*size, mode)
    assert torch.equal(imagenet_input(image), transform(image.convert("RGB")))


def test_other_sizes_equal_torchvision():
    torchvision = pytest.importorskip("torchvision")
    weights = torchvision.models.MobileNet_V2_Weights.IMAGENET1K_V1
    image = _noise(90, 61)
    expected = weights.transforms(crop_size=32, resize_size=36)(image)
    assert torch.equal(imagenet_input(image, resize=36, crop=32), expected)


def test_array_equals_image():
    image = _noise(50, 40)
    assert torch.equal(imagenet_input(np.asarray(image)), imagenet_input(image))


@pytest.mark.parametrize(
    ("image", "options", "names"),
    [
        (np.zeros((4, 4, 3), np.float32), {}, "image must be a uint8 array"),
        (np.zeros((2, 4, 4, 3), np.uint8), {}, r"image must be.*\[2, 4, 4, 3\]"),
        (_noise(9, 9), {"crop": 300}, "crop must be between 1 and resize"),
        (_noise(9, 9), {"crop": 0}, "crop must be between 1 and resize"),
    ],
)
def test_bad_input(image, options, names):
    with pytest.raises(ValueError, match=rf"imagenet_input: {names}"):
        imagenet_input(image, **options)


def test_sixteen_bit_grey_is_scaled():
    grey = np.asarray(_noise(50, 40, "L"))
    wide = Image.fromarray(grey.astype(np.uint16) * 257)
    assert torch.equal(imagenet_input(wide), imagenet_input(Image.fromarray(grey)))


@pytest.mark.parametrize("size", [(100_000, 1), (1, 100_000)])
def test_a_strip_keeps_its_centre(size):
    image = Image.new("RGB", size, "white")
    image.paste("black", (0, 0, *(n // 4 + 1 for n in size)))
    white = imagenet_input(Image.new("RGB", (9, 9), "white"))
    assert torch.equal(imagenet_input(image), white)
