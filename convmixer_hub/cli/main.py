"""The command `convmixer`: its groups of commands, and what they have in common."""

from __future__ import annotations

from typing import Any

import click

from ..errors import ConvMixerHubError
from ..version import __version__
from . import measure, share, train, use

SECTIONS: dict[str, list[click.Command]] = {
    "Use": [
        use.list_command,
        use.predict_command,
        use.evaluate_command,
        use.info_command,
        use.verify_command,
        use.doctor_command,
        use.pull_command,
        use.run_script_command,
    ],
    "Train": [train.train_command, train.finetune_command],
    "Share": [share.card_command, share.publish_command, share.convert_command],
    "Measure": [measure.bench_group],
}


class _Group(click.Group):
    """Prints the package's own errors as one line on stderr, and the commands by section."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except ConvMixerHubError as error:
            raise click.ClickException(str(error)) from None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for section, commands in SECTIONS.items():
            with formatter.section(section):
                formatter.write_dl([(c.name or "", summarize(c)) for c in commands])


def summarize(command: click.Command) -> str:
    """Give the first sentence of a command's help, whole."""
    first_paragraph, _, _ = (command.help or "").partition("\n\n")
    return " ".join(first_paragraph.split()).removesuffix(".")


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, package_name="convmixer-hub")
def main() -> None:
    """Trained ConvMixers by name."""


for commands in SECTIONS.values():
    for command in commands:
        main.add_command(command)
