"""A trained model's card: `README.md` and its figures, from the files of the model and one test.

No number of a card is written by hand. What only people know (choices, ablations, limits) stands
in `NOTES.md` beside the weights and is appended as it is.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from timm.data import resolve_input_data_config

from ..checkpoints.resolve import resolve
from ..data.reader import ImageDataset
from ..errors import (
    CheckpointError,
    DataError,
    TrainingError,
    UnknownModelError,
    first_line,
    printable,
)
from ..evaluate import (
    Calibration,
    Evaluation,
    collect_test_logits,
    count_confusions,
    measure_calibration,
)
from ..figures import (
    draw_confusion,
    draw_curve,
    draw_kernels,
    draw_patch_embedding,
    draw_reliability,
)
from ..files import hash_file, write_file, writing
from ..hub.records import (
    CARD_FILE,
    DATASETS,
    EXAMPLE_REPO_ID,
    RECORDS,
    WEIGHTS_FILE,
    DatasetRecord,
    get_record,
)
from ..hub.repository import PREFIX, Repository
from ..load import load_trained
from ..machine import describe_machine
from ..model.config import get_config, get_label_names
from ..model.convmixer import ConvMixer
from ..training.folder import METRICS_FILE, read_metrics
from ..training.settings import TrainingSettings, option_name
from .golden import write_golden

NOTES_FILE = "NOTES.md"
# Those that a card draws: predictions.png is there before it.
FIGURES = ("confusion.png", "curve.png", "kernels.png", "patch_embedding.png", "reliability.png")


def write_card(
    folder: str | Path,
    dataset: ImageDataset,
    output: str | Path | None = None,
    license: str | None = None,
    today: date | None = None,
) -> Path:
    """Measure a trained model on the test images of a dataset; write its card and figures.

    Its logits for `verify` are written too, see `golden.write_golden`.

    Args:
        folder: Holds the model as `train` writes it; the card has the folder's name. Without
            `metrics.csv` there is no curve and no training time.
        dataset: Its test images are looked at, or else those for validation.
        output: Where the files go, made if missing; the model's own folder if not given.
        license: As the Hub names it, such as `mit`; that of a model on record if not given.
        today: Date of the measurement; the present day if not given.

    Returns:
        The card. Each file is replaced whole or not at all, the card last.

    Raises:
        UnknownModelError: If there is no such folder.
        CheckpointError: If the model cannot be loaded or is no ConvMixer of this package, or its
            metrics or notes cannot be read.
        DataError: If the data cannot be read or has other classes than the model, if matplotlib is
            not installed, if the output cannot be written, or if it holds another model, card or
            pictures.
    """
    folder = Path(folder).resolve()
    name = printable(folder.name)
    source = resolve(folder)
    model = load_trained(source)
    if not isinstance(model, ConvMixer):
        raise CheckpointError(
            f"{folder}: holds a {type(model).__name__}; name a ConvMixer of this package"
        )
    output = Path(output or folder)
    _check_output(output, source.file)
    card_file = output / CARD_FILE
    settings = source.config.get("training") or {}
    metrics = read_metrics(folder / METRICS_FILE)
    notes = _read_notes(folder / NOTES_FILE)

    # What needs no images comes first: its errors show before the minutes that a test takes.
    figures = _draw_weights(model) | ({"curve.png": draw_curve(metrics)} if metrics else {})
    logits, labels = collect_test_logits(model, dataset)
    probabilities = logits.softmax(dim=1)
    confusion = count_confusions(probabilities, labels)
    calibration = measure_calibration(probabilities, labels)
    classes = get_label_names(model) or [str(i) for i in range(model.num_classes)]
    figures["confusion.png"] = draw_confusion(confusion, classes)
    figures["reliability.png"] = draw_reliability(calibration)

    # Other datasets have classes of these names, too.
    kind = (tuple(dataset.classes), len(labels))
    shown = next((d for d in DATASETS if (d.classes, d.test_images) == kind), dataset)
    split = dataset.test_split
    base_model = _find_base_model(settings)
    plan = _read_plan(settings)
    result = Evaluation(int(confusion.trace()), int(confusion.sum()))
    preprocessing = resolve_input_data_config(model)
    validation_top1 = metrics.get("held_out_top1", [0.0])
    known = RECORDS.get(name)
    is_known = known is not None and known.sha256 == hash_file(source.file)
    title = name if is_known else EXAMPLE_REPO_ID
    if license is None and is_known:
        license = get_config(model).get("license")
    card = ModelCard.from_template(
        _make_metadata(title, license, base_model, shown, split, result, calibration),
        template_str=Path(__file__).with_suffix(".md").read_text(encoding="utf-8"),
        name=title,
        argument=name if is_known else "RUN",
        model=model,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        preprocessing=preprocessing,
        source=name if is_known else f"{PREFIX}{EXAMPLE_REPO_ID}",
        base_model=base_model,
        has_predictions=(output / "predictions.png").is_file(),
        settings=settings,
        command=_write_command(plan) if plan else "",
        metrics=metrics,
        machine=source.config.get("machine"),
        validation_images="held-out training" if settings.get("held_out", 1) else "validation",
        validation_top1=validation_top1[-1],
        temperature=source.config.get("temperature", 1.0),
        by_class=zip(classes, confusion.diagonal().tolist(), confusion.sum(dim=1).tolist()),
        result=result,
        calibration=calibration,
        dataset=_name_dataset(shown),
        split=split,
        today=today or date.today(),
        measured_on=f"{describe_machine(torch.device('cpu'))}, torch {torch.__version__}",
    )
    for file_name, content in figures.items():
        write_file(output / file_name, content)
    write_golden(folder, output)
    text = re.sub(r"\n{3,}", "\n\n", str(card)).strip()
    write_file(card_file, f"{text}\n\n{notes}".strip().encode() + b"\n")
    return card_file


def _check_output(output: Path, weights: Path) -> None:
    """Make the folder if it is missing; refuse one that holds files of another model or card."""
    with writing(output):
        output.mkdir(parents=True, exist_ok=True)
        if not os.access(output, os.W_OK):
            raise PermissionError("it is read-only")
    card_file = output / CARD_FILE
    with writing(card_file):
        if card_file.is_file() and b"library_name: timm" not in card_file.read_bytes():
            raise DataError(f"{card_file}: was not written by this command; name another --output")
        there = output / WEIGHTS_FILE
        if there.is_file() and hash_file(there) != hash_file(weights):
            raise DataError(f"{there}: is of another model; name another --output")
        others = [output / name for name in FIGURES if (output / name).exists()]
        if others and not card_file.exists() and output.resolve() != weights.parent:
            raise DataError(
                f"{others[0]}: is there without a card; remove it, or name another --output"
            )


def propose_record(card: Path) -> str:
    """Write the entry of `hub.records.RECORDS` for a model with a card, to be pasted there.

    New weights under a known name get a new revision, so that an older version of this package
    still finds what it knows.

    Args:
        card: What `write_card` gave, beside the weights.

    Returns:
        A call in Python; empty if the dataset is none of `hub.records.DATASETS`.
    """
    weights = card.with_name(WEIGHTS_FILE)
    data = ModelCard.load(card).data
    results = {result.metric_name: result for result in data.eval_results or []}
    dataset = results["top-1"].dataset_name
    if dataset not in [known.name for known in DATASETS] or not weights.is_file():
        return ""
    name, digest = card.resolve().parent.name, hash_file(weights)
    known = RECORDS.get(name)
    revision = known.revision if known else "v1"
    if known and known.sha256 != digest and (version := re.fullmatch(r"v(\d+)", revision)):
        revision = f"v{int(version[1]) + 1}"
    return f"""CheckpointRecord(
    name="{name}",
    sha256="{digest}",
    size={weights.stat().st_size},
    dataset={dataset.replace("-", "")},
    top1={results["top-1"].metric_value},
    ece={results["ECE"].metric_value},
    revision="{revision}",
),"""


def _draw_weights(model: ConvMixer) -> dict[str, bytes]:
    weights = model.state_dict()
    kernels = [weights[key] for key in weights if key.endswith("depth_wise_conv.weight")]
    return {
        "patch_embedding.png": draw_patch_embedding(weights["patch_emb.conv.weight"]),
        "kernels.png": draw_kernels(kernels),
    }


def _make_metadata(
    name: str,
    license: str | None,
    base_model: str | None,
    dataset: ImageDataset | DatasetRecord,
    split: str,
    result: Evaluation,
    calibration: Calibration,
) -> ModelCardData:
    """Describe the model to the Hub."""
    figures = [
        ("accuracy", "top-1", result.top1),
        ("expected_calibration_error", "ECE", 100 * calibration.error),
    ]
    results = [
        EvalResult(
            task_type="image-classification",
            dataset_type=dataset.hub_id or _name_dataset(dataset),
            dataset_name=_name_dataset(dataset),
            dataset_split=split,
            metric_type=metric,
            metric_name=metric_name,
            metric_value=round(value, 2),
        )
        for metric, metric_name, value in figures
    ]
    return ModelCardData(
        license=license,
        base_model=base_model,
        library_name="timm",
        pipeline_tag="image-classification",
        tags=["image-classification", "timm", "convmixer"],
        datasets=[dataset.hub_id] if dataset.hub_id else None,
        metrics=["accuracy"],
        model_name=name,
        eval_results=results,
    )


def _find_base_model(settings: Mapping[str, Any]) -> str | None:
    """Find the Hub's id of the model that a run started from; a folder has none."""
    start = str(settings.get("model"))
    if not settings.get("pretrained"):
        return None
    with suppress(UnknownModelError):
        return get_record(start).repo_id
    repository = Repository.parse(start)
    return repository.repo_id if repository and not os.path.exists(start) else None


