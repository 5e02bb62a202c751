"""Every command as people type it: output, errors on one line, exit codes."""

import subprocess
import sys

import pytest
import torch
from PIL import Image

import nnarch
from nnarch import benchmarking, classify, cli, demo, doctor, library


@pytest.fixture
def run(capsys, monkeypatch):
    """Run a command; returns (exit code, standard output, standard error)."""
    monkeypatch.setattr(cli, "console", cli.Console(width=200))

    def call(*args):
        with pytest.raises(SystemExit) as stop:
            cli.main([str(a) for a in args])
        out, err = capsys.readouterr()
        return stop.value.code or 0, out, err

    return call


def _one_line(err: str) -> str:
    assert err.count("\n") == 1
    assert err.startswith("nnarch: ")
    return err


def test_version(run):
    assert run("--version") == (0, f"nnarch {nnarch.__version__}\n", "")


def test_help_names_every_command(run):
    code, out, _ = run("--help")
    assert code == 0
    for command in ("demo", "classify", "doctor", "models", "bench"):
        assert command in out


@pytest.mark.parametrize(
    "args", [["nonsense"], ["classify"], ["bench", "--threads", "0"], ["models", "--nonsense"]]
)
def test_wrong_usage(run, args):
    code, _, err = run(*args)
    assert code == 2
    assert "Traceback" not in err


def test_installed_as_a_command():
    done = subprocess.run(
        [sys.executable, "-m", "nnarch", "classify", "nowhere.jpg", "--weights", "nowhere.pth"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2
    assert "nowhere.pth" in _one_line(done.stderr)


# ------------------------------------------------------------------------------------- classify


@pytest.fixture
def weights(tmp_path):
    path = tmp_path / "weights.pth"
    torch.save(nnarch.create_model("cifar_resnet20").state_dict(), path)
    return path


def test_classify(run, weights, tmp_path):
    labels = tmp_path / "labels.txt"
    labels.write_text("".join(f"kind {i}\n" for i in range(10)))
    for name in ("a.png", "b.jpg"):
        Image.effect_noise((60, 60), 90).convert("RGB").save(tmp_path / name)
    files = [tmp_path / "a.png", tmp_path / "b.jpg"]
    code, out, err = run(
        "classify", *files, "--weights", weights, "--model", "cifar_resnet20", "--labels", labels,
        "--top", 3,
    )  # fmt: skip
    assert (code, err) == (0, "")
    assert "a.png" in out
    assert "b.jpg" in out
    assert out.count("kind ") == 6


def test_classify_goes_on_after_a_bad_photo(run, weights, tmp_path):
    labels = tmp_path / "labels.txt"
    labels.write_text("".join(f"kind {i}\n" for i in range(10)))
    (tmp_path / "bad.png").write_text("not an image")
    Image.effect_noise((60, 60), 90).save(tmp_path / "good.png")
    code, out, err = run(
        "classify", tmp_path / "bad.png", tmp_path / "good.png",
        "--weights", weights, "--model", "cifar_resnet20", "--labels", labels,
    )  # fmt: skip
    assert code == 2
    assert "bad.png: not an image" in _one_line(err)
    assert "good.png" in out


def test_classify_with_weights_of_another_model(run, weights, tmp_path):
    Image.new("RGB", (60, 60)).save(tmp_path / "a.png")
    code, _, err = run("classify", tmp_path / "a.png", "--weights", weights)
    assert code == 2
    assert "weights.pth" in _one_line(err)


# ----------------------------------------------------------------------------------- the others


def test_models(run):
    code, out, _ = run("models", "resnet5*")
    assert code == 0
    assert "resnet50" in out
    assert "25,557,032" in out
    assert "mobilenet" not in out


def test_no_such_model(run):
    code, _, err = run("models", "lenet-99")
    assert code == 2
    assert "no model matches 'lenet-99'" in _one_line(err)


def test_doctor(run):
    code, out, err = run("doctor")
    assert (code, err) == (0, "")
    for backend, state in nnarch.backends().items():
        assert backend in out
        assert state in out
    assert torch.__version__ in out
    assert f"of {len(library.OPS)}" in out


def test_doctor_without_the_native_library(run, monkeypatch):
    monkeypatch.setattr(library, "native", None)
    monkeypatch.setattr(library, "native_error", "the reason why")
    code, out, _ = run("doctor")
    assert code == 1
    assert "not loaded: the reason why" in out


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (1023, "1023 B"), (32768, "32 KiB"), (1 << 20, "1 MiB"), (25 << 30, "25 GiB")],
)
def test_sizes(count, text):
    assert doctor._size(count) == text


def test_bench_passes_its_options_on(run, monkeypatch, tmp_path):
    given = {}
    monkeypatch.setattr(benchmarking, "run", lambda **options: given.update(options))
    page, rows = tmp_path / "page.html", tmp_path / "rows.csv"
    code, _, _ = run(
        "bench", "--only", "conv1x1*", "--quick", "--threads", 2, "--no-models",
        "--html", page, "--csv", rows,
    )  # fmt: skip
    assert code == 0
    assert given == {
        "only": "conv1x1*", "quick": True, "threads": 2, "models": False, "html": page, "csv": rows
    }  # fmt: skip


def test_bench_of_nothing(run):
    code, _, err = run("bench", "--only", "no-such-case")
    assert code == 2
    assert "no-such-case" in _one_line(err)


# ----------------------------------------------------------------------------------------- demo


def _needs_demo_files():
    try:
        classify.demo_weights(), classify.demo_photos()
    except classify.InputError as error:
        pytest.skip(str(error))


def test_demo_classifies_as_torch_does(run, tmp_path):
    _needs_demo_files()
    picture = tmp_path / "demo.png"
    code, out, err = run("demo", "--no-timing", "--picture", picture)
    assert (code, err) == (0, "")
    for label, share in (("Egyptian cat", "0.7166"), ("espresso", "0.9921"), ("moped", "0.5923")):
        line = next(line for line in out.splitlines() if label in line)
        assert line.count(share) == 2  # nnarch's and torch's
    assert "Every probability agrees with torch's" in out
    assert "conv2d (cpu)" in out
    assert not picture.exists()


def test_demo_fails_where_outputs_differ(run, monkeypatch):
    _needs_demo_files()
    honest = demo.accelerate

    class Off(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.right = honest(model)

        def forward(self, x):
            return self.right(x) * 1.001

    monkeypatch.setattr(demo, "accelerate", Off)
    code, _, err = run("demo", "--no-timing")
    assert code == 1
    assert "from torch" in _one_line(err)


@pytest.mark.slow
def test_demo_draws_a_picture(run, monkeypatch, tmp_path):
    """The race with the smallest model and without torch.compile, which takes most of the time."""
    _needs_demo_files()
    monkeypatch.setattr(demo, "RACED", {"cifar_resnet20": "ResNet-20"})
    monkeypatch.setattr(demo, "RIVALS", ("nnarch", "eager"))
    code, out, err = run("demo", "--picture", tmp_path / "deep" / "demo.png")
    assert (code, err) == (0, "")
    assert "ResNet-20" in out
    with Image.open(tmp_path / "deep" / "demo.png") as image:
        assert image.format == "PNG"
        assert image.width > 500
