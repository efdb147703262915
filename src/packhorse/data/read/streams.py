"""Read the bytes of a file in pieces, decompressed where needed; a whole file is never in memory."""

from __future__ import annotations

import codecs
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
# Longest first: the mark of UTF-32 begins with that of UTF-16.
OTHER_MARKS: Final = {
    b"\xff\xfe\0\0": "UTF-32",
    b"\0\0\xfe\xff": "UTF-32",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}


def pieces(path: Path) -> Iterator[bytes]:
    """Yield a text file in pieces of about 256 KiB of UTF-8, without its byte order mark.

    A mark of UTF-16 or UTF-32, as Windows programs write it, decides the encoding; without one no byte changes.

    Raises:
        UserError: The file cannot be read, decompressed or decoded to its end.
    """
    num_bytes, decoder = 0, None
    try:
        with closing(_open(path)) as stream:
            while piece := stream.read(PIECE_BYTES):
                if num_bytes == 0:
                    decoder = _decoder(piece)
                    piece = piece if decoder is not None else piece.removeprefix(UTF8_MARK)
                num_bytes += len(piece)
                yield piece if decoder is None else decoder.decode(piece).encode()
            if decoder is not None:
                decoder.decode(b"", final=True)
    except UnicodeError as error:
        raise UserError(
            f"{path} begins with the mark of UTF-16 or UTF-32, and cannot be decoded after {num_bytes} bytes: {error}.",
            WHOLE_ROW,
            "save the file again as UTF-8.",
        ) from error
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


def _decoder(begin: bytes) -> codecs.IncrementalDecoder | None:
    """Return the decoder for the byte order mark at the beginning of a file; None for UTF-8."""
    name = next((name for mark, name in OTHER_MARKS.items() if begin.startswith(mark)), None)
    return None if name is None else codecs.getincrementaldecoder(name)()


def _torn(path: Path, num_bytes: int, error: OSError) -> UserError:
    compression = form_of(path)[1]
    what = "read" if compression is None else f"decompressed as {compression}"
    return UserError(
        f"{path} cannot be {what} after {num_bytes} bytes: {error.strerror or error}.",
        WHOLE_ROW,
        "copy or download the file again; if it is complete, fix its ending or its permissions.",
    )
