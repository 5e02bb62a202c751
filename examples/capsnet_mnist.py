"""CapsNet on 5,000 MNIST digits: train, resume, look inside.

    make example NAME=capsnet_mnist

A CapsNet of a quarter of the paper's width learns 4,000 digits and is tested on 1,000, once. How
many epochs it learns was chosen with --validate: that learns 3,500 of the 4,000 and tests the rest
after every epoch, and never looks at the 1,000. Afterwards
it draws two pictures (digits rebuilt while one dimension of their capsule moves; overlapping digits
taken apart by a second, short training) and prints a table (rotated and shifted digits, against a
convolutional network of equal size). An interrupted run continues from its last epoch, bit for bit.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from checkpoint import Checkpoint
from datasets import mnist_5k
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

import nnarch
from nnarch import nn
from nnarch.objectives import margin_loss, reconstruction_loss

SHIFTS = 2  # pixels, as in the paper


# ----------------------------------------------------------------------------------------- data


def load_digits(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images [N, 1, 28, 28] in 0 to 1 and labels, 4,000 to train and 1,000 to test."""
    x, y = mnist_5k()
    images = torch.tensor(x, dtype=torch.float32).view(-1, 1, 28, 28) / 255
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    images, labels = images[order], torch.tensor(y)[order]
    return images[:4000], labels[:4000], images[4000:], labels[4000:]


def shifted(images: Tensor, dy: Tensor, dx: Tensor) -> Tensor:
    """Every image moved by its own whole number of pixels; what comes in is black."""
    n, _, h, w = images.shape
    rows = torch.arange(h)[None, :, None] - dy[:, None, None]
    columns = torch.arange(w)[None, None, :] - dx[:, None, None]
    inside = (rows >= 0) & (rows < h) & (columns >= 0) & (columns < w)
    batch = torch.arange(n)[:, None, None]
    return (images[batch, 0, rows.clamp(0, h - 1), columns.clamp(0, w - 1)] * inside)[:, None]


def random_shift(images: Tensor, most: int) -> Tensor:
    """Every image moved by up to `most` pixels each way."""
    dy, dx = torch.randint(-most, most + 1, (2, len(images)))
    return shifted(images, dy, dx)


def rotated(images: Tensor, degrees: float) -> Tensor:
    """All images turned by the same angle."""
    angle = torch.tensor(degrees).deg2rad()
    row = torch.stack([angle.cos(), -angle.sin(), torch.zeros(())])
    column = torch.stack([angle.sin(), angle.cos(), torch.zeros(())])
    theta = torch.stack([row, column]).expand(len(images), 2, 3)
    grid = torch.nn.functional.affine_grid(theta, list(images.shape), align_corners=False)
    return torch.nn.functional.grid_sample(images, grid, align_corners=False)


def overlapping(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Pairs of digits of two classes, each shifted, one over the other.

    Returns:
        Both together, the two alone, and their labels.
    """
    other = torch.randperm(len(labels))
    keep = labels != labels[other]
    a, b = random_shift(images[keep], 4), random_shift(images[other][keep], 4)
    return torch.maximum(a, b), a, b, labels[keep], labels[other][keep]


# ------------------------------------------------------------------------------------- training


def convolutional_network() -> torch.nn.Module:
    """A CNN with about as many parameters as the CapsNet without its decoder."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(64 * 49, 200), nn.ReLU(), nn.Linear(200, 10),
    )  # fmt: skip


def capsule_objective(net: Any, images: Tensor, labels: Tensor) -> Tensor:
    """Margin and reconstruction."""
    lengths, rebuilt = net.reconstruct(images, labels)
    return margin_loss(lengths, labels) + reconstruction_loss(rebuilt, images)


