"""Folders that this package writes, in transformers."""

import json

import pytest
import timm
import torch
from PIL import Image
from transformers import AutoModelForImageClassification, pipeline

from convmixer_hub.checkpoints.files import save_model
from convmixer_hub.data.images import open_image
from convmixer_hub.load import load_trained
from convmixer_hub.model.config import CLASSIFIER
from convmixer_hub.predict import predict

from .conftest import ARCH, CHECKOUT, IMAGES, NAME


@pytest.fixture(params=["shipped", "fine-tuned", "with another activation"])
def folder(request, tmp_path):
    """A folder with a model."""
    if request.param == "shipped":
        return CHECKOUT / "weights" / NAME
    if request.param == "fine-tuned":
        model = load_trained(NAME, ["cat", "dog", "axolotl"])
        save_model(model, tmp_path, {"label_names": ["cat", "dog", "axolotl"]})
    else:
        model = timm.create_model(ARCH, act_layer="relu", label_names=["a", "b"])
        save_model(model, tmp_path, {})
    return tmp_path


@pytest.fixture
def image() -> Image.Image:
    return open_image(IMAGES / "cat.png").resize((90, 70))


def test_a_pipeline_answers_as_predict_does(folder, image):
    [expected] = predict(load_trained(folder), [image], top_k=2)
    found = pipeline("image-classification", model=str(folder))(image, top_k=2)
    assert [answer["label"] for answer in found] == [p.label for p in expected]
    assert [answer["score"] for answer in found] == pytest.approx(
        [p.probability for p in expected], abs=1e-6
    )


def test_a_head_for_other_classes_is_made_and_nothing_else(folder):
    model = AutoModelForImageClassification.from_pretrained(
        folder, num_labels=4, ignore_mismatched_sizes=True
    )
    found, expected = model.timm_model.state_dict(), load_trained(folder).state_dict()
    for head in (f"{CLASSIFIER}.weight", f"{CLASSIFIER}.bias"):
        del found[head], expected[head]
    torch.testing.assert_close(found, expected, atol=0, rtol=0)
    assert model(torch.randn(1, 3, 32, 32)).logits.shape == (1, 4)


def test_what_transformers_saved_is_loaded(folder, tmp_path, batch):
    model = AutoModelForImageClassification.from_pretrained(folder).eval()
    model.save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["num_classes"]
    loaded = load_trained(tmp_path / "saved").eval()
    torch.testing.assert_close(loaded(batch), model(batch).logits)
