"""Everything that can go wrong: one class for each kind of failure.

Each message is one line: what failed, on what, and what to do next.
"""

import re


class ConvMixerHubError(Exception):
    """Base of all errors that this package raises on purpose."""


class ModelSizeError(ConvMixerHubError, ValueError):
    """A model was asked for with sizes that it cannot have."""


class UnknownModelError(ConvMixerHubError, LookupError):
    """No model, or no trained model, has this name."""


class CheckpointError(ConvMixerHubError, RuntimeError):
    """A checkpoint is missing, damaged, or does not fit the model."""


class DataError(ConvMixerHubError, ValueError):
    """A dataset or an image cannot be read as one."""


class TrainingError(ConvMixerHubError, RuntimeError):
    """A training run cannot start, or cannot go on."""


class PublishError(ConvMixerHubError, RuntimeError):
    """A model cannot be published on the Hub."""


_JOINERS = "\u200c\u200d\u3000"  # in words of Persian, Hindi, Japanese, …, and in emoji


def printable(text: object) -> str:
    """Escape what a terminal does not show as it is, such as line breaks and undecodable bytes."""
    return "".join(
        c if c.isprintable() or c in _JOINERS else c.encode("unicode_escape").decode()
        for c in str(text)
    )


def first_line(error: BaseException) -> str:
    """Shorten another library's error to one line, without colors."""
    text = re.sub(r"\x1b\[[\d;]*m", "", str(error)).strip()
    return (text or type(error).__name__).splitlines()[0].rstrip(".")
