import json
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from click.testing import CliRunner
from PIL import Image

from convmixer_hub import ConvMixer, __version__, find_checkpoint, get_record
from convmixer_hub.cli.main import COMMANDS, SECTIONS, main
from convmixer_hub.data.images import open_image
from convmixer_hub.data.reader import open_dataset
from convmixer_hub.evaluate import evaluate_on
from convmixer_hub.hub.records import CIFAR10, RECORDS
from convmixer_hub.load import load_trained
from convmixer_hub.predict import predict

from .conftest import ARCH, CAT, CHECKOUT, IMAGES, NAME, convmixer, print_table, write_tree


def test_a_table_does_not_write_to_the_terminal_what_a_file_says(tmp_path):
    file = tmp_path / "a.safetensors"
    tensors = safetensors.torch.load_file(find_checkpoint(NAME))
    safetensors.torch.save_file(tensors, file, {"by": "\x1b[2Jme\nsha256  on record"})
    assert "by=\\x1b[2Jme\\nsha256  on record" in convmixer("info", file).stdout


def test_version():
    assert __version__ in convmixer("--version").output


def test_list_shows_every_model_in_aligned_columns(monkeypatch):
    monkeypatch.setattr(ConvMixer, "__init__", None)  # no model is built for it
    result = convmixer("list")
    assert result.exit_code == 0
    header, *rows = (re.split(r" {2,}", line) for line in result.output.splitlines())
    assert header == ["name", "parameters", "MACs", "dataset", "top-1", "ECE", "size", "source"]
    record = get_record(NAME)
    figures = [f"{record.top1:.2f} %", f"{record.ece:.2f} %", "2.6 MB"]
    assert [NAME, "643,338", "160.7M", "CIFAR-10", *figures, "embedded"] in rows
    assert [name for name, *_ in rows] == list(RECORDS)
    starts = {line.index("%") for line in result.output.splitlines() if "%" in line}
    assert len(starts) == 1  # the columns are aligned


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_each_command_with_its_first_sentence(name):
    [section] = [section for section, commands in SECTIONS.items() if name in commands]
    text = " ".join(convmixer("--help").stdout.split())
    own = " ".join(convmixer(name, "--help").stdout.split())
    assert f"{section}: " in text and f" {name} {COMMANDS[name][1]}" in text
    assert f" {COMMANDS[name][1]}. " in own


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (None, "Use:"),
        ("convmixer pre", "plain,predict"),
        ("convmixer evaluate convmixer_c", f"plain,{NAME}"),
        ("convmixer predict --model convmixer_c", f"plain,{NAME}"),
        ("convmixer predict --model ", f"plain,{NAME}"),
        ("convmixer bench finetune ", f"plain,{NAME}"),
        ("convmixer predict tests/im", "file,tests/im"),
        ("convmixer bench finetune convmixer_c", f"plain,{NAME}"),
    ],
)
def test_help_and_completion_load_nothing_heavy(run_python, words, expected):
    code = f"""
import runpy, sys
names = runpy.run_path({str(CHECKOUT / "convmixer_hub" / "cli" / "main.py")!r})
try:
    names["main"](["--help"], prog_name="convmixer")
finally:
    print(sorted({{"torch", "timm", "convmixer_hub"}} & sys.modules.keys()))
"""
    environment = {}
    if words:
        environment["_CONVMIXER_COMPLETE"] = "bash_complete"
        environment["COMP_WORDS"] = words.replace(" ", "\n")  # as bash has them
        environment["COMP_CWORD"] = str(words.count(" "))
    lines = run_python(code, **environment).splitlines()
    assert expected in lines and lines[-1] == "[]"


@pytest.mark.parametrize(
    ("words", "expected"), [("evaluate --lab", "--label-column"), ("bench tr", "train")]
)
def test_options_and_benchmarks_are_completed(words, expected):
    environment = {"_CONVMIXER_COMPLETE": "bash_complete", "COMP_CWORD": "2"}
    for separator in ("\n", " "):  # in bash, and in zsh
        environment["COMP_WORDS"] = separator.join(["convmixer", *words.split()])
        result = convmixer(prog_name="convmixer", env=environment)
        assert result.output == f"plain,{expected}\n"