def class_objective(net: Any, images: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy."""
    return torch.nn.functional.cross_entropy(net(images), labels)


def train(
    name: str,
    net: Any,
    objective: Any,
    data: tuple[Tensor, Tensor],
    epochs: int,
    folder: Path,
    after_epoch: Callable[[int], None] = lambda epoch: None,
) -> None:
    """Train with Adam, shifting digits; save after every epoch, continue where a file is."""
    optimizer = torch.optim.Adam(net.parameters(), 1e-3)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    checkpoint = Checkpoint(folder / f"{name}.pt", net=net, optimizer=optimizer, schedule=schedule)
    torch.manual_seed(0)
    saved = checkpoint.load()
    done = 0 if saved is None else saved["epochs"]
    images, labels = data
    net.train()
    for epoch in range(done, epochs):
        batches = torch.randperm(len(labels)).split(50)
        for batch in track(batches, f"{name}, epoch {epoch + 1} of {epochs}", transient=True):
            optimizer.zero_grad()
            objective(net, random_shift(images[batch], SHIFTS), labels[batch]).backward()
            optimizer.step()
        schedule.step()
        checkpoint.save(epochs=epoch + 1)
        after_epoch(epoch + 1)
    net.eval()


def validate(data: tuple[Tensor, Tensor], epochs: int, folder: Path, console: Console) -> None:
    """Train without the last 500 digits and print their accuracy after every epoch."""
    held_out = 500
    learned, tested = zip(*((part[:-held_out], part[-held_out:]) for part in data), strict=True)
    for name, net, objective in (
        ("capsnet", nnarch.create_model("capsnet_x0_25", detach_routing=False), capsule_objective),
        ("cnn", convolutional_network(), class_objective),
    ):

        def report(epoch: int, name: str = name, net: Any = net) -> None:
            net.eval()
            right = accuracy(net, *tested)
            net.train()
            console.print(f"{name}, epoch {epoch}: {right:.1f} % of {held_out} digits held out")

        train(f"{name}_validation", net, objective, learned, epochs, folder, report)


def pair_objective(net: Any, images: Tensor, labels: Tensor) -> Tensor:
    """Two digits at once: margins of both classes, each digit rebuilt from its own capsule."""
    both, a, b, first, second = overlapping(images, labels)
    capsules = net.capsules(both)
    there = torch.zeros(len(first), 10)
    rows = torch.arange(len(first))
    there[rows, first] = there[rows, second] = 1
    loss = margin_loss(net.lengths(capsules), there)
    for image, label in ((a, first), (b, second)):
        loss = loss + reconstruction_loss(net.decoder(capsules, label), image)
    return loss


# ------------------------------------------------------------------------------------- what came


@torch.no_grad()
def accuracy(net: Any, images: Tensor, labels: Tensor) -> float:
    """Percent."""
    right = sum(
        int((net(x).argmax(1) == y).sum())
        for x, y in zip(images.split(100), labels.split(100), strict=True)
    )
    return 100 * right / len(labels)


def robustness(nets: dict[str, Any], images: Tensor, labels: Tensor) -> Table:
    """Accuracy on digits that were moved more than in training."""
    n = len(labels)
    variants = {"as they are": images}
    variants |= {f"rotated by {d}°": rotated(images, d) for d in (15, 30, 45)}
    variants |= {
        f"shifted by {s} pixels": shifted(images, torch.full((n,), s), torch.full((n,), -s))
        for s in (2, 4, 6)
    }
    table = Table("digits", *(f"{name}, %" for name in nets))
    for what, moved in variants.items():
        table.add_row(what, *(f"{accuracy(net, moved, labels):.1f}" for net in nets.values()))
    return table


@torch.no_grad()
def perturbed(net: Any, images: Tensor, labels: Tensor) -> np.ndarray:
    """Two digits side by side, rebuilt while each of the 16 dimensions of their capsules, a row
    each, goes from -0.25 to 0.25. Their first columns are the digits themselves.
    """

    def row(digit: int, dimension: int) -> Tensor:
        capsules = net.capsules(images[digit : digit + 1]).repeat(11, 1, 1)
        capsules[:, :, dimension] += torch.linspace(-0.25, 0.25, 11)[:, None]
        rebuilt = net.decoder(capsules, labels[digit].repeat(11))
        return torch.cat([images[digit], *rebuilt], -1)[0]

    digits = (0, int((labels != labels[0]).nonzero()[0]))
    rows = [torch.cat([row(digit, d) for digit in digits], -1) for d in range(16)]
    return torch.cat(rows).numpy()


@torch.no_grad()
def separated(net: Any, images: Tensor, labels: Tensor) -> tuple[np.ndarray, float]:
    """Columns of pairs, the two digits and what each capsule rebuilt; percent of pairs found."""
    torch.manual_seed(1)
    both, a, b, first, second = overlapping(images, labels)
    capsules = net.capsules(both)
    found = net.lengths(capsules).topk(2).indices.sort().values
    right = (found == torch.stack([first, second], 1).sort().values).all(1).float().mean()
    one, two = net.decoder(capsules, first), net.decoder(capsules, second)
    picture = torch.cat([torch.cat(list(t[:12, 0]), -1) for t in (both, a, one, b, two)])
    return picture.numpy(), 100 * float(right)


def save_picture(path: Path, picture: np.ndarray) -> None:
    """Grey values from 0 to 1 as a PNG of twice the size."""
    from PIL import Image

    grey = (picture.clip(0, 1) * 255).astype(np.uint8)
    image = Image.fromarray(grey)
    image.resize((2 * image.width, 2 * image.height)).save(path)


def main() -> None:
    """Train, test, draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=12)  # by --validate
    parser.add_argument("--pair-epochs", type=int, default=10)
    parser.add_argument("--validate", action="store_true", help="see above; tests nothing")
    parser.add_argument("--folder", type=Path, default=Path("out/capsnet_mnist"))
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    console = Console()
    images, labels, test_images, test_labels = load_digits()
    torch.manual_seed(0)
    if options.validate:
        return validate((images, labels), options.epochs, options.folder, console)
    caps, cnn = nnarch.create_model("capsnet_x0_25", detach_routing=False), convolutional_network()
    train("capsnet", caps, capsule_objective, (images, labels), options.epochs, options.folder)
    train("cnn", cnn, class_objective, (images, labels), options.epochs, options.folder)
    console.print(f"CapsNet: {accuracy(caps, test_images, test_labels):.1f} % of 1,000 digits")
    console.print(robustness({"CapsNet": caps, "CNN": cnn}, test_images, test_labels))
    save_picture(options.folder / "dimensions.png", perturbed(caps, test_images, test_labels))
    pairs = nnarch.create_model("capsnet_x0_25", detach_routing=False)
    pairs.load_state_dict(caps.state_dict())
    # Of a CapsNet that has learned this long: another one's pairs would not go on from it.
    train(
        f"pairs_{options.epochs}",
        pairs,
        pair_objective,
        (images, labels),
        options.pair_epochs,
        options.folder,
    )
    picture, right = separated(pairs, test_images, test_labels)
    save_picture(options.folder / "pairs.png", picture)
    console.print(f"overlapping digits: both found in {right:.1f} % of the pairs")
    console.print(f"pictures: {options.folder}/dimensions.png, {options.folder}/pairs.png")


if __name__ == "__main__":
    main()
