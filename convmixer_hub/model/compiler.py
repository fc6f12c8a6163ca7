"""Operators in C++, compiled on the machine they run on, the first time that they are needed."""

from __future__ import annotations

import hashlib
import logging
import os
import shlex
import subprocess
from contextlib import suppress
from functools import cache
from pathlib import Path

import torch

from ..errors import first_line
from ..files import replacing
from ..machine import describe_processor

KERNEL_SIZES = (3, 5, 7, 9)  # of the depthwise convolutions that the C++ files have

FLAGS = ("-O3", "-fno-fast-math", "-march=native", "-std=c++20", "-fopenmp", "-fPIC", "-shared")

_logger = logging.getLogger(__name__)


@cache
def load_operators(name: str, effect: str) -> bool:
    """Compile `name`.cpp (10 seconds, once per machine) and load it as `torch.ops.convmixer_hub`.

    Args:
        name: Of a file beside this one.
        effect: What it means if that fails, for the message.

    Returns:
        Whether that worked; if not, one WARNING says why.
    """
    source = Path(__file__).with_name(f"{name}.cpp")
    torch_folder = Path(torch.__file__).parent
    abi = int(torch.compiled_with_cxx11_abi())
    flags = [*FLAGS, f"-D_GLIBCXX_USE_CXX11_ABI={abi}", f"-I{torch_folder / 'include'}"]
    flags += [f"-L{torch_folder / 'lib'}", "-ltorch_cpu", "-lc10"]
    try:
        compiler = shlex.split(os.environ.get("CXX") or "c++")
        # What is compiled for one processor may not run on another that shares the folder.
        processor = describe_processor("flags", "Features")
        texts = [file.read_text() for file in (source, source.with_name("vectors.h"))]
        made_of = [*texts, *compiler, *flags, torch.__version__, processor]
        digest = hashlib.sha256("\0".join(made_of).encode()).hexdigest()
        folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
        library = folder / "convmixer_hub" / f"{name}_{digest[:16]}.so"
        if library.exists():
            with suppress(OSError):  # it is damaged, or of a newer system that shares the folder
                torch.ops.load_library(str(library))
                return True
        library.parent.mkdir(parents=True, exist_ok=True)
        with replacing(library) as temporary:
            _run([*compiler, str(source), *flags, "-o", str(temporary)])
        torch.ops.load_library(str(library))
    except (OSError, RuntimeError, ValueError) as error:  # of no home folder, of quotes in CXX
        _logger.warning(
            "%s: %s cannot be compiled or loaded (%s); install a C++ compiler such as g++, or name "
            "one in CXX; if the cache folder cannot be written to, name another in XDG_CACHE_HOME",
            effect,
            source.name,
            first_line(error.__cause__ or error),  # torch hides why a file cannot be loaded
        )
        return False
    return True


def _run(command: list[str]) -> None:
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except subprocess.CalledProcessError as error:
        lines = [line for line in error.stderr.splitlines() if "error" in line] or [error.stderr]
        raise OSError(lines[0] or f"{command[0]} failed without a message") from None
