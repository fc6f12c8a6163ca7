import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy
import onnx
import onnxruntime
import openvino
import pytest
import timm
import torch
from PIL import Image

from convmixer_hub import CheckpointError, DataError
from convmixer_hub.checkpoints import runtimes
from convmixer_hub.checkpoints.files import save_model
from convmixer_hub.checkpoints.runtimes import write_onnx
from convmixer_hub.data.reader import open_dataset
from convmixer_hub.evaluate import evaluate_on
from convmixer_hub.hub.records import CIFAR10, RECORDS
from convmixer_hub.load import load_trained
from convmixer_hub.release.export import RUNTIMES, export
from convmixer_hub.release.golden import make_golden_input

from .conftest import ARCH, CHECKOUT, IMAGES, NAME, convmixer

IN_FP32 = {"INFERENCE_PRECISION_HINT": "f32"}  # of OpenVINO


@pytest.fixture(scope="module")
def from_pixels(tmp_path_factory):
    """Export with preprocessing, as in the docs; give the file, and what was printed."""
    folder = tmp_path_factory.mktemp("from_pixels")
    result = convmixer("export", "convmixer_cifar", "--output", folder, "--with-preprocessing")
    assert result.exit_code == 0, result.output
    return folder / "model.onnx", result.stdout


@pytest.fixture(scope="module")
def pt2(tmp_path_factory):
    """A file of `torch.export`."""
    return export(ARCH, tmp_path_factory.mktemp("pt2"), "pt2").file


@pytest.mark.parametrize("name", ["convmixer_cifar.cifar100", "convmixer_256_8_ks9_p1.cifar10"])
def test_onnx_answers_as_recorded(name, tmp_path):
    file = export(name, tmp_path).file
    images = make_golden_input((3, 32, 32)).float().numpy()
    golden = json.loads((CHECKOUT / "weights" / name / "golden.json").read_text())["logits"]
    session = onnxruntime.InferenceSession(file)
    in_openvino = openvino.Core().compile_model(file, "CPU", IN_FP32)
    for logits in (session.run(None, {"images": images})[0], in_openvino(images)[0]):
        difference = abs(logits - numpy.array(golden)).max() / abs(numpy.array(golden)).max()
        assert difference < 1e-4
    assert session.run(None, {"images": images[:1]})[0].shape == (1, len(golden[0]))
    metadata = session.get_modelmeta().custom_metadata_map
    assert json.loads(metadata["labels"]) == list(RECORDS[name].dataset.classes)
    assert json.loads(metadata["mean"]) == [0.4914, 0.4822, 0.4465]
    assert metadata["sha256"] == RECORDS[name].sha256
    assert not re.search(rb"\.py\b|site-packages", file.read_bytes())  # of stack traces


