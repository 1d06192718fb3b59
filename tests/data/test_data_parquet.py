"""Parquet in its many shapes, and folders of robots' data that are known and not read."""

import builtins
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from refusals import error

from iql_plugins.data import UnknownSourceError, load_dataset, read_dataset

Arrays = dict[str, Any]
ROWS = 12


def columns() -> Arrays:
    draw = np.random.default_rng(0)
    number = np.arange(ROWS)
    return {
        "observations": draw.normal(size=(ROWS, 3)).astype(np.float32),
        "next_observations": draw.normal(size=(ROWS, 3)).astype(np.float32),
        "actions": draw.uniform(-1, 1, (ROWS, 2)),
        "rewards": draw.normal(size=ROWS).astype(np.float32),
        "terminals": number % 6 == 5,
        "timeouts": number % 6 == 2,
    }


@pytest.fixture
def expected(tmp_path: Path) -> Any:
    np.savez(tmp_path / "expected.npz", **columns())
    return load_dataset(tmp_path / "expected.npz")


def write(path: Path, arrays: Arrays, *, group: int = 5, kind: str = "fixed") -> Path:
    """Arrays as columns of numbers or, if they have more dimensions than one, of lists."""
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")

    def column(values: Any) -> Any:
        if not isinstance(values, np.ndarray):
            return values
        column = pa.array(values.reshape(-1))
        for size in values.shape[:0:-1]:
            if kind == "fixed":
                column = pa.FixedSizeListArray.from_arrays(column, size)
            else:
                offsets = np.arange(0, len(column) + 1, size)
                large = kind == "large_list"
                column = (pa.LargeListArray if large else pa.ListArray).from_arrays(
                    pa.array(offsets, pa.int64() if large else pa.int32()), column
                )
        return column

    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pa.table({key: column(values) for key, values in arrays.items()}), path, row_group_size=group)
    return path


@pytest.mark.parametrize("kind", ["fixed", "list", "large_list"])
@pytest.mark.parametrize("group", [1, 5, ROWS])
def test_a_column_of_lists_is_an_array(kind: str, group: int, expected: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "d.parquet", columns(), group=group, kind=kind)
    assert (load_dataset(path) == expected).all()
    assert (load_dataset(path, memmap_dir=tmp_path / "mapped") == expected).all()


@pytest.mark.parametrize("separator", [".", "_", "/"])
def test_a_column_for_each_component_is_an_array(separator: str, expected: Any, tmp_path: Path) -> None:
    arrays = columns()
    # As any writer may order them: by their names, the tenth is before the second.
    for key in ("next_observations", "observations", "actions"):
        values = arrays.pop(key)
        arrays |= {f"{key}{separator}{number}": values[:, number] for number in reversed(range(values.shape[1]))}
    assert (load_dataset(write(tmp_path / "d.parquet", arrays)) == expected).all()


def test_a_single_component_and_components_of_several_types(tmp_path: Path) -> None:
    whole = np.arange(ROWS)
    arrays = {"obs_0": whole, "obs_1": whole / 8, "obs_2": whole % 2 == 0, "act.0": whole / 16, "reward": whole}
    data = load_dataset(write(tmp_path / "d.parquet", arrays | {"terminated": whole == 11}))
    assert data["observation"].tolist() == np.stack([whole, whole / 8, whole % 2 == 0], 1).tolist()
    assert data["action"].tolist() == (whole / 16)[:, None].tolist()