def _name_dataset(dataset: ImageDataset | DatasetRecord) -> str:
    """Return the name of a dataset; that of a folder says nothing to others."""
    if isinstance(dataset, DatasetRecord):
        return dataset.name
    return dataset.hub_id or "imagefolder"  # as the Hub's cards have it


def _read_plan(settings: Mapping[str, Any]) -> TrainingSettings | None:
    """Read the settings of a run; None if they are of another version, or there are none."""
    try:
        # Settings that were added after the run change nothing by default.
        return TrainingSettings(**settings)
    except (TypeError, TrainingError):
        return None


def _write_command(plan: TrainingSettings) -> str:
    """Write the command that trains with these settings."""
    settings = asdict(plan)
    defaults = asdict(TrainingSettings(plan.model, pretrained=plan.pretrained))
    defaults["pretrained"] = False
    command = ["convmixer", "train", settings["model"], "--data", "DIR", "--output", "RUN"]
    for name in [name for name in settings if settings[name] != defaults[name]]:
        option = option_name(name)
        if isinstance(settings[name], bool):
            command.append(option if settings[name] else f"--no-{option[2:]}")
        else:
            command += [option, str(settings[name])]
    return shlex.join(command)


def _read_notes(file: Path) -> str:
    if not file.exists():
        return ""
    try:
        return file.read_text(encoding="utf-8").strip()
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{file}: cannot be read as text ({first_line(error)}); save it as UTF-8"
        ) from None
