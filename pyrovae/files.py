"""Files: written whole or not at all, sealed against damage, locked, and parsed without trust."""

import errno
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

LOCK = ".lock"
SEAL = "sha256"
_MARK = b"\npyrovae sha256 "


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Write a file beside its final name, flush it to the disk, then rename it.

    Raises:
        OSError: naming the file, where it cannot be written; one that was there stays as it is.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        write(beside)
        with beside.open("rb+") as file:
            os.fsync(file.fileno())
        beside.replace(path)
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        with suppress(OSError):  # the first error is the one to tell
            beside.unlink(missing_ok=True)


def remove_leftovers(folder: Path) -> None:
    """Remove what processes that were killed while they wrote have left beside the final names."""
    for path in folder.iterdir():
        if is_leftover(path):
            path.unlink(missing_ok=True)


def is_leftover(path: Path) -> bool:
    """Whether a file has the name that `write_whole` gives to one that is not finished."""
    return path.name.startswith(".") and path.name.endswith(".part")


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder for this thread alone; the operating system lets go where the process dies.

    Raises:
        BlockingIOError: where it is held already.
    """
    lock = FileLock(folder / LOCK, is_singleton=True)  # the same thread may take it again, further in
    try:
        lock.acquire(blocking=False)
    except Timeout as error:
        raise BlockingIOError(
            errno.EWOULDBLOCK, "Expected a folder that is free; got one in which another run is going on", str(folder)
        ) from error
    try:
        yield
    finally:
        if lock.lock_counter == 1:
            with suppress(OSError):
                (folder / LOCK).unlink()  # before it is free: whoever opened it already finds that it has no name
        lock.release()


@contextmanager
def parsing(path: str | Path, expected: str) -> Iterator[None]:
    """Whatever goes wrong while a file is parsed becomes a ValueError that names it, for a file may hold anything.

    Raises:
        ValueError: for any exception inside, but that of a file that cannot be opened.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError) and error.filename is not None:
            raise
        reason = printable(str(error).partition("\n")[0] or type(error).__name__)
        raise ValueError(f"Expected {expected}; got {path}, truncated or foreign: {reason}") from error


def printable(text: str, length: int = 300) -> str:
    """Text from a file for a message: on one line, without control characters, not long."""
    text = text if text.isprintable() else text.encode("unicode_escape", "backslashreplace").decode()
    return text if len(text) <= length else f"{text[:length]}..."


def sealed(content: bytes | memoryview) -> bytes:
    """Bytes with their SHA-256 behind them.

    Example:
        >>> unsealed(sealed(b"what is kept"))
        b'what is kept'
    """
    return b"".join([content, _MARK, hashlib.sha256(content).digest()])


def unsealed(content: bytes) -> bytes:
    """The bytes that were sealed; others, which may be older or foreign, as they are.

    Raises:
        ValueError: for bytes that were changed.
    """
    body, mark, digest = content[: -len(_MARK) - 32], content[-len(_MARK) - 32 : -32], content[-32:]
    if mark != _MARK:
        return content
    if hashlib.sha256(body).digest() != digest:
        raise ValueError("it was changed or damaged after it was written")
    return body


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write JSON in the way of `write_whole`, sealed; what is not finite, and so no JSON, becomes null."""
    content = json.loads(json.dumps(_finite(content), allow_nan=False))
    text = json.dumps({**content, SEAL: _digest(content)}, indent=1) + "\n"
    write_whole(path, lambda file: file.write_text(text))


def _finite(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; where it is sealed, without its seal.

    Raises:
        ValueError: for a file that is none, or that was changed after `write_json` sealed it. One that has no seal
            is not compared with any.
    """
    with parsing(path, "a JSON file"):
        content = json.loads(path.read_bytes())
        if not isinstance(content, dict):
            raise ValueError(f"it holds a {type(content).__name__}, no object")
        seal = content.pop(SEAL, None)
        if seal is not None and seal != _digest(content):
            raise ValueError(f"it was changed or damaged after it was written. To read it as it is, take {SEAL!r} out")
    return content
