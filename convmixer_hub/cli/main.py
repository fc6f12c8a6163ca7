"""The command `convmixer`: its groups of commands, each loaded when it is used.

Loading the package takes seconds, as it registers the models with timm. So this module imports
nothing but click; it is installed under a name of its own, too (see setup.cfg), and `convmixer
--help` does not load the package.
"""

from __future__ import annotations

import os
import re
import sys
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from io import TextIOWrapper
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

# What each command does. The function of `name` is `name_command`, in the module of its section.
SECTIONS = {
    "Use": {
        "list": "List the models: dataset, parameters, MACs, top-1, calibration error (ECE)",
        "predict": "Name the most likely classes of images",
        "evaluate": "Measure the top-1 accuracy of a model on the test images of a dataset",
        "demo": "Serve a web page to try models on, on localhost only",
        "info": "Describe a checkpoint",
        "verify": "Compare the logits of a model with reference logits",
        "doctor": "Check whether models can be loaded on this machine, and if not, why",
        "pull": "Download weights into the Hub's cache, for later use without network",
        "run-script": "Run a Python script, such as timm's validate.py, with the models registered",
    },
    "Train": {
        "train": "Train a model from scratch; the same command resumes a stopped run",
        "finetune": (
            "Fine-tune a trained model on other images; the same command resumes a stopped run"
        ),
    },
    "Share": {
        "card": "Write a model card with its figures and reference logits",
        "publish": "Upload a model to the Hub in one commit, and download it again to compare",
        "export": "Write a model for other runtimes, and compare its logits with torch's",
        "convert": "Write a checkpoint as safetensors, in the layout of another implementation",
    },
    "Measure": {"bench": "Run the benchmarks: speed, memory, fine-tuning"},
}
COMMANDS = {
    name: (section.lower(), summary)
    for section, commands in SECTIONS.items()
    for name, summary in commands.items()
}


def _needs_command() -> bool:
    """Return whether only its command can complete a word: an option, or a benchmark's name."""
    words = re.split(r"[ \n]", os.environ.get("COMP_WORDS", ""))  # bash puts newlines between
    if words[1:2] == ["bench"] and len(words) <= 3:
        return True
    return os.environ.get("COMP_CWORD", "").startswith("-") or words[-1].startswith("-")


def _complete_names(
    ctx: click.Context, parameter: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """Propose the trained models, by the folders of their weights, and files."""
    package = find_spec("convmixer_hub")
    places = [Path(place) for place in (package and package.submodule_search_locations) or ()]
    folders = [
        folder.name
        for place in places
        for weights in (place / "weights", place.parent / "weights")  # installed, in a clone
        if weights.is_dir()
        for folder in sorted(weights.iterdir())
        if "." in folder.name
    ]
    names = [CompletionItem(name) for name in folders if name.startswith(incomplete)]
    return [*names, CompletionItem(incomplete, type="file")]


# Stands for any command while the shell completes its arguments, as loading one takes seconds.
_NAMES = click.Command(
    "names",
    params=[click.Argument(["names"], nargs=-1, shell_complete=_complete_names)],
    context_settings={"ignore_unknown_options": True},
)


class _Group(click.Group):
    """Loads commands late, and prints the package's own errors as one line, exit status 1."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        if ctx.resilient_parsing and not _needs_command():
            return _NAMES
        module = import_module(f"convmixer_hub.cli.{COMMANDS[name][0]}")
        command: click.Command = getattr(module, f"{name.replace('-', '_')}_command")
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for section, commands in SECTIONS.items():
            with formatter.section(section):
                formatter.write_dl(list(commands.items()))

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        commands = [
            CompletionItem(name, help=summary)
            for name, (_, summary) in COMMANDS.items()
            if name.startswith(incomplete)
        ]
        return commands + click.Command.shell_complete(self, ctx, incomplete)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except Exception as error:
            if isinstance(error, ImportError) and "convmixer_hub" not in sys.modules:
                raise click.ClickException(str(error)) from None  # of versions that are too old
            from convmixer_hub.errors import ConvMixerHubError, printable

            if not isinstance(error, ConvMixerHubError):
                raise
            raise click.ClickException(printable(error)) from None

    def main(self, *args: Any, **extra: Any) -> Any:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, TextIOWrapper):
                # Not every terminal knows "×", nor is every name of a file text.
                stream.reconfigure(errors="backslashreplace")
        return super().main(*args, **extra)


def _find_version() -> str:
    try:
        return version("convmixer-hub")
    except PackageNotFoundError:  # a clone that was never installed
        return str(import_module("convmixer_hub.version").__version__)


@click.group(
    cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "show_default": True}
)
@click.version_option(_find_version(), prog_name="convmixer")
def main() -> None:
    """Trained ConvMixers by name."""
