"""Reading and writing networks for other runtimes: ONNX and torch.export."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from ..errors import CheckpointError

METADATA_FILE = "metadata.json"  # in a .pt2 file

Network = Callable[[Tensor], Tensor]

# What writes and runs ONNX.
ONNX_LIBRARIES = ("onnx", "onnxscript", "onnxruntime")


def check_onnx_libraries() -> None:
    """Check that what writes and runs ONNX is installed.

    Raises:
        CheckpointError: If a library is missing, naming it.
    """
    for library in ONNX_LIBRARIES:
        if find_spec(library) is None:
            raise CheckpointError(
                f"exporting to ONNX needs {library}: pip install {' '.join(ONNX_LIBRARIES)}"
            )


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Keep what exporters say of themselves from a user who cannot act on it."""
    disabled = logging.root.manager.disable
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        logging.disable(max(disabled, logging.WARNING))
        try:
            yield
        finally:
            logging.disable(disabled)


def write_onnx(network: nn.Module, images: Tensor, metadata: dict[str, Any], file: Path) -> None:
    """Write a network as ONNX, from `images` to `logits`, for batches of any size.

    Args:
        network: In evaluation mode.
        images: An example of its input, of at least two images.
        metadata: What goes with it, each entry as text or as JSON.
        file: What to write.
    """
    with _quietly():
        program = torch.onnx.export(
            network,
            (images,),
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    for name, value in metadata.items():
        text = value if isinstance(value, str) else json.dumps(value)
        program.model.metadata_props[name] = text
    for node in program.model.graph:
        node.metadata_props.clear()  # such as stack traces, with the paths of this machine
    program.save(str(file), external_data=False)


def open_onnx(file: Path) -> Network:
    """Open an ONNX file in onnxruntime."""
    import onnxruntime

    session = onnxruntime.InferenceSession(file.read_bytes())
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def store_weights_in_int8(file: Path) -> None:
    """Store the weights of an ONNX file in int8, each row with a scale of its own, in place.

    Runtimes turn them into floats when they load the file (for a DequantizeLinear, which has the
    same result, onnxruntime does so at each call). Products in int8 would not be faster here, with
    GELU and BatchNorm in floats between them, and cost several tenths of a point of top-1.
    """
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    model = onnx.load(file)
    graph = model.graph
    products = ("Conv", "Gemm", "MatMul")
    weights = {node.input[1] for node in graph.node if node.op_type in products}
    for initializer in [i for i in graph.initializer if i.name in weights]:
        name, values = initializer.name, numpy_helper.to_array(initializer)
        scale = abs(values).max(axis=tuple(range(1, values.ndim)), keepdims=True).clip(1e-12) / 127
        graph.initializer.remove(initializer)
        graph.initializer.extend(
            [
                numpy_helper.from_array((values / scale).round().astype("int8"), f"{name}_int8"),
                numpy_helper.from_array(scale, f"{name}_scale"),
            ]
        )
        cast = helper.make_node("Cast", [f"{name}_int8"], [f"{name}_cast"], to=TensorProto.FLOAT)
        scaled = helper.make_node("Mul", [f"{name}_cast", f"{name}_scale"], [name])
        graph.node.insert(0, scaled)
        graph.node.insert(0, cast)
    onnx.save(model, file)


def write_pt2(network: nn.Module, images: Tensor, metadata: dict[str, Any], file: Path) -> None:
    """Write a network for `torch.export.load`; as `write_onnx`, with the metadata in a file."""
    dynamic_shapes = ({0: torch.export.Dim("batch")},)
    with _quietly():
        program = torch.export.export(network, (images,), dynamic_shapes=dynamic_shapes)
        for module in program.graph_module.modules():
            if isinstance(module, GraphModule):
                for node in module.graph.nodes:
                    node.meta.pop("stack_trace", None)  # with the paths of this machine
        torch.export.save(program, file, extra_files={METADATA_FILE: json.dumps(metadata)})


def open_pt2(file: Path) -> Network:
    """Open what `write_pt2` wrote."""
    network: Network = torch.export.load(file).module()
    return network
