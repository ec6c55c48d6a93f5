"""Nested states (of optimisers, schedulers, random generators) as safetensors and JSON: exact, readable, no pickle."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from oprd.records import read_json, sync, write_json

TAG = "!"  # a JSON object with this key is not a mapping but something that JSON does not have
STORED = (torch.Tensor, torch.nn.Parameter)  # exactly these: a subclass holds more than its numbers


def save_tree(directory: Path, name: str, tree: Any) -> None:
    """Write ``name.json``, the skeleton, and ``name.safetensors``, the tensors, if there are any.

    A tree is made of mappings, lists, tuples, None, booleans, numbers (NaN and infinities too), strings, bytes, tensors and
    NumPy arrays. What comes back from `load_tree` is equal bit for bit and of the same types; mappings come back as ``dict``.

    Raises:
        ValueError: something else is in it; its place is named.
    """
    tensors: dict[str, Tensor] = {}
    skeleton = _skeleton(tree, name, tensors)
    if tensors:
        path = directory / f"{name}.safetensors"
        save_file(tensors, path)
        sync(path)
    write_json(directory / f"{name}.json", skeleton)


def load_tree(directory: Path, name: str) -> Any:
    """What `save_tree` wrote; tensors are on the CPU.

    Raises:
        ValueError: a file is missing, or it is not such a tree.
    """
    skeleton = read_json(directory / f"{name}.json")
    path = directory / f"{name}.safetensors"
    tensors = load_file(path) if path.exists() else {}
    try:
        return _tree(skeleton, tensors)
    except (KeyError, TypeError) as error:
        raise ValueError(f"{directory / name}.json does not fit its tensors ({error}).") from error


def has_tree(directory: Path, name: str) -> bool:
    """Whether `save_tree` wrote one of this name there."""
    return (Path(directory) / f"{name}.json").exists()


def _skeleton(value: Any, place: str, tensors: dict[str, Tensor]) -> Any:
    if value is None or type(value) in (bool, int, str):
        return value
    if type(value) is float:  # JSON writes the shortest decimal that reads back as the same number
        return value if math.isfinite(value) else {TAG: "float", "value": repr(value)}
    if type(value) is bytes:
        return {TAG: "bytes", "value": value.hex()}
    if isinstance(value, Tensor) and type(value) in STORED:
        # A copy: safetensors refuses views of one memory, and a copy has the row-major layout that it wants.
        tensors[place] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
        return {TAG: "tensor", "name": place}
    if isinstance(value, np.ndarray | np.generic) and not value.dtype.hasobject:
        flat = np.frombuffer(np.ascontiguousarray(value).tobytes(), dtype=np.uint8).copy()
        tensors[place] = torch.from_numpy(flat)
        kind = "array" if isinstance(value, np.ndarray) else "scalar"
        return {TAG: kind, "name": place, "dtype": value.dtype.str, "shape": list(value.shape)}
    if type(value) in (list, tuple):
        items = [_skeleton(item, f"{place}.{number}", tensors) for number, item in enumerate(value)]
        return items if type(value) is list else {TAG: "tuple", "items": items}
    if isinstance(value, Mapping):
        inner = {key: _skeleton(item, f"{place}.{key}", tensors) for key, item in value.items()}
        if len({str(key) for key in inner}) == len(inner):  # else two tensors would share a name
            if all(type(key) is str for key in inner) and TAG not in inner:
                return inner
            if all(type(key) in (bool, int, str) for key in inner):
                return {TAG: "dict", "items": [[key, item] for key, item in inner.items()]}
    raise ValueError(
        f"{place} is a {type(value).__name__}, which a checkpoint cannot hold without pickling. Choose another optim or "
        "lr_scheduler_type."
    )


def _tree(node: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(node, list):
        return [_tree(item, tensors) for item in node]
    if not isinstance(node, dict):
        return node
    kind = node.get(TAG)
    if kind is None:
        return {key: _tree(item, tensors) for key, item in node.items()}
    if kind == "float":
        return float(node["value"])
    if kind == "bytes":
        return bytes.fromhex(node["value"])
    if kind == "tensor":
        return tensors[node["name"]]
    if kind == "tuple":
        return tuple(_tree(item, tensors) for item in node["items"])
    if kind == "dict":
        return {key: _tree(item, tensors) for key, item in node["items"]}
    if kind in ("array", "scalar"):
        flat = np.frombuffer(tensors[node["name"]].numpy().tobytes(), dtype=np.dtype(node["dtype"]))
        return flat.reshape(node["shape"]).copy() if kind == "array" else flat[0]
    raise KeyError(kind)
