import os
import shutil
import signal
from dataclasses import replace

import pytest
import timm
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader

from convmixer_hub import DataError, prepare_for_inference
from convmixer_hub import evaluate as evaluate_module
from convmixer_hub.data.images import eval_transform
from convmixer_hub.data.reader import open_dataset
from convmixer_hub.evaluate import (
    collect_logits,
    count_confusions,
    evaluate_on,
    fit_temperature,
    measure_calibration,
    prepare_test_images,
)
from convmixer_hub.hub.records import CIFAR10
from convmixer_hub.load import load_trained
from convmixer_hub.model.config import get_config

from .conftest import ARCH, CAT, IMAGES, uses_cpp, write_split, write_tree


def test_top1_counts_every_image_once(cifar_sample):
    model = load_trained("convmixer_cifar").eval()
    transform = eval_transform(timm.data.resolve_model_data_config(model))
    with torch.no_grad():
        right = sum(
            model(transform(Image.open(IMAGES / f"{name}.png"))[None]).argmax().item() == label
            for label, name in enumerate(CIFAR10.classes)
        )
    model.train()
    for batch_size in (3, 64):
        result = evaluate_on(model, open_dataset(cifar_sample), batch_size)
        assert (result.correct, result.count) == (right, 10)
        assert result.top1 == 10.0 * right
    in_bf16 = evaluate_on(model.bfloat16(), open_dataset(cifar_sample))
    assert abs(in_bf16.correct - right) <= 1


@pytest.mark.parametrize(("enough", "cpp"), [(10, True), (11, False)])
def test_cpp_is_compiled_for_many_images(cifar_sample, monkeypatch, enough, cpp):
    prepared = []

    def prepare(*args, **options):
        prepared.append(prepare_for_inference(*args, **options))
        return prepared[0]

    monkeypatch.setattr(evaluate_module, "WORTH_COMPILING", enough)
    monkeypatch.setattr(evaluate_module, "prepare_if_possible", prepare)
    evaluate_on(load_trained("convmixer_cifar"), open_dataset(cifar_sample))
    assert uses_cpp(prepared[0]) == cpp


def test_evaluation_does_not_change_the_model(cifar_sample):
    model = timm.create_model(ARCH).train()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    evaluate_on(model, open_dataset(cifar_sample))
    torch.testing.assert_close(dict(model.state_dict()), before, atol=0, rtol=0)


def test_a_damaged_image_is_one_line_from_a_worker_too(tmp_path):
    folder = write_split(tmp_path / "data", "test", [CAT, CAT[:-900]], [3, 3])
    model = timm.create_model(ARCH)
    message = rf"^{folder}, row 1 of its test images: damaged image \(.*\); replace the file"
    for workers in (0, 1):
        with pytest.raises(DataError, match=message) as refused:
            evaluate_on(model, open_dataset(folder), workers=workers)
        assert "\n" not in str(refused.value)


def kill_this_process(image):
    os.kill(os.getpid(), signal.SIGKILL)


def find_no_memory(image):
    raise RuntimeError("unable to allocate shared memory(shm)")


@pytest.mark.parametrize(
    ("transform", "reason"),
    [(kill_this_process, "DataLoader worker .*"), (find_no_memory, "RuntimeError: unable to .*")],
)
def test_a_worker_that_fails_is_one_line(cifar_sample, transform, reason):
    images = replace(open_dataset(cifar_sample).get("test"), transform=transform)
    message = rf"^the process that reads images failed \({reason}\); give more shared memory"
    with pytest.raises(DataError, match=message) as refused:
        collect_logits(nn.Linear(1, 1), DataLoader(images, num_workers=1))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("num_classes", "names", "message"),
    [
        (4, None, "data: has the class airplane, but the model knows 4 classes without names; eva"),
        (2, ["cat", "dog"], "data: has the class airplane, but the model knows cat, dog; evaluate"),
    ],
)
def test_data_with_other_classes_is_refused(cifar_sample, num_classes, names, message):
    model = timm.create_model(ARCH, num_classes=num_classes)
    get_config(model)["label_names"] = names
    with pytest.raises(DataError, match=message):
        evaluate_on(model, open_dataset(cifar_sample))


