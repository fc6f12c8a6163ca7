import pytest
import timm
import torch
from PIL import Image

from convmixer_hub import DataError
from convmixer_hub.data import eval_transform
from convmixer_hub.evaluate import evaluate_on
from convmixer_hub.zoo import CIFAR10_CLASSES, get_config, load_trained

from .conftest import IMAGES


def test_top1_counts_every_image_once(cifar_sample):
    model = load_trained("convmixer_cifar").eval()
    transform = eval_transform(timm.data.resolve_model_data_config(model))
    with torch.no_grad():
        right = sum(
            model(transform(Image.open(IMAGES / f"{name}.png"))[None]).argmax().item() == label
            for label, name in enumerate(CIFAR10_CLASSES)
        )
    model.train()
    for batch_size in (3, 64):
        result = evaluate_on(model, cifar_sample, batch_size)
        assert (result.correct, result.count) == (right, 10)
        assert result.top1 == 10.0 * right


def test_evaluation_does_not_change_the_model(cifar_sample):
    model = timm.create_model("convmixer_96_8_ks5_p1").train()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    evaluate_on(model, cifar_sample)
    torch.testing.assert_close(dict(model.state_dict()), before, atol=0, rtol=0)


def test_a_damaged_image_is_one_line_from_a_worker_too(write_parquet):
    image = (IMAGES / "cat.png").read_bytes()
    folder = write_parquet("test", [image, image[:-900]], [3, 3])
    model = timm.create_model("convmixer_96_8_ks5_p1")
    message = (
        rf"^{folder}/plain_text, row 1 of its parquet files: damaged image \(.*\); replace the"
    )
    for workers in (0, 1):
        with pytest.raises(DataError, match=message) as refused:
            evaluate_on(model, folder, workers=workers)
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize("change", [{"num_classes": 4}, {"label_names": CIFAR10_CLASSES[::-1]}])
def test_data_with_other_classes_is_refused(cifar_sample, change):
    model = timm.create_model("convmixer_96_8_ks5_p1", num_classes=change.get("num_classes", 10))
    get_config(model).update(change)
    with pytest.raises(DataError, match="has the classes airplane, automobile, .* but the model"):
        evaluate_on(model, cifar_sample)
