"""The items of a JSON array, or values that follow one another, by the standard library's parser.

The parser is given a window of the text that grows until it holds one whole item. By hand, because
ijson, as fast (250 MB/s), turns a lone surrogate into '?', gives up at a byte order mark and at an
integer past 64 bits, with all rows behind it, and takes memory by the square of the nesting.
"""

import codecs
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from nanosynth import UserError

BLOCK_BYTES = 1 << 16  # read at once; a window in the cache parses faster than one of 1 MB
# Where a window ends within an item, the parser complains at most so many characters before its
# end (a number, a literal or an escape that is cut), or of the string that is cut.
_CUT_CHARACTERS = 16
_SPACE = re.compile(r"[ \t\n\r]*")
# Numbers are not used, so one of a million digits needs no exact value.
_decode = json.JSONDecoder(parse_int=float).raw_decode


def items(file: BinaryIO, path: Path) -> Iterator[object]:
    """The items of the array in `file`. Bytes that are not UTF-8 come as lone surrogates.

    What is not the JSON that was wanted raises a UserError with its place.
    """
    window = _Window(file, path)
    if window.mark() != "[":
        raise window.broken("wanted an array of rows")
    window.at += 1
    if window.mark() == "]":
        window.at += 1
    else:
        separator = ","
        while separator == ",":
            yield window.value()
            separator = window.mark()
            if separator not in (",", "]"):
                raise window.broken("wanted ',' or ']'" if separator else "it ends too early")
            window.at += 1
    if window.mark():
        raise window.broken("text after the array's end")


def values(file: BinaryIO, path: Path) -> Iterator[object]:
    """The values that follow one another in `file`, each with as many lines as it likes."""
    window = _Window(file, path)
    while window.mark():
        yield window.value()


def form_of(head: str) -> str:
    """How JSON that begins with `head` goes on: as an 'array', as 'values' that take several lines
    each, or as 'lines', a value each, of which some may be broken.
    """
    head = head.lstrip(" \t\r\n\ufeff")
    line, newline, rest = head.partition("\n")
    try:
        json.loads(line, parse_int=float)
    except (ValueError, RecursionError):
        if head.startswith("["):
            return "array"
        try:
            json.JSONDecoder().raw_decode(head)
        except json.JSONDecodeError as error:
            return "values" if newline and _is_cut(head, error) else "lines"
        except (ValueError, RecursionError):
            return "lines"
        return "values"
    return "array" if head.startswith("[") and not rest.strip() else "lines"


def _is_cut(text: str, error: json.JSONDecodeError) -> bool:
    """Whether the parser complains of nothing but the text's end."""
    rest = len(text) - _SPACE.match(text, error.pos).end()
    return rest < _CUT_CHARACTERS or error.msg.startswith("Unterminated string")


class _Window:
    """The part of the text that was read and not yet taken; `at` is the place in it."""

    def __init__(self, file: BinaryIO, path: Path):
        self._file, self._path = file, path
        self._n_values = 0  # taken so far
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")("surrogateescape")
        self._n_bytes = 0  # read so far
        self._is_whole = False  # all was read
        self._text, self.at = "", 0

    def more(self) -> None:
        """Double what is left, so that an item of any size is parsed in linear time."""
        block = self._file.read(max(BLOCK_BYTES, len(self._text) - self.at))
        self._n_bytes += len(block)
        self._text = self._text[self.at :] + self._decoder.decode(block, final=not block)
        self.at = 0
        self._is_whole = not block

    def mark(self) -> str:
        """The next character that is no space; '' at the end."""
        while True:
            self.at = _SPACE.match(self._text, self.at).end()
            if self.at < len(self._text):
                return self._text[self.at]
            if self._is_whole:
                return ""
            self.more()

    def value(self) -> object:
        """The next value, which is taken."""
        self.mark()
        while True:
            try:
                value, end = _decode(self._text, self.at)
            except json.JSONDecodeError as error:
                if self._is_whole or not _is_cut(self._text, error):
                    self.at = min(error.pos, len(self._text))
                    raise self.broken(error.msg) from None
            except RecursionError:
                raise self.broken("it is nested too deeply") from None
            else:
                if self._is_whole or len(self._text) - end >= _CUT_CHARACTERS:
                    self.at = end
                    self._n_values += 1
                    return value
            self.more()  # also for '12', which may go on

    def broken(self, message: str) -> UserError:
        left = self._text[self.at :].encode("utf-8", "surrogateescape")
        offset = self._n_bytes - len(left) - len(self._decoder.getstate()[0])
        where = f"after {self._n_values} rows, near byte {offset} of its text"
        return UserError(f"{self._path}: broken JSON {where}: {message}")
