"""Text files as editors and tools leave them: with or without a byte-order mark, JSON with one value a line."""

from __future__ import annotations

import codecs
import json
import lzma
from pathlib import Path
from typing import Any

UTF16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
MARKS = (codecs.BOM_UTF8, *UTF16_MARKS)


def decode(content: bytes) -> str:
    """The text of a file's bytes: UTF-8, or UTF-16 where a byte-order mark says so; the mark is no part of the text.

    Raises:
        UnicodeDecodeError: (a ValueError) bytes in another encoding.
    """
    return content.decode("utf-16" if content.startswith(UTF16_MARKS) else "utf-8-sig")


def read_text(path: str | Path) -> str:
    r"""The text of a file, every line ending in \n; one that ends in .xz is unpacked.

    Raises:
        OSError: a file that can't be read.
        ValueError: one that is not UTF-8 or UTF-16 text, or a damaged archive.
    """
    return _read(Path(path)).replace("\r\n", "\n").replace("\r", "\n")


def read_lines(path: str | Path, *, skip_blank: bool = True) -> list[tuple[int, str]]:
    r"""(number from 1, text) of each line of a JSONL file, without the blank ones unless these are asked for.

    Only \n ends a line: U+2028, U+0085 and other characters at which `str.splitlines` splits may stand in JSON's text.

    Raises:
        OSError: a file that can't be read.
        ValueError: one that is not UTF-8 or UTF-16 text, or a damaged archive.
    """
    lines = _read(Path(path)).removesuffix("\n").split("\n")
    return [(number, line) for number, line in enumerate(lines, 1) if line.strip() or not skip_blank]


def read_json_lines(path: str | Path, *, skip_blank: bool = True) -> list[Any]:
    """The values of a JSONL file, one a line.

    Args:
        path: of the file.
        skip_blank: leave out blank lines; otherwise they are no JSON.

    Raises:
        OSError: a file that can't be read.
        ValueError: a file that is no text, or a line that is no JSON, by its number.
    """
    values = []
    for number, line in read_lines(path, skip_blank=skip_blank):
        try:
            values.append(json.loads(line))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"line {number} is not JSON ({error})") from error
    return values


def _read(path: Path) -> str:
    content = path.read_bytes()
    try:
        return decode(lzma.decompress(content) if path.suffix == ".xz" else content)
    except lzma.LZMAError as error:
        raise ValueError(f"{path} is a damaged archive ({error}): fetch it again") from error
