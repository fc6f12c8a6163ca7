"""The version of this package, and those that it needs of others."""

from importlib import import_module

from packaging.version import Version

__version__ = "0.1.0"

# As in setup.cfg, which torch.hub and a script in a clone of timm do not ask.
NEEDED = {"torch": "2.6", "timm": "1.0.31", "huggingface_hub": "1.31"}


def check_versions() -> None:
    """Refuse libraries that are too old, before a name that they lack is imported from them.

    Raises:
        ImportError: Naming the library, its version, where it is, and the remedy.
    """
    for name, needed in NEEDED.items():
        library = import_module(name)
        if Version(library.__version__).release < Version(needed).release:
            raise ImportError(
                f"convmixer_hub needs {name} {needed} or later, but {library.__file__} is "
                f"{library.__version__}; run: pip install --upgrade '{name}>={needed}'"
            )