@pytest.mark.parametrize("nested", [False, True])
def test_the_names_of_the_key_layout_are_columns(nested: bool, expected: Any, tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    arrays = columns()
    following = {
        "observation": pa.FixedSizeListArray.from_arrays(arrays["next_observations"].ravel(), 3),
        "reward": pa.array(arrays["rewards"]),
        "terminated": pa.array(arrays["terminals"]),
        "done": pa.array(arrays["terminals"] | arrays["timeouts"]),
    }
    own = {"observation": arrays["observations"], "action": arrays["actions"]}
    if nested:
        later = {"next": pa.StructArray.from_arrays(list(following.values()), list(following))}
    else:
        later = {f"next.{key}": values for key, values in following.items()}
    assert (load_dataset(write(tmp_path / "d.parquet", own | later)) == expected).all()


def test_other_names_behind_a_dot_are_entries_of_a_dict_observation(tmp_path: Path) -> None:
    arrays = columns()
    pixels = np.arange(ROWS * 12, dtype=np.uint8).reshape(ROWS, 2, 2, 3)
    state, _ = arrays.pop("observations"), arrays.pop("next_observations")
    arrays |= {f"observation.state.{number}": state[:, number] for number in range(3)}
    for kind in ("fixed", "list"):
        path = write(tmp_path / "d.parquet", arrays | {"observation.camera": pixels}, kind=kind)
        data = load_dataset(path)
        kept = np.flatnonzero(~arrays["timeouts"])
        assert data["observation", "camera"].dtype == torch.uint8
        assert data["observation", "camera"].tolist() == pixels[kept].tolist()
        assert data["observation", "state"].tolist() == state[kept].tolist()
    assert "'observation/state' must be one column, or a column for each component" in error(
        write(tmp_path / "d.parquet", arrays | {"observation.state.4": state[:, 0]})
    )


def test_a_folder_of_parts_is_their_rows_in_the_order_of_their_numbers(expected: Any, tmp_path: Path) -> None:
    folder = tmp_path / "d.parquet"
    for number in range(ROWS):
        write(
            folder / f"part.{number}.parquet", {key: values[number : number + 1] for key, values in columns().items()}
        )
    write(folder / "part.5.5.parquet", {key: values[:0] for key, values in columns().items()})
    for name in ("_metadata.parquet", ".part.3.parquet", "_SUCCESS", "notes.txt"):
        (folder / name).write_text("no part")
    assert (load_dataset(folder) == expected).all()
    assert (load_dataset(str(folder), memmap_dir=tmp_path / "mapped") == expected).all()
    short = {key: values.astype(np.float64) for key, values in columns().items()}
    path = write(folder / "part.7.parquet", short)
    assert f"{path} must have the columns of part.0.parquet, of the same types" in error(folder)
    path.write_bytes(path.read_bytes()[:-9])
    assert str(path) in error(folder)


def test_what_pandas_writes_is_read(tmp_path: Path, expected: Any) -> None:
    pandas = pytest.importorskip("pandas")
    pytest.importorskip("pyarrow")
    arrays = columns()
    frame = pandas.DataFrame({key: list(values) if values.ndim > 1 else values for key, values in arrays.items()})
    frame.index = np.arange(ROWS) * 2
    frame.to_parquet(tmp_path / "d.parquet")
    assert (load_dataset(tmp_path / "d.parquet") == expected).all()
    frame.loc[14, "rewards"] = np.nan
    frame.to_parquet(tmp_path / "d.parquet")
    assert "'rewards' has no value in row 7" in error(tmp_path / "d.parquet")


@pytest.mark.parametrize(
    ("key", "values", "text"),
    [
        ("rewards", ["1"] * ROWS, "'rewards' must be numbers, or lists of numbers, got string"),
        ("rewards", [b"1"] * ROWS, "must be numbers, or lists of numbers, got binary"),
        ("rewards", [None] * ROWS, "must be numbers, or lists of numbers, got null"),
        ("observations", [["a"]] * ROWS, "must be numbers, or lists of numbers, got list<"),
        ("observations", [[{"x": 1}]] * ROWS, "must be numbers, or lists of numbers, got list<"),
        ("rewards", [*[0.0] * 7, None, *[0.0] * 4], "'rewards' has no value in row 7"),
        ("observations", [*[[0.0, 1.0]] * 9, None, *[[0.0, 1.0]] * 2], "'observations' has no value in row 9"),
        ("observations", [*[[0.0, 1.0]] * 9, [0.0, None], *[[0.0, 1.0]] * 2], "'observations' has no value in row 9"),
        ("observations", [*[[0.0, 1.0]] * 9, [0.0], *[[0.0, 1.0]] * 2], "got 1 in row 9 and 2 before"),
        ("observations", [*[[0.0, 1.0]] * 5, *[[0.0]] * 7], "'observations' has [5, 1] numbers in the rows from 5 on"),
        ("observations", [[]] * ROWS, "must be numbers, or lists of numbers, got list<"),
        ("next", [{"observation": 1.0}] * 11 + [None], "'next.observation' has no value in row 11"),
        ("rewards", [[0.0, 1.0]] * ROWS, "rewards must have shape [N] or [N, 1], got [10, 2]"),
        ("terminals", [0.5] * ROWS, "'terminals' must be 0 or 1, got 0.5 in row 0"),
        ("time_outs", [0] * ROWS, "'time_outs' is not a column that is read; did you mean 'timeouts'?"),
        ("observation", [0.0] * ROWS, "which are one column"),
        ("rewards.0", [0.0] * ROWS, "'rewards' must be one column, or a column for each component from 0 on"),
        ("obs.1", [0.0] * ROWS, "'obs' must be one column, or a column for each component from 0 on, got components 1"),
    ],
)
def test_what_is_no_number_is_one_clear_error(key: str, values: Any, text: str, tmp_path: Path) -> None:
    arrays = columns()
    del arrays["next_observations"]
    path = write(tmp_path / "d.parquet", arrays | {key: values})
    for options in ({}, {"memmap_dir": tmp_path / "mapped"}):
        message = error(path, **options)
        assert text in message
        assert message.startswith(str(path))
        assert not (tmp_path / "mapped").exists()


def test_lists_without_numbers_and_files_without_rows_are_refused(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    arrays = columns()
    empty = pa.array([[]] * ROWS, pa.list_(pa.float32()))
    assert "'observations' has no numbers" in error(write(tmp_path / "d.parquet", arrays | {"observations": empty}))
    assert "is empty" in error(write(tmp_path / "d.parquet", {key: values[:0] for key, values in arrays.items()}))
    assert "no 'rewards'" in error(write(tmp_path / "d.parquet", {"actions": arrays["actions"]}))
    with pytest.raises(UnknownSourceError, match="'x' is not a column that is read"):
        load_dataset(write(tmp_path / "d.parquet", {"x": arrays["rewards"]}))


def test_a_column_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    flat = {key: pa.array(columns()[key]) for key in ("rewards", "terminals")}
    struct = pa.StructArray.from_arrays([flat["rewards"]], ["reward"])
    for names, arrays in (
        (["rewards", "rewards"], [flat["rewards"]] * 2),
        (["next", "next.reward"], [struct, flat["rewards"]]),
    ):
        parquet.write_table(pa.Table.from_arrays(arrays, names), tmp_path / "d.parquet")
        assert "twice: drop one of them" in error(tmp_path / "d.parquet")


def test_one_row_group_at_a_time_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each column's once, however many blocks of the dataset it is."""
    parquet = pytest.importorskip("pyarrow.parquet")
    path = write(tmp_path / "d.parquet", columns(), group=4)
    read: list[tuple[int, str]] = []
    original = parquet.ParquetFile.read_row_group

    def counted(self: Any, number: int, columns: Any, **options: Any) -> Any:
        read.append((number, *columns))
        return original(self, number, columns, **options)

    monkeypatch.setattr(parquet.ParquetFile, "read_row_group", counted)
    monkeypatch.setattr("iql_plugins.data.dataset.CHUNK_BYTES", 100)
    load_dataset(path, memmap_dir=tmp_path / "mapped")
    for key in ("observations", "next_observations", "rewards", "terminals"):
        assert [number for number, column in read if column == key] == [0, 1, 2]


def test_parquet_without_pyarrow_says_how_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "d.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    for source in (tmp_path, tmp_path / "d.parquet"):
        with pytest.raises(ImportError, match=r"pip install 'iql-plugins\[parquet\]'"):
            load_dataset(source)


def test_other_files_import_no_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expected: Any) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert (load_dataset(tmp_path / "expected.npz") == expected).all()
    with pytest.raises(UnknownSourceError, match=r"nor one of Parquet's \(no \*\.parquet\)"):
        load_dataset(tmp_path)


# Formats that are known and not read


@pytest.fixture
def imports(monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def checked(name: str, *rest: Any) -> Any:
        assert name.split(".")[0] not in ("lerobot", "tensorflow", "tensorflow_datasets", "rlds", "pyarrow")
        return original(name, *rest)

    monkeypatch.setattr(builtins, "__import__", checked)


@pytest.mark.usefixtures("imports")
def test_data_of_lerobot_are_refused_with_how_to_convert_them(tmp_path: Path) -> None:
    folder = tmp_path / "pusht"
    part = folder / "data" / "chunk-000" / "episode_000000.parquet"
    for file in (part, folder / "meta" / "info.json"):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("not even looked at")
    for source in (folder, str(folder), folder / "data", part.parent, part):
        with pytest.raises(UnknownSourceError) as raised:
            load_dataset(source)
        message = str(raised.value)
        assert message.startswith(f"{source} is LeRobot's (meta/info.json), which is not read: write its frames")
        for name in ("observation.state", "next.reward", "episode_index", "terminals", "timeouts"):
            assert repr(name) in message
        assert "\n" not in message


def test_a_file_of_lerobots_that_is_alone_is_refused_with_how_to_convert_it(tmp_path: Path) -> None:
    frames = {"observation.state": [[0.0]], "action": [[0.0]], "episode_index": [0], "frame_index": [0]}
    path = write(tmp_path / "episode_000000.parquet", frames)
    assert error(path).startswith(
        f"{path} is LeRobot's (by 'episode_index' and 'frame_index'), which is not read: write"
    )


def test_what_was_made_of_lerobots_data_may_lie_beside_them(tmp_path: Path, expected: Any) -> None:
    (tmp_path / "meta").mkdir()
    (tmp_path / "meta" / "info.json").write_text("{}")
    assert (load_dataset(write(tmp_path / "d.parquet", columns())) == expected).all()


@pytest.mark.usefixtures("imports")
def test_data_of_rlds_are_refused_with_how_to_convert_them(tmp_path: Path) -> None:
    folder = tmp_path / "d4rl_mujoco_hopper" / "1.2.0"
    folder.mkdir(parents=True)
    shard = folder / "d4rl_mujoco_hopper-train.tfrecord-00000-of-00001"
    for file in (shard, folder / "features.json", folder / "dataset_info.json"):
        file.write_text(json.dumps({}))
    for source in (folder.parent, folder, shard):
        with pytest.raises(UnknownSourceError) as raised:
            load_dataset(source)
        message = str(raised.value)
        assert message.startswith(f"{source} is RLDS's (features.json of TensorFlow Datasets), which is not read")
        assert "'is_terminal'" in message
        assert "\n" not in message
    (folder / "features.json").unlink()
    assert "RLDS" not in error(folder)


def test_a_dataset_says_which_file_it_is_of(tmp_path: Path) -> None:
    path = write(tmp_path / "d.parquet", columns())
    assert read_dataset(path).source == str(path)
