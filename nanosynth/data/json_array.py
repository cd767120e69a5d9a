"""The items of a JSON array of any size, one at a time, by the standard library's own parser.

The parser is given a window of the text that grows until it holds one whole item. By hand, because
ijson, as fast (250 MB/s), turns a lone surrogate into '?', gives up at a byte order mark and at an
integer past 64 bits, with all rows behind it, and takes memory by the square of the nesting.
"""

import codecs
import json
import re
from collections.abc import Iterator
from typing import BinaryIO

BLOCK_BYTES = 1 << 16  # read at once; a window in the cache parses faster than one of 1 MB
# Where a window ends within an item, the parser complains at most so many characters before its
# end (a number, a literal or an escape that is cut), or of the string that is cut.
_CUT_CHARACTERS = 16
_SPACE = re.compile(r"[ \t\n\r]*")
# Numbers are not used, so one of a million digits needs no exact value.
_decode = json.JSONDecoder(parse_int=float).raw_decode


class BrokenArray(ValueError):
    """Not a JSON array: what is wrong, and the byte where."""

    def __init__(self, message: str, offset: int):
        super().__init__(message)
        self.offset = offset


def items(file: BinaryIO) -> Iterator[object]:
    """The items of the array in `file`. Bytes that are not UTF-8 come as lone surrogates."""
    window = _Window(file)
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


class _Window:
    """The part of the text that was read and not yet taken; `at` is the place in it."""

    def __init__(self, file: BinaryIO):
        self._file = file
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
                if self._is_whole or not self._is_cut(error):
                    self.at = min(error.pos, len(self._text))
                    raise self.broken(error.msg) from None
            except RecursionError:
                raise self.broken("it is nested too deeply") from None
            else:
                if self._is_whole or len(self._text) - end >= _CUT_CHARACTERS:
                    self.at = end
                    return value
            self.more()  # also for '12', which may go on

    def _is_cut(self, error: json.JSONDecodeError) -> bool:
        rest = len(self._text) - _SPACE.match(self._text, error.pos).end()
        return rest < _CUT_CHARACTERS or error.msg.startswith("Unterminated string")

    def broken(self, message: str) -> BrokenArray:
        left = self._text[self.at :].encode("utf-8", "surrogateescape")
        pending = self._decoder.getstate()[0]
        return BrokenArray(message, self._n_bytes - len(left) - len(pending))
