"""``iql-plugins convert-dataset``: any dataset as memory-mapped shards, or as Parquet."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from iql_plugins.checkpoint import vacant
from iql_plugins.cli.arguments import ConvertDataset
from iql_plugins.cli.errors import UserError, imported, mistakes
from iql_plugins.cli.output import Result
from iql_plugins.cli.workers import locked
from iql_plugins.data import Dataset, DatasetError, Options, summary
from iql_plugins.data.dataset import DONE, REWARD, TERMINATED, chunks, leaves, require_single_steps, row_bytes
from iql_plugins.data.episodes import episode_returns
from iql_plugins.data.readers.parquet import described
from iql_plugins.plugins import PluginError, host

__all__ = ["run"]

PARQUET = ".parquet"
_SINGLE_STEPS = "which are what the columns are of, or convert to shards"


def run(arguments: ConvertDataset) -> Result:
    """Writes the shards, or goes on writing them; then the file, if that is what is wanted.

    Raises:
        UserError: for a source that cannot be read, something in the place of ``out``, a disk that is full.
    """
    out, source = Path(arguments.out), Path(arguments.source)
    if not out.name:
        raise UserError(f"OUT must be a new folder or a .parquet file, got {arguments.out!r}")
    if source.is_dir() and out.absolute().is_relative_to(source.absolute()):
        raise UserError(f"OUT must not be inside of SOURCE, {source}")
    work = out.with_name(f".{out.name}.partial")
    shards = work / "dataset"
    parquet = imported("pyarrow.parquet", "parquet") if out.suffix == PARQUET else None
    if out.exists() if parquet is not None else not vacant(out):
        # Killed at its very end, a call has left a folder with nothing in it that anyone needs.
        if work.is_dir() and not shards.exists():
            shutil.rmtree(work)
        raise UserError(f"{out} is there already: give another OUT, or move it")
    begun = work.exists()
    with mistakes(OSError, DatasetError, ImportError, PluginError):
        work.mkdir(parents=True, exist_ok=True)
        with locked(work, use="converting a dataset in"):
            try:
                document = _converted(arguments, shards, out, parquet)
            except (DatasetError, ImportError, PluginError):
                # Of data that cannot be read, or written, nothing is worth keeping. An earlier call's may be of others.
                if not begun:
                    shutil.rmtree(work)
                raise
        shutil.rmtree(work)
    line = f"wrote {out}: {document['transitions']:,} transitions, SHA-256 {document['sha256']}"
    return Result(document, [line])


def _converted(arguments: ConvertDataset, shards: Path, out: Path, parquet: Any) -> dict[str, Any]:
    options = Options(
        arguments.trust_pickle,
        memmap_dir=shards,
        resume=_identity(arguments.source),
        single_steps=None if parquet is None else _SINGLE_STEPS,
    )
    dataset = host().read_dataset(arguments.source, options)
    if parquet is None:
        spaces = None if dataset.spaces is None else dataset.spaces.to_json()
        returns = episode_returns(dataset.tensors)
        summary.write(
            shards,
            dataset.tensors,
            sha256=dataset.sha256,
            returns=returns,
            env=dataset.env,
            spaces=spaces,
            provenance=dataset.provenance,
        )
        if out.exists():
            out.rmdir()
        made = shards
    else:
        made = shards.with_name("file")
        _write_parquet(parquet, dataset, made)
    document = {
        "source": arguments.source,
        "output": str(out),
        "transitions": len(dataset.tensors),
        "dropped": dataset.dropped,
        "sha256": dataset.sha256,
        "env": dataset.env,
    }
    if made != shards:
        shutil.rmtree(shards)
    os.replace(made, out)
    return document


def _identity(source: str) -> str:
    """What changes when a source does: the files that it consists of, if it is one of files."""
    path = Path(source).absolute()
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    status = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.exists()]
    return json.dumps([source, status])


def _write_parquet(parquet: Any, dataset: Dataset, file: Path) -> None:
    """Writes the columns that an ``.npz`` has, a chunk of rows to a row group.

    Raises:
        DatasetError: for n-step transitions, for which there are no columns.
    """
    # A plugin's reader may have other ways to write than ours.
    require_single_steps(dataset.tensors, _SINGLE_STEPS)
    tensors = dataset.tensors
    columns: dict[str, Any] = {"actions": tensors.get("action"), "rewards": tensors.get(REWARD)}
    for name, key in (("observations", "observation"), ("next_observations", ("next", "observation"))):
        depth = 1 if isinstance(key, str) else len(key)
        for leaf, tensor in leaves(tensors, key).items():
            columns[".".join((name, *(leaf[depth:] if isinstance(leaf, tuple) else ())))] = tensor
    size = sum(map(row_bytes, tensors.values(True, True)))
    writer = None
    for rows in chunks(len(tensors), size):
        arrays = {name: _arrow(tensor[rows]) for name, tensor in columns.items()}
        terminated, done = tensors.get(TERMINATED)[rows], tensors.get(DONE)[rows]
        arrays |= {"terminals": _arrow(terminated), "timeouts": _arrow(done & ~terminated)}
        table = imported("pyarrow", "parquet").table(arrays, metadata=described(dataset))
        writer = parquet.ParquetWriter(file, table.schema) if writer is None else writer
        writer.write_table(table)
    if writer is not None:
        writer.close()
    # What is still to be written would be written behind its name.
    with file.open("rb") as written:
        os.fsync(written.fileno())


def _arrow(values: Any) -> Any:
    """Numbers of rows ``[n, ...]`` as Arrow has them; those of ``[n, 1]`` are numbers, and no lists of one."""
    pyarrow = imported("pyarrow", "parquet")
    array: Any = pyarrow.array(values.numpy().reshape(-1))
    shape = () if values.shape[1:] == (1,) else values.shape[1:]
    for length in reversed(shape):
        array = pyarrow.FixedSizeListArray.from_arrays(array, length)
    return array
