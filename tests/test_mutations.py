"""Damaged files by the hundred: none does harm."""

import json
import resource
from pathlib import Path

import pytest
import timm
import torch
from hypothesis import Phase, assume, given, settings
from hypothesis import strategies as st

from convmixer_hub import CheckpointError
from convmixer_hub.checkpoints.files import save_model
from convmixer_hub.load import load_trained

from .conftest import ARCH, limited


def little_memory():
    """Let this process have 512 MiB more than now: what it then asks for in vain is an error."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    return limited(resource.RLIMIT_AS, pages * resource.getpagesize() + 512 * 2**20)


NUMBERS = st.sampled_from([0, 1, 7, 8, 2**16, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64 - 1])
DTYPES = st.sampled_from(["F64", "F32", "F16", "F8_E4M3", "F4", "I64", "I32", "U8", "BOOL", "C64"])


@st.composite
def mutations_of_bytes(draw, content):
    """Change, put in, cut out or leave off bytes: in the header, near it, or in the body."""
    header = int.from_bytes(content[:8], "little")
    start = draw(st.integers(0, 8) | st.integers(0, header) | st.integers(0, len(content) - 1))
    change = draw(st.sampled_from(["change", "put in", "cut out", "leave off", "header length"]))
    if change == "change":
        changed = draw(st.binary(min_size=1, max_size=16))
        return content[:start] + changed + content[start + len(changed) :]
    if change == "put in":
        return content[:start] + draw(st.binary(min_size=1, max_size=16)) + content[start:]
    if change == "cut out":
        return content[:start] + content[start + draw(st.integers(1, 16)) :]
    if change == "leave off":
        return content[:start]
    return draw(NUMBERS).to_bytes(8, "little") + content[8:]


@st.composite
def mutations_of_header(draw, content):
    """Change the entry of one tensor, in a header that is still JSON of the stated length."""
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    key = draw(st.sampled_from(sorted(set(header) - {"__metadata__"})))
    entry = header[key]
    first, *others = entry["shape"] or [1]
    begin, end = entry["data_offsets"]
    number = draw(NUMBERS | st.integers(-2, 10**6))
    change = draw(st.sampled_from(["dtype", "shape", "offsets", "swap", "name", "kind", "none"]))
    if change == "dtype":
        entry["dtype"] = draw(DTYPES | st.text(max_size=4))
    elif change == "shape":
        entry["shape"] = draw(st.sampled_from([[number, *others], [*others, first], [number] * 9]))
    elif change == "offsets":
        entry["data_offsets"] = draw(
            st.sampled_from([[begin, number], [number, end], [end, begin]])
        )
    elif change == "swap":
        other = draw(st.sampled_from(sorted(set(header) - {"__metadata__"})))
        header[key], header[other] = header[other], header[key]
    elif change == "name":
        header[draw(st.text(max_size=8))] = header.pop(key)
    elif change == "kind":
        header[key] = draw(st.none() | st.integers() | st.text(max_size=4) | st.just([entry]))
    else:
        del header[key]
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + content[8 + size :]


@pytest.mark.slow
def test_a_mutated_file_is_refused_and_harms_nobody(tmp_path):
    """In a folder of a user's own, which no digest protects.

    A file may be loaded that is still whole and fits, and then the model has numbers in it that are
    finite; any other is one line that names the file.
    """
    own = tmp_path / "own"
    save_model(timm.create_model(ARCH), own, {})
    file = own / "model.safetensors"
    content = file.read_bytes()
    refused, loaded = 0, 0

    @settings(
        max_examples=500, deadline=None, database=None, derandomize=True, phases=[Phase.generate]
    )
    @given(mutations_of_bytes(content) | mutations_of_header(content))
    def check(mutated):
        nonlocal refused, loaded
        assume(mutated != content)
        file.write_bytes(mutated)
        try:
            with little_memory():
                model = load_trained(str(own))
        except CheckpointError as error:
            refused += 1
            assert str(error).startswith(str(own))
            assert len(str(error).splitlines()) == 1
        else:
            loaded += 1
            assert all(torch.isfinite(tensor).all() for tensor in model.state_dict().values())

    check()
    assert 0 < loaded < refused