def test_folders_called_by_numbers_have_two_orders(tmp_path):
    write_tree(tmp_path, *(f"test/{number}/cat.png" for number in range(12)))
    model = timm.create_model(ARCH, num_classes=12)
    with pytest.raises(DataError, match="so that 10 may come after 9 or after 1; call the folders"):
        prepare_test_images(model, open_dataset(tmp_path))
    for number in range(12):
        (tmp_path / "test" / str(number)).rename(tmp_path / "test" / f"{number:02}")
    assert prepare_test_images(model, open_dataset(tmp_path)).labels == [*range(12)]


@pytest.mark.parametrize(("names", "labels"), [(None, [0, 1, 2]), ([2, 1, 0], [2, 1, 0])])
def test_folders_may_be_called_by_numbers(tmp_path, names, labels):
    model = timm.create_model(ARCH, num_classes=len(labels))
    get_config(model)["label_names"] = names
    write_tree(tmp_path, *(f"test/{number}/cat.png" for number in range(len(labels))))
    assert prepare_test_images(model, open_dataset(tmp_path)).labels == labels


def test_classes_are_found_by_their_names(cifar_sample, tmp_path):
    model = load_trained("convmixer_cifar")
    expected = evaluate_on(model, open_dataset(cifar_sample)).correct
    for number, name in enumerate(reversed(CIFAR10.classes)):
        place = tmp_path / "photos" / "test" / name
        place.mkdir(parents=True)
        shutil.copy(IMAGES / f"{name}.png", place / f"{number}.png")
    # In alphabetical order by chance; some of the classes, whose numbers are others then.
    assert evaluate_on(model, open_dataset(tmp_path / "photos")).correct == expected
    for name in ("airplane", "frog"):
        shutil.rmtree(tmp_path / "photos" / "test" / name)
    result = evaluate_on(model, open_dataset(tmp_path / "photos"))
    assert result.count == 8 and result.correct >= expected - 2


def calibration_error(confidences: list[float], right: list[bool]) -> float:
    """The definition: over 15 bins, the mean distance of accuracy and mean confidence."""
    total = 0.0
    for i in range(15):
        members = [j for j, c in enumerate(confidences) if i / 15 < c <= (i + 1) / 15]
        if members:
            accuracy = sum(right[j] for j in members) / len(members)
            confidence = sum(confidences[j] for j in members) / len(members)
            total += len(members) / len(confidences) * abs(accuracy - confidence)
    return total


@pytest.mark.parametrize("num_classes", [2, 10, 37])
def test_counts_are_those_of_a_direct_loop(num_classes):
    probabilities = (3 * torch.randn(200, num_classes)).double().softmax(1)
    labels = torch.randint(num_classes, (200,))
    confusion = count_confusions(probabilities, labels)
    expected = torch.zeros(num_classes, num_classes, dtype=torch.long)
    for row, label in zip(probabilities, labels):
        expected[label, row.argmax()] += 1
    assert torch.equal(confusion, expected)

    calibration = measure_calibration(probabilities, labels)
    confidences, right = probabilities.max(1).values, probabilities.argmax(1) == labels
    assert calibration.counts.sum() == 200
    assert calibration.mean_confidence == pytest.approx(float(confidences.mean()))
    assert calibration.error == pytest.approx(
        calibration_error(confidences.tolist(), right.tolist())
    )


@pytest.mark.parametrize("temperature", [0.4, 1.0, 2.5])
def test_the_temperature_is_found_that_logits_were_made_with(temperature):
    true_logits = 3 * torch.randn(20_000, 10)
    labels = torch.distributions.Categorical(logits=true_logits).sample()
    logits = temperature * true_logits
    found = fit_temperature(logits, labels)
    assert found == pytest.approx(temperature, rel=0.03)
    calibration = measure_calibration((logits.double() / found).softmax(1), labels)
    assert calibration.error < 0.01


def test_no_temperature_is_fitted_on_too_few_mistakes():
    logits = torch.eye(10).repeat(30, 1)
    labels = torch.arange(10).repeat(30)
    labels[:9] = (labels[:9] + 1) % 10
    assert fit_temperature(logits, labels) == 1.0
    labels[9] = 0
    assert fit_temperature(logits, labels) != 1.0
