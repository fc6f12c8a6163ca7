"""What the commands share: options, and the way a table is printed."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import click

from ..data.reader import ImageDataset, open_dataset
from ..errors import printable

DEFAULT_MODEL = "convmixer_cifar"

POSITIVE = click.IntRange(min=1)
NOT_NEGATIVE = click.IntRange(min=0)

OpenData = Callable[[], ImageDataset]


def data_options(command: Callable, required: bool = True) -> Callable:
    """Add the options that name a dataset, and pass `open_data`, which opens it, to the command."""

    @click.option(
        "--data",
        required=required,
        metavar="DIR|OWNER/NAME",
        help="Folder with class folders, train/<class>/*.png, parquet files, metadata.csv, …; or a "
        "dataset of the Hub. See docs/data.md.",
    )
    @click.option(
        "--config", help="Which dataset of several: a folder in DIR, or its name on the Hub."
    )
    @click.option(
        "--label-column", help="Column with the classes, if it is not label, labels or fine_label."
    )
    @wraps(command)
    def run(
        *arguments: Any,
        data: str | None,
        config: str | None,
        label_column: str | None,
        **options: Any,
    ) -> Any:
        if data is None:
            return command(*arguments, open_data=None, **options)

        def open_data() -> ImageDataset:
            dataset = open_dataset(data, config, label_column)
            for line in dataset.left_out:
                click.echo(line, err=True)
            return dataset

        return command(*arguments, open_data=open_data, **options)

    return run


def print_table(rows: list[list[str]]) -> None:
    """Print rows of equal length, the first being the header, in aligned columns."""
    rows = [[printable(cell) for cell in row] for row in rows]
    widths = [max(len(cell) for cell in column) for column in zip(*rows)]
    for row in rows:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())


def print_markdown(rows: list[list[str]]) -> None:
    """Print the same as a table in Markdown."""
    header, *others = rows
    for row in [header, ["---"] * len(header), *others]:
        click.echo(f"| {' | '.join(row)} |")
