"""What conversation a row holds, or the reason why it holds none, and the troubles it is known for.

No files and no tokens here: a row is what a reader of sources.py yields.
"""

import re
from collections.abc import Callable, Iterator, Sequence

from nanosynth.tokenizer import Turn, is_unicode

TEXT_COLUMNS = ("conversations", "messages", "instruction", "value", "content")
MOST_SPACES = 900_000  # in a row; tiktoken's regex panics at 1,000,000
UNNAMED = "(not given)"

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
        if not is_unicode(text):
            raise Reject("text is not valid Unicode")
        if len(text) >= MOST_SPACES:
            runs = (len(run[0]) for run in re.finditer(r"\s+", text))
            if max(runs, default=0) >= MOST_SPACES:
                raise Reject("spaces without end")


def names_of(row: object) -> tuple[str, str]:
    """A row's source and category, as far as it tells; their first 80 characters."""
    named = row if isinstance(row, dict) else {}
    source, category = (
        value[:80].encode("utf-8", "replace").decode()
        if isinstance(value, str) and value.strip()
        else UNNAMED
        for value in (named.get("source"), named.get("category"))
    )
    return source, category


def first_words(row: object, limit: int = 120) -> str:
    """The beginning of a row's text as far as it can be told, on one line, for the rejects file."""
    text = row.words if isinstance(row, Reject) else next(_texts(row, depth=4), "")
    return " ".join(text[: 4 * limit].encode("utf-8", "replace").decode().split())[:limit]


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


# Known troubles of synthetic conversations. Rules of thumb, cheap enough for every row: they are
# counted always, and a row is dropped for one only where prepare.py is told to.

RUN_LENGTH = 100  # of one character, from which on it is a trouble
_STRIDE = 25  # a run of RUN_LENGTH holds RUN_LENGTH // _STRIDE of every _STRIDE-th characters
_SPARSE_RUN = re.compile(rf"(.)\1{{{RUN_LENGTH // _STRIDE - 1}}}", re.DOTALL)
_RUN = re.compile(rf"(.)\1{{{RUN_LENGTH - 1}}}", re.DOTALL)

_BOILERPLATE = (
    "as an ai",
    "as a language model",
    "as a large language model",
    "as an artificial intelligence",
    "i'm an ai",
    "i am an ai",
    "i'm just an ai",
    "i am just an ai",
)
_BOILERPLATE_WORD = re.compile(rf"(?:{'|'.join(_BOILERPLATE)})\b")
_REFUSAL = re.compile(
    r"^\W*(?:(?:i'm|i am) (?:very |so |really )?sorry\b|sorry,|i apologi[sz]e\b|unfortunately,)"
    r".{0,40}?\b(?:i|we) (?:can't|cannot|can not|won't|will not|am not able|am unable|'m unable)\b"
    r"|^\W*i (?:can't|cannot|can not|won't|will not|am unable to|am not able to) "
    r"(?:help|assist|provide|fulfil|comply|answer|engage|generate|create|write|support|do that)",
    re.DOTALL,
)

_ENGLISH = frozenset(
    "the of and to in is that for it with as are this be on by or from what how you your "
    "he she they were has not which when where who why".split()
)
# Common words of other languages of the Latin script that are no English words.
_FOREIGN = frozenset(
    "el la los las del que y una por para es se como más su al lo "
    "le les des du et est une dans qui sur ce au avec elle nous vous "
    "der das und ist nicht ein eine zu mit von auf für sich dem im auch wie "
    "il di che è non sono della nel gli uma não os na "
    "het een dat niet och att det är som på av jest nie się og ikke bir ve için".split()
)
_LAST_LATIN = "\u024f"


def refuses(turns: Sequence[Turn]) -> bool:
    """Whether an answer is refused, or speaks of its author as an AI."""
    for role, text in turns:
        if role == "assistant":
            text = text.replace("\u2019", "'").lower()
            if _REFUSAL.match(text[:300]) or (
                any(phrase in text for phrase in _BOILERPLATE) and _BOILERPLATE_WORD.search(text)
            ):
                return True
    return False


def is_not_english(turns: Sequence[Turn]) -> bool:
    """By script, then by common words; text without common words, as code, passes as English."""
    text = " ".join([text[:300] for role, text in turns[:3] if role != "system"])
    if not text.isascii():
        letters = [letter for letter in text if letter.isalpha()]
        beyond = sum(letter > _LAST_LATIN for letter in letters)
        if len(letters) >= 20 and beyond > 0.3 * len(letters):
            return True
    words = text.lower().split()
    english = sum(map(_ENGLISH.__contains__, words))
    if 10 * english >= len(words):
        return False
    foreign = sum(map(_FOREIGN.__contains__, words))
    return foreign >= 3 and foreign > english and 10 * foreign >= len(words)


def has_run(turns: Sequence[Turn]) -> bool:
    """Whether RUN_LENGTH characters in a row are the same one."""
    return any(_SPARSE_RUN.search(text[::_STRIDE]) and _RUN.search(text) for _, text in turns)


TROUBLES: dict[str, Callable[[Sequence[Turn]], bool]] = {
    "refusal or AI boilerplate": refuses,
    "not English": is_not_english,
    "run of one character": has_run,
}


def troubles_of(turns: Sequence[Turn]) -> list[str]:
    """The names of those that a conversation has."""
    return [name for name, has in TROUBLES.items() if has(turns)]
