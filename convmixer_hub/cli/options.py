"""What the commands share: options, and the way a table is printed."""

from __future__ import annotations

from pathlib import Path

import click

DEFAULT_MODEL = "convmixer_cifar"

POSITIVE = click.IntRange(min=1)
NOT_NEGATIVE = click.IntRange(min=0)


data_option = click.option(
    "--data",
    required=True,
    type=click.Path(path_type=Path),
    help="Folder with parquet files, cifar-10-batches-py, or class folders in train/, test/, …",
)


def print_table(rows: list[list[str]]) -> None:
    """Print rows of equal length, the first being the header, in aligned columns."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows)]
    for row in rows:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())


def print_markdown(rows: list[list[str]]) -> None:
    """Print the same as a table in Markdown."""
    header, *others = rows
    for row in [header, ["---"] * len(header), *others]:
        click.echo(f"| {' | '.join(row)} |")
