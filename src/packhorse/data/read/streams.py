"""Read the bytes of a file in pieces, decompressed where needed; a whole file is never in memory."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import IO, Final

import pyarrow

from packhorse.data.read.listing import form_of
from packhorse.data.read.row import WHOLE_ROW
from packhorse.errors import UserError

PIECE_BYTES: Final = 1 << 18
LARGEST_ROW_BYTES: Final = 1 << 28
UTF8_MARK: Final = b"\xef\xbb\xbf"
UTF16_MARKS: Final = (b"\xff\xfe", b"\xfe\xff")


def pieces(path: Path) -> Iterator[bytes]:
    """Yield the bytes of a text file in pieces of 256 KiB, without its byte order mark.

    Raises:
        UserError: The file cannot be read or decompressed to its end, or is UTF-16.
    """
    num_bytes = 0
    try:
        with closing(_open(path)) as stream:
            while piece := stream.read(PIECE_BYTES):
                if num_bytes == 0:
                    _refuse_utf16(piece, path)
                    yield piece.removeprefix(UTF8_MARK)
                else:
                    yield piece
                num_bytes += len(piece)
    except OSError as error:
        raise _torn(path, num_bytes, error) from error


def line_blocks(path: Path) -> Iterator[tuple[int, bytes]]:
    r"""Yield blocks of whole lines with the number of their first line; a block does not end with its last `\n`.

    Raises:
        UserError: A line is longer than 256 MiB, or `pieces` fails.
    """
    number, held, num_held = 1, [b""], 0
    for piece in pieces(path):
        cut = piece.rfind(b"\n")
        num_held += len(piece)
        if cut < 0:
            if num_held > LARGEST_ROW_BYTES:
                raise too_long(f"{path}:{number}")
            held.append(piece)
            continue
        block = b"".join((*held, piece[:cut]))
        yield number, block
        number += block.count(b"\n") + 1
        held, num_held = [piece[cut + 1 :]], len(piece) - cut - 1
    if num_held:
        yield number, b"".join(held)


def too_long(where: str) -> UserError:
    """Return the error of a row that is too long for memory."""
    return UserError(
        f"the row is longer than {LARGEST_ROW_BYTES >> 20} MiB.",
        "a row is held in memory as a whole; one of this size is usually a file without line breaks.",
        "put each row on its own line, or remove this one.",
        where,
    )


@contextmanager
def seekable(path: Path) -> Iterator[pyarrow.NativeFile]:
    """Open a file for random access; a compressed one is first decompressed into a temporary file.

    Raises:
        UserError: The file cannot be opened or decompressed.
    """
    with ExitStack() as opened:
        try:
            plain = path
            if form_of(path)[1] is not None:
                stream = opened.enter_context(closing(_open(path)))
                decompressed = opened.enter_context(tempfile.NamedTemporaryFile(prefix="packhorse-"))
                shutil.copyfileobj(stream, decompressed, PIECE_BYTES)
                decompressed.flush()
                plain = Path(decompressed.name)
            file = opened.enter_context(pyarrow.OSFile(str(plain)))
        except OSError as error:
            raise _torn(path, 0, error) from error
        yield file


def _open(path: Path) -> IO[bytes]:
    compression = form_of(path)[1]
    if compression is None:
        return path.open("rb")
    decompressing: IO[bytes] = pyarrow.input_stream(str(path), compression=compression)
    return decompressing


def _refuse_utf16(piece: bytes, path: Path) -> None:
    if piece.startswith(UTF16_MARKS):
        raise UserError(
            f"{path} begins with the byte order mark of UTF-16.",
            "rows are read as UTF-8, and this is not UTF-8.",
            "save the file again as UTF-8.",
        )


def _torn(path: Path, num_bytes: int, error: OSError) -> UserError:
    compression = form_of(path)[1]
    what = "read" if compression is None else f"decompressed as {compression}"
    return UserError(
        f"{path} cannot be {what} after {num_bytes} bytes: {error.strerror or error}.",
        WHOLE_ROW,
        "copy or download the file again; if it is complete, fix its ending or its permissions.",
    )