def test_a_file_with_preprocessing_takes_pixels(from_pixels):
    image = Image.open(IMAGES / "cat.png")
    model = timm.create_model("convmixer_cifar", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    with torch.no_grad():
        expected = model(transform(image)[None]).numpy()
    session = onnxruntime.InferenceSession(from_pixels[0])
    [logits] = session.run(None, {"images": numpy.asarray(image)[None]})
    numpy.testing.assert_allclose(logits, expected, atol=1e-3)
    assert session.get_modelmeta().custom_metadata_map["mean"] == "null"


def test_the_size_of_the_file_and_its_difference_from_torch_are_printed(from_pixels):
    file, printed = from_pixels
    found = re.fullmatch(
        rf"{file}: {file.stat().st_size / 1e6:.2f} MB, "
        r"largest difference from torch (\S+) of the largest logit\n",
        printed,
    )
    assert float(found[1]) <= 1e-4


@pytest.mark.slow
def test_the_snippet_of_the_docs_needs_no_torch(from_pixels, tmp_path):
    folder = from_pixels[0].parent
    wide = Image.open(IMAGES / "cat.png").resize((64, 64)).crop((0, 8, 64, 56))
    wide.save(tmp_path / "cat.png")
    [snippet] = re.findall("```python\n(.*?)```", (CHECKOUT / "docs/export.md").read_text(), re.S)
    code = "import sys; sys.modules |= {'torch': None, 'timm': None, 'convmixer_hub': None}\n"
    code += snippet.replace("DIR", str(folder)).replace("tests/images", str(tmp_path))
    code += "print(*logits[0].round(3))\n"
    model = timm.create_model("convmixer_cifar", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    with torch.no_grad():
        expected = model(transform(wide)[None])[0].numpy()
    command = [sys.executable, "-c", code]
    label, logits = subprocess.check_output(command, text=True, cwd=CHECKOUT).splitlines()
    assert label == "cat"
    # The middle is cut out before the picture is scaled, and not after it.
    numpy.testing.assert_allclose(numpy.array(logits.split(), float), expected, atol=0.3)


def test_pt2_answers_as_torch_does(pt2, batch):
    extra = {"metadata.json": ""}
    program = torch.export.load(pt2, extra_files=extra)
    model = timm.create_model(ARCH, pretrained=True).eval()
    with torch.no_grad():
        torch.testing.assert_close(program.module()(batch), model(batch), atol=1e-4, rtol=1e-4)
    assert not re.search(rb"\.py\b|site-packages", pt2.read_bytes())  # of stack traces
    assert json.loads(extra["metadata.json"])["labels"] == list(CIFAR10.classes)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="there is no C++ compiler")
def test_pt2_is_compiled_by_aot_inductor(pt2, tmp_path, batch):
    program = torch.export.load(pt2)
    compiled = tmp_path / "compiled.pt2"
    torch._inductor.aoti_compile_and_package(program, package_path=str(compiled))
    expected = timm.create_model(ARCH, pretrained=True).eval()(batch)
    logits = torch._inductor.aoti_load_package(str(compiled))(batch)
    torch.testing.assert_close(logits, expected, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("options", [[], ["--with-preprocessing"]])
def test_int8_weights_are_stored_and_measured(options, cifar_sample, tmp_path):
    output = tmp_path / "out"
    command = ["export", ARCH, "--output", output, "--int8", "--data", cifar_sample]
    result = convmixer(*command, *options)
    assert result.exit_code == 0, result.output
    file = output / "model_int8.onnx"
    in_fp32 = evaluate_on(load_trained(ARCH), open_dataset(cifar_sample)).top1
    line = rf"{file}: 0\.\d\d MB, top-1 [\d.]+ %, in fp32 {in_fp32:.2f} % \(10 test images\)\n"
    assert re.fullmatch(line, result.output)
    assert list(output.iterdir()) == [file]
    graph = onnx.load(file).graph
    types = {tensor.name: tensor.data_type for tensor in graph.initializer}
    first_inputs = {node.output[0]: node.input[0] for node in graph.node if node.input}
    weights = [node.input[1] for node in graph.node if node.op_type in ("Conv", "Gemm")]
    # Each is a product of scales and of what was cast to floats.
    stored = [types[first_inputs[first_inputs[name]]] for name in weights]
    assert stored == [onnx.TensorProto.INT8] * 18
    if not options:
        images = make_golden_input((3, 32, 32)).float().numpy()
        [logits] = onnxruntime.InferenceSession(file).run(None, {"images": images})
        in_openvino = openvino.Core().compile_model(file, "CPU", IN_FP32)(images)[0]
        assert abs(in_openvino - logits).max() < 0.02 * abs(logits).max()


def test_int8_that_costs_too_much_is_refused(cifar_sample, tmp_path):
    message = (
        rf"^{ARCH}: int8 lowers the top-1 from [\d.]+ to [\d.]+ %; give a larger --max-loss, or "
        "leave --int8 out$"
    )
    with pytest.raises(CheckpointError, match=message):
        # Not even a gain of all points is enough.
        export(ARCH, tmp_path / "out", int8_dataset=open_dataset(cifar_sample), max_loss=-101)
    assert not list((tmp_path / "out").iterdir())


def test_what_cannot_be_exported_is_one_line(cifar_sample, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="file/model.pt2: cannot be written .*; make room, or"):
        export(ARCH, tmp_path / "file", "pt2")
    with pytest.raises(CheckpointError, match="^.*: int8 is only for ONNX; leave --int8 or --f"):
        export(ARCH, tmp_path, "pt2", int8_dataset=open_dataset(cifar_sample))
    with pytest.raises(DataError, match=r"has the class airplane, but the model knows apple, .*"):
        export("convmixer_cifar.cifar100", tmp_path, int8_dataset=open_dataset(cifar_sample))
    for options in (["--int8"], ["--data", cifar_sample]):
        result = convmixer("export", "--output", tmp_path, *options)
        assert result.exit_code == 2
        assert "--int8 and --data go together: give both, or none" in result.output
    monkeypatch.setattr(runtimes, "find_spec", lambda name: None)
    with pytest.raises(CheckpointError, match="^exporting to ONNX needs onnx: pip install onnx"):
        export(ARCH, tmp_path)


@pytest.mark.parametrize(
    ("options", "labels"),
    [
        ({"in_chans": 1, "label_names": ["a", "b"]}, ["a", "b"]),
        ({"in_chans": 4, "num_classes": 3}, None),
    ],
)
def test_other_models_can_be_exported(options, labels, tmp_path):
    model = timm.create_model(ARCH, **options)
    size = (model.in_chans, 24, 40)
    model.pretrained_cfg["input_size"] = size
    save_model(model, tmp_path / "run", {})
    done = export(tmp_path / "run", tmp_path, with_preprocessing=True)
    session = onnxruntime.InferenceSession(done.file)
    assert session.get_inputs()[0].shape[1:] == [24, 40, model.in_chans]
    assert json.loads(session.get_modelmeta().custom_metadata_map["labels"]) == labels


def test_what_fails_in_an_exporter_is_one_line(tmp_path, monkeypatch):
    def fail(*_):
        raise TypeError("no such operator\nfor long reasons")

    monkeypatch.setitem(RUNTIMES, "onnx", (fail, None))
    message = r"^convmixer_cifar: cannot be exported as onnx \(no such operator\); try another --f"
    with pytest.raises(CheckpointError, match=message):
        export("convmixer_cifar", tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_logits_are_compared_with_those_recorded(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = shutil.copytree(CHECKOUT / "weights" / NAME, Path("convmixer_cifar"))
    file = run / "golden.json"
    golden = json.loads(file.read_text())
    golden["logits"][0][0] += 1
    file.write_text(json.dumps(golden))
    message = (
        "its logits do not match golden.json, so it was not exported; try another version of t"
    )
    with pytest.raises(CheckpointError, match=message):
        export(run, Path("out"), "pt2")  # a path, although a model has this name
    assert not Path("out").exists()
    weights = shutil.copy(run / "model.safetensors", run / "others.safetensors")
    assert not export(weights, Path("others"), "pt2").verified  # the file is not of these
    file.unlink()
    result = convmixer("export", f"./{run}", "-o", "out", "--format", "pt2")
    assert (
        "convmixer_cifar: has no golden.json to compare torch's logits with; `convmixer card` wri"
        in result.stderr
    )
    assert Path("out", "model.pt2").exists()


def test_an_export_with_other_logits_is_not_kept(tmp_path, monkeypatch):
    ones = (write_onnx, lambda file: lambda x: torch.ones(len(x), 10))
    monkeypatch.setitem(RUNTIMES, "onnx", ones)
    with pytest.raises(CheckpointError, match="as onnx, its logits differ from torch's by [12]e"):
        export(ARCH, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())
