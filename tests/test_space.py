"""A Space's folder; tests/test_demo.py opens its page in a browser."""

import shutil

import pytest

from convmixer_hub import CheckpointError, DataError
from convmixer_hub.release import space

from .conftest import ARCH, IMAGES


@pytest.fixture(autouse=True)
def _gradio(monkeypatch):
    """What only serving the page needs."""
    monkeypatch.setattr(space, "check_gradio", lambda: "6.0")


def test_a_space_has_the_files_of_its_models_alone(tmp_path, untrained):
    output = tmp_path / "new" / "space"
    name = f"{ARCH}.cifar10"
    (untrained / "README.md").write_text("A card.")
    space.write_space([f"convmixer-hub/{name}", str(untrained), f"{untrained}/"], output)
    weights = sorted(str(file.relative_to(output)) for file in output.rglob("*.safetensors"))
    assert weights == [
        f"convmixer_hub/weights/{name}/model.safetensors",
        "models/a_run/model.safetensors",
    ]
    assert f"['{name}', 'models/a_run']" in (output / "app.py").read_text()
    needed = (output / "requirements.txt").read_text().splitlines()
    assert "timm>=1.0.31" in needed and not [line for line in needed if "extra" in line]
    assert (output / "models" / "a_run" / "README.md").read_text() == "A card."
    examples = {file.name for file in (output / "convmixer_hub/examples").iterdir()}
    assert examples == {file.name for file in IMAGES.iterdir()}


@pytest.mark.usefixtures("hub")
def test_weights_from_the_hub_come_without_a_card(tmp_path):
    space.write_space(["convmixer_cifar"], tmp_path / "space")
    weights = (tmp_path / "space" / "convmixer_hub" / "weights").rglob("*")
    assert [file.name for file in weights if file.is_file()] == ["model.safetensors"]


def test_a_space_that_cannot_be_written_is_one_line(tmp_path, untrained):
    with pytest.raises(DataError, match=r"already exists; name a new folder$"):
        space.write_space(["convmixer_cifar"], tmp_path)
    with pytest.raises(DataError, match=r"^models/a_run: two models have a folder of this name"):
        other = shutil.copytree(untrained, tmp_path / "other" / "a_run")
        space.write_space([str(untrained), str(other)], tmp_path / "space")
    with pytest.raises(CheckpointError, match="is weights without their config.json; name the f"):
        space.write_space([str(untrained / "model.safetensors")], tmp_path / "space")
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"cannot be written \(.*\); make room, or name another"):
        space.write_space(["convmixer_cifar"], tmp_path / "file" / "space")
    assert not list(tmp_path.glob(".saving-*")) and not (tmp_path / "space").exists()
