"""One file format for trained agents: safetensors with a JSON document in its header. No pickle anywhere."""

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

__all__ = ["CheckpointError", "flatten", "read", "unflatten", "write", "write_bytes"]

FORMAT = "iql-plugins"
VERSION = "1"
_TENSOR, _ITEMS = "__tensor__", "__items__"


class CheckpointError(ValueError):
    """A file that is no checkpoint, of a version that is not known, or not as it was written."""


def write(path: str | os.PathLike[str], document: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Writes a checkpoint: all of it, or nothing.

    Args:
        path: replaced in one step when the new file is whole, and left as it is on any error.
        document: JSON values.
        tensors: by name; brought to the CPU.
    """
    copies = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
    text = json.dumps(document, allow_nan=False, sort_keys=True)
    metadata = {"format": FORMAT, "version": VERSION, "document": text, "checksum": _checksum(text, copies)}
    write_bytes(path, save(copies, metadata))


def write_bytes(path: str | os.PathLike[str], content: bytes) -> None:
    """Writes a file in one step, so that a reader (or a run that is killed) meets the old one or the new one.

    Raises:
        FileNotFoundError: if the folder does not exist.
    """
    target = Path(path)
    descriptor, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes files for their owner alone; others get what the umask leaves them, as with open().
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, target)
    except BaseException:
        os.unlink(temporary)
        raise


def read(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The document and the tensors of a checkpoint, on the CPU.

    Raises:
        FileNotFoundError: if there is no such file.
        CheckpointError: if it is no checkpoint, of another version, damaged or altered.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no checkpoint {os.fspath(path)!r}")
    try:
        with safe_open(os.fspath(path), "pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise CheckpointError(f"{os.fspath(path)!r} is a safetensors file, but no checkpoint of {FORMAT}")
            if metadata.get("version") != VERSION:
                raise CheckpointError(
                    f"{os.fspath(path)!r} has version {metadata.get('version')!r} of the format, known is "
                    f"{VERSION!r}: it was written by another release of {FORMAT}"
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{os.fspath(path)!r} is no checkpoint, or damaged: {error}") from error
    text = metadata.get("document", "")
    if metadata.get("checksum") != _checksum(text, tensors):
        raise CheckpointError(f"{os.fspath(path)!r} is not as it was written: its checksum is another one")
    document = json.loads(text)
    if not isinstance(document, dict):
        raise CheckpointError(f"{os.fspath(path)!r} has no document, but a {type(document).__name__}")
    return document, tensors


def flatten(tree: Any, prefix: str) -> tuple[Any, dict[str, Tensor]]:
    """Nested dicts and lists with tensors (an optimiser's state) as JSON values, and the tensors by name.

    >>> flatten({"moments": [torch.tensor(1.0)], "rate": 0.1}, "adam")
    ({'moments': [{'__tensor__': 'adam.moments.0'}], 'rate': 0.1}, {'adam.moments.0': tensor(1.)})
    """
    tensors: dict[str, Tensor] = {}

    def visit(value: Any, name: str) -> Any:
        if isinstance(value, Tensor):
            tensors[name] = value
            return {_TENSOR: name}
        if isinstance(value, Mapping):
            if all(isinstance(key, str) for key in value):
                return {key: visit(item, f"{name}.{key}") for key, item in value.items()}
            return {_ITEMS: [[key, visit(item, f"{name}.{key}")] for key, item in value.items()]}
        if isinstance(value, list | tuple):
            return [visit(item, f"{name}.{index}") for index, item in enumerate(value)]
        return value

    return visit(tree, prefix), tensors


def unflatten(tree: Any, tensors: Mapping[str, Tensor]) -> Any:
    """What :func:`flatten` took apart; tuples come back as lists.

    Raises:
        CheckpointError: if a tensor is missing.
    """
    if isinstance(tree, list):
        return [unflatten(item, tensors) for item in tree]
    if not isinstance(tree, dict):
        return tree
    if tree.keys() == {_TENSOR}:
        if tree[_TENSOR] not in tensors:
            raise CheckpointError(f"the checkpoint has no tensor {tree[_TENSOR]!r}")
        return tensors[tree[_TENSOR]]
    if tree.keys() == {_ITEMS}:
        return {key: unflatten(item, tensors) for key, item in tree[_ITEMS]}
    return {key: unflatten(item, tensors) for key, item in tree.items()}


def _checksum(text: str, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"\0{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
