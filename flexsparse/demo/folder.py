"""The output folder of a run: its files, and making it ready."""

from pathlib import Path

from flexsparse.training.errors import RunError

CHECKPOINT = "checkpoint.safetensors"
METRICS = "metrics.json"
REPORT = "report.html"


def open_folder(folder: Path, *, resume: bool, force: bool) -> Path | None:
    """Makes a checked output folder ready; with `force` the files of an old run go, all others stay.

    Returns:
        The checkpoint to continue from, or None to start afresh.

    Raises:
        RunError: the folder is not writable.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if force:
            for name in (CHECKPOINT, METRICS, REPORT):
                (folder / name).unlink(missing_ok=True)
    except OSError as error:
        raise RunError(
            f"output folder {str(folder)!r} cannot be made ({error.strerror}): pass another --out"
        ) from error
    checkpoint = folder / CHECKPOINT
    return checkpoint if resume and checkpoint.is_file() else None
