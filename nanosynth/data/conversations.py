"""What conversation a row holds, or the reason why it holds none. No files and no tokens here."""

import re
from collections.abc import Iterator

from nanosynth.tokenizer import Turn

TEXT_COLUMNS = ("conversations", "messages", "instruction", "value", "content")
MOST_SPACES = 900_000  # in a row; tiktoken's regex panics at 1,000,000

ROLE_NAMES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
}


class Reject(Exception):
    """A row that holds no usable conversation; the text is the reason it is counted under.

    A reader yields one in a row's place where it could not read the row; `words` is what it saw.
    """

    def __init__(self, reason: str, words: str = ""):
        super().__init__(reason)
        self.words = words


def conversation(row: object) -> list[Turn]:
    """The turns of one row: an optional system turn, then user and assistant in alternation.

    Takes `conversations` (from/value), `messages` (role/content) and instruction rows. Keys may be
    missing or null: OpenHermes leaves out most columns. An empty system turn is no turn.
    """
    if isinstance(row, Reject):
        raise row
    if not isinstance(row, dict):
        raise Reject("row is not an object")
    listed = _first(row, "conversations", "messages")
    if listed is not None:
        turns = _listed_turns(listed)
    elif row.get("instruction") is not None:
        turns = _instruction_turns(row)
    else:
        raise Reject("no conversations, messages or instruction")
    if turns and turns[0][0] == "system" and not turns[0][1].strip():
        turns = turns[1:]
    _check_turns(turns)
    return turns


def _first(row: dict, *keys: str) -> object:
    """The first value that is not null; merged tables have every column, mostly empty."""
    return next((row[key] for key in keys if row.get(key) is not None), None)


def _listed_turns(listed: object) -> list[Turn]:
    if not isinstance(listed, list):
        raise Reject("turns are not a list")
    turns = []
    for turn in listed:
        if not isinstance(turn, dict):
            raise Reject("turn is not an object")
        role, text = _first(turn, "from", "role"), _first(turn, "value", "content")
        if not isinstance(role, str) or role not in ROLE_NAMES:
            raise Reject("unknown role")
        if not isinstance(text, str):
            raise Reject("turn without text")
        turns.append((ROLE_NAMES[role], text))
    return turns


def _instruction_turns(row: dict) -> list[Turn]:
    """Alpaca's columns: instruction, an optional input below it, and output or response."""
    parts = [row["instruction"], row.get("input") or "", _first(row, "output", "response")]
    parts.append(row.get("system_prompt") or "")
    if not all(isinstance(part, str) for part in parts):
        raise Reject("turn without text")
    instruction, addition, answer, system = parts
    question = f"{instruction}\n\n{addition}" if addition.strip() else instruction
    return [("system", system), ("user", question), ("assistant", answer)]


def _check_turns(turns: list[Turn]) -> None:
    body = turns[1:] if turns and turns[0][0] == "system" else turns
    if not body:
        raise Reject("no turns")
    if body[0][0] != "user":
        raise Reject("does not begin with the user")
    for (role, text), wanted in zip(body, ["user", "assistant"] * len(body), strict=False):
        if role != wanted:
            raise Reject("turns do not alternate")
        if not text.strip():
            raise Reject("empty turn")
    if body[-1][0] != "assistant":
        raise Reject("does not end with an answer")
    for _, text in turns:
        try:
            text.encode()
        except UnicodeEncodeError:
            raise Reject("text is not valid Unicode") from None
        if len(text) >= MOST_SPACES:
            runs = (len(run[0]) for run in re.finditer(r"\s+", text))
            if max(runs, default=0) >= MOST_SPACES:
                raise Reject("spaces without end")


def first_words(row: object, limit: int = 120) -> str:
    """The beginning of a row's text as far as it can be told, on one line, for the rejects file."""
    found = row.words if isinstance(row, Reject) else next(_texts(row, depth=4), "")
    return " ".join(found[: 4 * limit].encode("utf-8", "replace").decode().split())[:limit]


def _texts(value: object, depth: int) -> Iterator[str]:
    """The texts within a value, those of the known columns before others."""
    if isinstance(value, str) and value.strip():
        yield value
    elif isinstance(value, list) and depth:
        for item in value:
            yield from _texts(item, depth - 1)
    elif isinstance(value, dict) and depth:
        known = [key for key in TEXT_COLUMNS if key in value]
        others = (key for key in value if key not in known and key not in ("from", "role"))
        for key in (*known, *others):
            yield from _texts(value[key], depth - 1)
