"""Formats that are known by their metadata and not read: what it takes to convert them."""

from pathlib import Path

__all__ = ["LEROBOT_FRAMES", "conversion"]

_FRAMES = (
    "which is not read: write its frames, episode after episode, to one .parquet or "
    ".npz file with the columns 'observations' (of its 'observation.state'), 'actions' (of 'action'), 'rewards' (of "
    "'next.reward', which most have not: label them), 'terminals' (1 where the task has ended for good) and "
    "'timeouts' (1 in the other last frames of each 'episode_index')"
)
_LEROBOT = f"is LeRobot's (meta/info.json), {_FRAMES}"
#: Of a file that was taken out of its folder.
LEROBOT_FRAMES = f"is LeRobot's (by 'episode_index' and 'frame_index'), {_FRAMES}"
_RLDS = (
    "is RLDS's (features.json of TensorFlow Datasets), which is not read: write the steps of each episode but its "
    "last, which is an observation alone, to an .npz file with 'observations', 'next_observations' (of the step "
    "after), 'actions', 'rewards', 'terminals' (the 'is_terminal' of the step after) and 'timeouts' (its 'is_last' "
    "where it is not)"
)


def conversion(path: Path) -> str | None:
    """How to convert what is at a path, ``"is ...: write ..."``; None if it is of none of these formats.

    Args:
        path: of a dataset's folder, or of a file or folder among its data.
    """
    path = path.absolute()
    # As deep as data/chunk-000/file-000.parquet.
    among = [folder for folder in path.parents[:3] if path.relative_to(folder).parts[0] == "data"]
    if any((folder / "meta" / "info.json").is_file() for folder in (path, *among)):
        return _LEROBOT
    # The folder of a dataset has one for each version.
    versions = [file.parent for file in path.glob("*/features.json")]
    for folder in (path, path.parent, *versions):
        if (folder / "features.json").is_file() and (folder / "dataset_info.json").is_file():
            return _RLDS
    return None
