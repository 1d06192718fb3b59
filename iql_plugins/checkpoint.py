"""One file format for trained agents: safetensors with a JSON document in its header. No pickle anywhere."""

import hashlib
import json
import os
import secrets
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save
from torch import Tensor

from iql_plugins.limits import parse_json

__all__ = [
    "CheckpointError",
    "checksum",
    "existing_parent",
    "flatten",
    "leftovers",
    "naming",
    "new_folder",
    "packed",
    "read",
    "replaced",
    "seal",
    "unflatten",
    "unpacked",
    "unseal",
    "vacant",
    "write",
    "write_bytes",
]

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
    write_bytes(path, packed(document, tensors))


def packed(document: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> bytes:
    """A checkpoint as :func:`write` writes it.

    Args:
        document: JSON values.
        tensors: by name; brought to the CPU.

    Raises:
        TypeError, ValueError: for what JSON does not have.
    """
    metadata, copies = seal(document, tensors)
    return _with_sorted_metadata(save(copies, metadata))


def seal(document: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> tuple[dict[str, str], dict[str, Tensor]]:
    """What a checkpoint holds, in whatever container: format, version, document and checksum; and the tensors.

    Args:
        document: JSON values.
        tensors: by name; copied, and brought to the CPU.
    """
    copies = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
    text = json.dumps(document, allow_nan=False, sort_keys=True)
    return {"format": FORMAT, "version": VERSION, "document": text, "checksum": _checksum(text, copies)}, copies


def write_bytes(path: str | os.PathLike[str], content: bytes) -> None:
    """Writes a file in one step, see :func:`replaced`."""
    with replaced(path) as file:
        file.write(content)


@contextmanager
def replaced(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A file to write: a reader (or a run that is killed) meets the old one or, once it is through, the new one.

    Raises:
        FileNotFoundError: if the folder does not exist.
    """
    target = Path(path)
    if not target.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {os.fspath(target.parent)!r} to write {target.name!r} to")
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        with naming(target), open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def leftovers(folder: Path, name: str = "*") -> list[Path]:
    """What processes that were killed have left in a folder of files that were to be :func:`replaced`.

    Args:
        folder: in which nobody is writing.
        name: of the file; a pattern.
    """
    return list(folder.glob(f".{name}.*.tmp"))


def existing_parent(path: Path) -> Path:
    """The closest folder above a path that exists."""
    return next(folder for folder in path.absolute().parents if folder.exists())


def vacant(path: Path) -> bool:
    """Whether a new folder can be written there: nothing is, or a folder with nothing in it."""
    return not path.exists() or (path.is_dir() and not any(path.iterdir()))


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder that gets its name when what is inside has filled it; after an error it is not there.

    Args:
        path: of a :func:`vacant` place; folders above it are made.

    Yields:
        Where to make it, and fill it.
    """
    with tempfile.TemporaryDirectory(dir=existing_parent(path), prefix=f".{path.name}-") as folder:
        filled = Path(folder) / "filled"
        yield filled
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            path.rmdir()
        os.replace(filled, path)


@contextmanager
def naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """Errors of the system inside are about this file: that the disk is full, it says without a name."""
    try:
        yield
    except OSError as error:
        # One that Python raised by itself has a text alone, which a name would replace.
        if error.errno is not None and error.filename is None:
            error.filename = os.fspath(path)
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
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError, RuntimeError, MemoryError) as error:
        raise CheckpointError(f"{os.fspath(path)!r} is no checkpoint, or damaged: {error}") from error
    return unseal(metadata, tensors, os.fspath(path), "safetensors file"), tensors


def unpacked(content: bytes, name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The document and the tensors of what :func:`packed` made, on the CPU.

    Args:
        content: of the checkpoint.
        name: of where it came from, for errors.

    Raises:
        CheckpointError: as :func:`read`.
    """
    try:
        tensors = load(content)
        metadata = _header(content).get("__metadata__", {})
    except Exception as error:
        # Whatever the library raises for bytes that are none of its own.
        raise CheckpointError(f"{name!r} is no checkpoint, or damaged: {error}") from error
    return unseal(metadata, tensors, name, "safetensors file"), tensors


def unseal(metadata: Mapping[str, Any], tensors: Mapping[str, Tensor], name: str, container: str) -> dict[str, Any]:
    """The document of what :func:`seal` made.

    Args:
        metadata: format, version, document and checksum.
        tensors: by name, on the CPU.
        name: of the file, for errors.
        container: what kind of file it is, likewise.

    Raises:
        CheckpointError: if it is no checkpoint, of another version, or altered.
    """
    if metadata.get("format") != FORMAT:
        raise CheckpointError(f"{name!r} is a {container}, but no checkpoint of {FORMAT}")
    if metadata.get("version") != VERSION:
        raise CheckpointError(
            f"{name!r} has version {metadata.get('version')!r} of the format, known is {VERSION!r}: it was written by "
            f"another release of {FORMAT}"
        )
    text = metadata.get("document", "")
    try:
        checksum = _checksum(text, tensors)
    except (RuntimeError, TypeError) as error:
        raise CheckpointError(f"{name!r} has tensors that no checkpoint has: {error}") from error
    if metadata.get("checksum") != checksum:
        raise CheckpointError(f"{name!r} is not as it was written: its checksum is another one")
    try:
        document = parse_json(text)
    except ValueError as error:
        raise CheckpointError(f"the document of {name!r} cannot be read: {error}") from error
    if not isinstance(document, dict):
        raise CheckpointError(f"{name!r} has no document, but a {type(document).__name__}")
    return document


def flatten(tree: Any, prefix: str) -> tuple[Any, dict[str, Tensor]]:
    """Nested dicts and lists with tensors (an optimiser's state) as JSON values, and the tensors by name.

    >>> flatten({"moments": [torch.tensor(1.0)], "rate": 0.1}, "adam")
    ({'moments': [{'__tensor__': 'adam.moments.0'}], 'rate': 0.1}, {'adam.moments.0': tensor(1.)})
    """
    tensors: dict[str, Tensor] = {}

    def visit(value: Any, name: str) -> Any:
        if isinstance(value, Tensor):
            if name in tensors:
                raise ValueError(f"two tensors have the name {name!r}")
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


def checksum(tree: Any) -> str:
    """That of nested dicts and lists with tensors, for files that are no checkpoints.

    >>> checksum({"rate": 0.1}) == checksum({"rate": 0.2})
    False
    """
    metadata, _ = seal(*flatten({"content": tree}, "tree"))
    return metadata["checksum"]


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


def _with_sorted_metadata(content: bytes) -> bytes:
    """A safetensors file whose bytes depend on its content alone: the library shuffles the metadata in each process."""
    header, size = _header(content), int.from_bytes(content[:8], "little")
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + content[8 + size :]


def _header(content: bytes) -> dict[str, Any]:
    header: dict[str, Any] = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    return header


def _checksum(text: str, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        # Ours are; one that repeats its numbers has no end of them.
        if not tensor.is_contiguous():
            raise TypeError(f"{name} is not contiguous")
        digest.update(f"\0{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