def test_the_readme_has_the_table_that_list_prints():
    table = convmixer("list", "--markdown").stdout
    assert table.count("\n") == len(RECORDS) + 2
    assert table in (CHECKOUT / "README.md").read_text()


@pytest.mark.parametrize("name", RECORDS)
def test_cards_state_the_recorded_figures(name):
    card = (CHECKOUT / "weights" / name / "README.md").read_text()
    assert f"**Top-1: {RECORDS[name].top1:.2f} %**" in card
    assert f"(ECE): {RECORDS[name].ece:.2f} %" in card


def test_predict_answers_in_words_and_in_json():
    images = [IMAGES / "cat.png", IMAGES / "ship.png"]
    lines = convmixer("predict", *images, "--top-k", 2).output.splitlines()
    answers = json.loads(convmixer("predict", *images, "--top-k", 2, "--json").output)
    assert [answer["image"] for answer in answers] == [str(image) for image in images]
    for line, answer in zip(lines, answers, strict=True):
        first, second = answer["predictions"]
        assert first["label"] in CIFAR10.classes
        assert first["probability"] >= second["probability"]
        assert line == (
            f"{answer['image']}: {first['label']} {100 * first['probability']:.1f} %, "
            f"{second['label']} {100 * second['probability']:.1f} %"
        )
    assert answers[0]["predictions"][0]["label"] == "cat"


def test_a_file_that_is_no_image_is_named_and_the_others_answered(tmp_path):
    bad = tmp_path / "notes.png"
    bad.write_text("no image")
    result = convmixer("predict", bad, IMAGES / "cat.png", tmp_path / "none.png", "--json")
    assert result.exit_code == 1
    assert [answer["image"] for answer in json.loads(result.stdout)] == [str(IMAGES / "cat.png")]
    assert result.stderr.splitlines() == [
        f"Error: {bad}: not an image that Pillow can read; give a PNG, JPEG, …",
        f"Error: {tmp_path / 'none.png'}: no such file; check the path",
    ]


