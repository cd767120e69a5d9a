"""Text that is to be UTF-8: lines of a prompt file, and the name of another encoding."""

import codecs
from functools import partial
from pathlib import Path

from nanosynth import UserError

_MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",  # before UTF-16's, which it begins with
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


def check(head: bytes, path: Path) -> None:
    """Refuse a file that begins as another encoding does; single bytes of cp1252 are not seen.

    `head`: its first 1,024 bytes or more.
    """
    head = head[:1024]
    name = next((name for mark, name in _MARKS.items() if head.startswith(mark)), "")
    # Of two bytes a character are at least spaces and newlines, one in fifty or more.
    if not name and 0 < len(head) <= 50 * head.count(0):
        # The higher bytes are those of few values.
        order = "LE" if len({*head[1::2]}) < len({*head[::2]}) else "BE"
        name = next(filter(partial(_is_text, head), (f"UTF-32{order}", f"UTF-16{order}")), "")
        if not name:
            raise UserError(f"{path} is no text: it has bytes of zero")
    if name:
        raise UserError(f"{path} is {name}, not UTF-8; turn it by: iconv -f {name} -t UTF-8 {path}")


def _is_text(head: bytes, encoding: str) -> bool:
    try:
        return "\0" not in codecs.getincrementaldecoder(encoding)().decode(head)
    except UnicodeDecodeError:
        return False


def lines(path: Path) -> list[tuple[int, str]]:
    """(number, line) of each line that is not blank; a line ends at a newline and at nothing else.

    A byte order mark is no text, and the '\\r' of '\\r\\n' is none.
    """
    try:
        content = path.read_bytes()
        check(content, path)
        text = content.decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        place = f"byte {error.start} is {content[error.start]:#04x}"
        raise UserError(
            f"{path} is not UTF-8 ({place}); if it is cp1252, turn it by: "
            f"iconv -f CP1252 -t UTF-8 {path}"
        ) from None
    numbered = enumerate((line.removesuffix("\r") for line in text.split("\n")), start=1)
    return [(number, line) for number, line in numbered if line.strip()]
