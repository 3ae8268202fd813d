"""Files that are there whole or not at all, and folders that hold a model."""

import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from filelock import AcquireReturnProxy, FileLock, Timeout
from safetensors import SafetensorError

from fpdm.names import nearest

PROBE = 0.5  # seconds; one that only looks whether a folder is held is gone by then
SHIPPED = Path(__file__).parent / "shipped"  # models inside the package
UMASK = os.umask(0o022)
os.umask(UMASK)


def write_aside(path: Path, write: Callable[[Path], Any]) -> None:
    """Have `write` make a file beside `path`, sync it, and put it in the place of `path`."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.writing")
    try:
        write(aside)
        aside.chmod(0o666 & ~UMASK)  # safetensors lets nobody else read its files
        with aside.open("rb+") as file:
            os.fsync(file.fileno())
        aside.replace(path)
    except SafetensorError as error:  # a full disk, mostly
        raise OSError(f"{path} cannot be written: {error}") from error
    finally:
        aside.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Have the names in a folder survive a power cut, where the system can do that."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:  # Windows opens no folders
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as JSON, whole or not at all."""
    text = json.dumps(value, indent=1) + "\n"
    write_aside(path, lambda aside: aside.write_text(text))


def read_json(path: Path) -> Any:
    """The JSON in a file. Raises ValueError naming the file if it is damaged, OSError if it cannot be read."""
    try:
        return json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def checksum(path: Path) -> str:
    """The SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_writable(path: Path) -> None:
    """Raises OSError if a folder at `path` cannot be made or written to, by making a file where it would be."""
    there = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    if not there.is_dir():
        raise NotADirectoryError(f"{there} is a file: choose another place")
    try:
        with tempfile.TemporaryFile(dir=there) as file:
            file.write(b"\0" * 4096)
    except OSError as error:
        raise OSError(f"{there} cannot be written to ({error.strerror}): choose another place") from error


def is_inside(path: Path, folder: Path) -> bool:
    """Whether `path`, which need not be there, is `folder` or below it, by whatever names they go."""
    return folder.is_dir() and path.resolve().is_relative_to(folder.resolve())


def steps_in(checkpoints: Path) -> list[int]:
    """The steps of the checkpoints in a folder, damaged ones too, rising. They go by their names: a copy of one under
    another name is none."""
    names = (path.name.removeprefix("step-") for path in checkpoints.glob("step-*"))
    return sorted(int(name) for name in names if name.isdecimal() and f"{int(name):08d}" == name)


def is_free(path: Path) -> bool:
    """Whether nothing is at `path`, or a folder without anything in it but hidden files."""
    return not path.exists() or (path.is_dir() and all(file.name.startswith(".") for file in path.iterdir()))


def hold(folder: Path) -> AcquireReturnProxy:
    """Keep other commands out of a folder until what is returned is left (`with`), or this process ends.

    Raises ValueError if another command is at work there.
    """
    try:
        return FileLock(folder / ".lock", is_singleton=True).acquire(timeout=PROBE)
    except Timeout:
        raise ValueError(f"another command is at work in {folder}: let it end, or choose another folder") from None


def wait_for(path: Path) -> AcquireReturnProxy:
    """Wait until no other command is making the file `path`, and keep others from it while what is returned lasts."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(path.with_name(f".{path.name}.lock"), is_singleton=True).acquire()


def cache_folder() -> Path:
    """Where what can be computed again is kept: $FPDM_CACHE, or fpdm in the user's cache folder."""
    named = os.environ.get("FPDM_CACHE")
    return Path(named) if named else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fpdm"


def shipped() -> dict[str, Path]:
    """The models inside the package, by the names under which they are found where no folder of the name is a model."""
    return {path.parent.name: path.parent for path in sorted(SHIPPED.glob("*/model_index.json"))}


def model_folder(name: str) -> str:
    """The pipeline folder that `name` means: itself, the one inside a run, a model's inside the package, or a name on
    the hub, organisation/model.

    Raises ValueError for a local folder that holds no model, or one of another kind.
    """
    name = name.rstrip("/") or name  # as a shell completes it
    path = Path(name)
    for folder in (path, path / "pipeline"):
        if (folder / "model_index.json").is_file():
            index = read_json(folder / "model_index.json")
            made_for = index.get("_class_name") if isinstance(index, dict) else type(index).__name__
            if made_for != "FixedPointDiTPipeline":
                raise ValueError(f"{folder} is a {made_for}, not a FixedPointDiTPipeline")
            return str(folder)
    if name in shipped():
        return str(shipped()[name])
    if (path / "config.json").is_file() and (path / "checkpoints").is_dir():
        raise ValueError(f"{name} is a run without a model yet: let its training end, or interrupt it with Ctrl-C")
    if path.exists():
        raise ValueError(f"{name} is not a model folder: it has no model_index.json")
    first, _, rest = name.partition("/")
    if not first or not rest or "/" in rest or first in (".", "..", "~", "runs") or Path(first).exists():
        near = nearest(path.name, os.listdir(path.parent)) if path.parent.is_dir() else None
        hint = f" Did you mean {path.parent / near}?" if near else ""
        inside = f" Models inside the package: {', '.join(shipped())}." if shipped() else ""
        raise ValueError(f"there is no folder {name}.{hint}{inside}")
    return name