def test_without_matplotlib_nothing_is_answered_in_vain(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = convmixer("predict", IMAGES / "cat.png", "--figure", "figure.png")
    assert result.stdout == "" and "drawing needs matplotlib: pip install matp" in result.stderr


@pytest.mark.parametrize(
    ("figure", "message"),
    [
        ("missing/figure.png", r"figure.png: cannot be written \(.*\); make room, or name another"),
        ("figure.svg", "figure.svg: is written as PNG; give it a name in .png"),
        ("cat.png", "cat.png: exists and is not a figure; name a new file"),
    ],
)
def test_a_figure_that_cannot_be_written_is_named(tmp_path, figure, message):
    (tmp_path / "cat.png").write_bytes(CAT)
    result = convmixer("predict", IMAGES / "cat.png", "--figure", tmp_path / figure)
    assert result.exit_code != 0
    assert re.search(message, result.stderr)
    assert (tmp_path / "cat.png").read_bytes() == CAT


def test_the_card_of_a_name_is_not_written_into_the_package(cifar_sample, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = convmixer("card", ARCH, "--data", cifar_sample, "--license", "cc-by-4.0")
    assert result.exit_code == 0, result.stderr
    assert result.stdout == f"{ARCH}.cifar10/README.md\n"  # no weights beside it
    text = Path(result.stdout.strip()).read_text()
    assert "of the 10 test images" in text and "\nlicense: cc-by-4.0\n" in text


def test_the_record_of_a_folder_with_the_name_of_a_model_is_printed(
    cifar_sample, tmp_path, monkeypatch
):
    sample = replace(CIFAR10, test_images=10)
    monkeypatch.setattr("convmixer_hub.release.card.DATASETS", [sample])
    folder = shutil.copytree(CHECKOUT / "weights" / NAME, tmp_path / NAME)
    record = get_record(NAME)
    printed = convmixer("card", folder, "--data", cifar_sample).stdout
    assert f'CheckpointRecord(\n    name="{NAME}",\n    sha256="{record.sha256}",' in printed


@pytest.mark.parametrize(
    ("command", "options", "message"),
    [
        ("card", [], "is no folder of a model; name a run folder, or a model"),
        ("publish", ["--repo-id", "a/b"], "is no folder of a model; name a run folder, or a model"),
        ("finetune", ["--output", "run"], "is weights without their config.json; name the folder"),
    ],
)
def test_a_file_alone_is_no_model_for(
    cifar_sample, tmp_path, monkeypatch, command, options, message
):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "other.safetensors"
    shutil.copy(CHECKOUT / "weights" / NAME / "model.safetensors", file)
    if command != "publish":
        options = [*options, "--data", cifar_sample]
    assert convmixer(command, file, *options).stderr.startswith(f"Error: {file}: {message}")
    assert list(tmp_path.iterdir()) == [file]
    assert "cat" in convmixer("predict", IMAGES / "cat.png", "--model", file).stdout


def test_a_card_is_not_written_beside_other_weights(untrained, cifar_sample, monkeypatch):
    monkeypatch.chdir(untrained.parent)
    untrained.rename(NAME)
    result = convmixer("card", NAME, "--data", cifar_sample)
    assert result.stderr == (
        f"Error: {NAME}/model.safetensors: is of another model; name another --output\n"
    )
    assert not Path(NAME, "README.md").exists()


@pytest.mark.parametrize("command", [["card", "--data", "DIR"], ["publish", "--repo-id", "a/b"]])
def test_a_repository_of_the_hub_is_no_model_for(hub, command):
    name = f"hf-hub:convmixer-hub/{NAME}"
    result = convmixer(*command, name)
    message = f"Error: {name}: is no folder of a model; name a run folder, or a model of this"
    assert (result.exit_code, result.stderr[: len(message)]) == (1, message)


def test_predict_draws_a_figure(tmp_path):
    Image.new("RGB", (32, 32), "red").save(tmp_path / "red.png")
    figure = tmp_path / "figure.png"
    for _ in range(2):  # the second time over the first one
        assert convmixer("predict", tmp_path / "red.png", "--figure", figure).exit_code == 0
    drawn = open_image(figure)
    pixels = {color: count for count, color in drawn.getcolors(drawn.width * drawn.height)}
    assert pixels[255, 0, 0] > 10_000


def test_an_unknown_model_proposes_the_nearest():
    result = convmixer("predict", IMAGES / "cat.png", "--model", "convmixer_cifr")
    assert result.exit_code == 1
    assert result.stderr.startswith(
        "Error: no file or folder, and no trained weights are named 'convmixer_cifr'; "
        f"did you mean {NAME}"
    )
    assert result.stderr.count("\n") == 1


def test_train_predict_and_evaluate_take_the_same_folder(cifar_sample, tmp_path):
    run = tmp_path / "run"
    options = ["--epochs", 1, "--batch-size", 10]
    trained = convmixer("train", ARCH, "--data", cifar_sample, "--output", run, *options)
    assert trained.exit_code == 0, trained.stderr
    assert trained.stdout.endswith(
        f"{run}: finished; measure it with: convmixer evaluate {run} --data {cifar_sample}\n"
    )
    result = evaluate_on(load_trained(run), open_dataset(cifar_sample))
    evaluated = convmixer("evaluate", run, "--data", cifar_sample, "--workers", 0)
    assert evaluated.stdout.startswith(
        f"{run}: top-1 {result.top1:.2f} % ({result.correct} of 10 test images in 10 classes"
    )
    [[first, *_]] = predict(load_trained(run), [open_image(CAT)])
    predicted = convmixer("predict", IMAGES / "cat.png", "--model", run)
    assert f": {first.label} {100 * first.probability:.1f} %, " in predicted.stdout


def test_convert_says_what_it_wrote_and_asks_for_what_it_cannot_know(tmp_path):
    output, back = tmp_path / "out.safetensors", tmp_path / "back.safetensors"
    result = convmixer("convert", NAME, output, "--layout", "timm")
    assert result.exit_code == 0, result.stderr
    assert result.stdout == (
        f"{output}: {NAME} in layout timm, gelu, 121 tensors, 643,338 parameters\n"
    )
    tensors = safetensors.torch.load_file(output)
    torch.save({"state_dict_ema": tensors}, tmp_path / "in.pth")
    arguments = ["convert", tmp_path / "in.pth", back, "--layout", "ours"]
    refused = convmixer(*arguments)
    assert refused.exit_code == 1
    assert refused.stderr == (
        f"Error: {tmp_path / 'in.pth'}: nothing in it tells the activation; "
        "give --activation gelu or relu\n"
    )
    assert not back.exists()
    result = convmixer(*arguments, "--activation", "gelu")
    assert result.stdout.startswith(f"{back}: {tmp_path / 'in.pth'} (state_dict_ema of it) in lay")
    expected = safetensors.torch.load_file(find_checkpoint(NAME))
    torch.testing.assert_close(safetensors.torch.load_file(back), expected, atol=0, rtol=0)


def test_info_of_a_name_and_of_its_folder():
    info = dict(print_table(f"info {NAME}"))
    file = CHECKOUT / "weights" / NAME / "model.safetensors"
    assert info == {
        "file": str(file),
        "bytes": f"{get_record(NAME).size:,}",
        "sha256": f"{get_record(NAME).sha256}, on record for {NAME}",
        "layout": "ours",
        "size": "8 layers × 256 channels, kernel 7, patch 2, 3 image channels, 10 classes",
        "arch": "convmixer_cifar",
        "activation": "gelu",
        "tensors": "104 float32, 17 int64",
        "parameters": "643,338",
        "metadata": "none",
    }
    assert dict(print_table(f"info {file.parent}")) == info


def test_a_script_of_anybodys_knows_the_models(run_python, tmp_path):
    (tmp_path / "helper.py").write_text("NAMES = 'convmixer_cifar*'")
    script = tmp_path / "list_names.py"
    script.write_text(
        "import sys, helper, timm\n"
        "if __name__ == '__main__':\n"
        "    print(timm.list_models(helper.NAMES), sys.argv)\n"
        "    sys.exit(3)\n"
    )
    command = ["convmixer", "run-script", str(script), "--help", "-x", "1"]
    code = (
        "import runpy, sys\n"
        f"sys.argv = {command}\n"
        "try:\n"
        "    runpy.run_module('convmixer_hub', run_name='__main__')\n"
        "except SystemExit as end:\n"
        "    print(end.code)\n"
    )
    output = run_python(code)
    assert output == f"['convmixer_cifar'] {command[2:]}\n3"


def test_a_terminal_that_does_not_know_all_characters_is_no_hindrance(tmp_path, monkeypatch):
    def run(*arguments):
        return CliRunner(charset="latin-1").invoke(main, arguments, catch_exceptions=False)

    monkeypatch.chdir(tmp_path)
    names = ["caf\udcff.png", "Kätzchen 熊.png", "two\nlines.png", "100$ $cat$.png"]
    write_tree(tmp_path, *names, ("br\noken.png", b"x"))
    assert "8 layers × 256 channels" in run("info", "convmixer_cifar").stdout
    predicted = run("predict", *names, "br\noken.png", "--figure", "seen.png")
    assert predicted.exit_code == 1
    assert predicted.stderr.startswith("Error: br\\noken.png: not an image that Pillow can read")
    shown = ["caf\\udcff.png", "Kätzchen \\u718a.png", "two\\nlines.png", "100$ $cat$.png"]
    assert [line.partition(": cat ")[0] for line in predicted.stdout.splitlines()] == shown
    assert len(json.loads(run("predict", "--json", *names).stdout)) == 4
    with Image.open("seen.png") as figure:
        assert figure.format == "PNG"
