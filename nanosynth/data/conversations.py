"""What a row holds, in one normal form, or the reason why it holds nothing, and known troubles.

The normal form is a list of turns: an optional system turn, then user and assistant in alternation;
or, of a plain text, one turn of the role 'text'. COLUMNS and ROLES are all that is known of the
forms that rows come in. No files and no tokens here: a row is what a reader of sources.py yields.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import filterfalse

from nanosynth import UserError
from nanosynth.tokenizer import TEXT, Turn, is_unicode

Columns = Mapping[str, Sequence[str]]

# What a column is used for, and the names it goes by; the first that holds something is taken.
COLUMNS: Columns = {
    "turns": ("conversations", "messages", "conversation"),  # a list of turns, or of pairs
    "system": ("system", "system_prompt"),
    "history": ("history",),  # turns or pairs before the row's own
    "user": ("instruction", "prompt", "question", "query"),
    "input": ("input", "context"),  # below the question, or the question itself where it is alone
    "assistant": ("output", "response", "completion", "answer", "chosen"),
    "text": ("text",),  # a document without turns
    "role": ("from", "role"),  # within a turn
    "content": ("value", "content", "text"),  # within a turn
    "source": ("source",),
    "category": ("category",),
}
# A row has one of these; --columns that names a part of one leaves the others out.
FORMS = (("turns",), ("user", "assistant"), ("text",))
ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(
        "assistant gpt chatgpt bing bard claude gemini model bot chatbot ai".split(), "assistant"
    ),
}
TOOL_CALLS = ("tool_calls", "function_call")  # columns of a turn
TEXT_PARTS = ("text", "input_text", "output_text")  # types of content
MOST_SPACES = 900_000  # in a row; tiktoken's regex panics at 1,000,000
UNNAMED = "(not given)"
# Where a row's first words stand.
_TEXT_COLUMNS = [name for use in ("turns", "user", "input", "content") for name in COLUMNS[use]]
_TYPES = {
    **{type(None): "null", str: "text", bool: "a boolean", int: "a number", float: "a number"},
    **{list: "a list", dict: "an object", bytes: "bytes without an encoding"},
}


class Reject(Exception):
    """A row that holds nothing usable: the reason, and the name of the role, type or column at
    fault.

    A reader yields one in a row's place where it could not read the row; `words` is what it saw.
    """

    def __init__(self, reason: str, name: str = "", words: str = ""):
        name = " ".join(name.split())[:100]
        super().__init__(f"{reason}: {name}" if name else reason)
        self.reason, self.words = reason, words


class PlainText(str):
    """A row that is a text itself, of a file without columns."""


def named_columns(text: str) -> Columns:
    """COLUMNS as --columns changes them, 'user=question,assistant=reply'; 'system=': none."""
    parts = (part.partition("=") for part in text.split(",") if part.strip())
    pairs = [(use.strip(), equals, column.strip()) for use, equals, column in parts]
    named: dict[str, tuple[str, ...]] = {use: () for use, _, _ in pairs}
    for use, _, column in pairs:
        named[use] += (column,) if column else ()
    if not all(equals for _, equals, _ in pairs) or not named.keys() <= COLUMNS.keys():
        uses = ", ".join(COLUMNS)
        raise UserError(f"--columns={text}; wanted USE=COLUMN,USE=COLUMN of the uses {uses}")
    chosen = [form for form in FORMS if any(named.get(use) for use in form)]
    left_out = {use for form in FORMS if chosen and form not in chosen for use in form}
    return {**COLUMNS, **dict.fromkeys(left_out, ()), **named}


def named(columns: Columns) -> set[str]:
    """The columns of rows that are not among the known ones."""
    uses = columns.keys() - {"role", "content"}
    if columns["turns"] not in ((), COLUMNS["turns"]):  # the others may stand within them, as pairs
        uses -= {"user", "input", "assistant"}
    return {name for use in uses for name in columns[use] if name not in COLUMNS[use]}


def conversation(
    row: object, columns: Columns = COLUMNS, unused: set[str] | None = None
) -> list[Turn]:
    """The turns of one row. `unused` takes the names of its columns that hold text in vain.

    An empty value is as absent as a missing key: merged tables have every column, mostly empty.
    """
    if isinstance(row, Reject):
        raise row
    if isinstance(row, PlainText):
        turns = [(TEXT, str(row))]
    elif isinstance(row, dict):
        turns = _Row(row, columns).turns(unused)
    elif isinstance(row, list) and row and isinstance(row[0], dict):
        turns = _Row({}, columns).listed("the row", row)
    else:
        raise Reject("row is not an object")
    _check_turns(turns)
    return turns


def _is_absent(value: object, depth: int = 4) -> bool:
    """Whether there is no text, number or other value in it, in lists and objects of some depth."""
    if isinstance(value, str):
        return not value.strip()
    if isinstance(value, list | dict):
        inside = value.values() if isinstance(value, dict) else value
        return not inside or (depth > 0 and all(_is_absent(item, depth - 1) for item in inside))
    return value is None


class _Row:
    """An object, the columns of it that were taken, and what its turns held in vain."""

    def __init__(self, row: dict, columns: Columns):
        self._row, self._columns = row, columns
        self._taken: set[str] = set()
        self._unused: set[str] = set()

    def _take(self, use: str) -> tuple[str, object]:
        """(name, value) of the first column of this use that holds something, or ('', None)."""
        for name in self._columns[use]:
            if not _is_absent(value := self._row.get(name)):
                self._taken.add(name)
                return name, value
        return "", None

    def turns(self, unused: set[str] | None) -> list[Turn]:
        """The turns of the first form that the row has."""
        if turns := self.listed(*self._take("turns")) or self.pair():
            n_systems = int(turns[0][0] == "system")
            history = self.listed(*self._take("history"))
            turns = turns[:n_systems] + history + turns[n_systems:]
            n_systems = int(turns[0][0] == "system")
            turns = self._system(turns[:n_systems]) + turns[n_systems:]
        else:
            turns = [(TEXT, self._plain_text())]
        if unused is not None:
            taken = {*self._taken, *self._columns["source"], *self._columns["category"]}
            unused |= self._unused
            unused |= {k for k, value in self._row.items() if k not in taken and _holds_text(value)}
        return turns

    def _system(self, opening: list[Turn]) -> list[Turn]:
        """The system turn of the turns themselves or, where it says nothing, of its column."""
        name, system = self._take("system")
        if not (opening and opening[0][1].strip()):
            return [("system", _text(name, system))] if name else []
        if system != opening[0][1]:
            self._taken.discard(name)
        return opening

    def _plain_text(self) -> str:
        name, text = self._take("text")
        if name:
            return _text(name, text)
        known = [key for form in FORMS for use in form for key in self._columns[use]]
        if found := [key for key in known if key in self._row]:
            raise Reject("no text", f"in {', '.join(found)}")
        raise Reject("no known column")

    def pair(self) -> list[Turn]:
        """A question, with what stands below it, and its answer; each may be a list of turns."""
        asked, below, answered = map(self._take, ("user", "input", "assistant"))
        if not (asked[0] or below[0] or answered[0]):
            return []
        if not answered[0]:
            raise Reject("no answer", f"to {asked[0] or below[0]}")
        is_listed = self._is_turns(answered[1])
        answer = self.listed(*answered) if is_listed else [("assistant", _text(*answered))]
        if answer[0][0] != "assistant":  # the whole conversation, the question in it
            self._taken -= {name for name, value in (asked, below) if ("user", value) not in answer}
            return answer
        if self._is_turns(asked[1]):
            self._taken -= {below[0]}
            return self.listed(*asked) + answer
        parts = [_text(*part) for part in (asked, below) if part[0]]
        if not parts:
            raise Reject("no question", f"of {answered[0]}")
        return [("user", "\n\n".join(parts)), *answer]

    def _is_turns(self, value: object) -> bool:
        first = value[0] if isinstance(value, list) and value else None
        return isinstance(first, dict) and any(first.get(key) for key in self._columns["role"])

    def listed(self, name: str, listed: object) -> list[Turn]:
        """The turns of a list; none where no column has one."""
        if not isinstance(listed, list | None):
            raise Reject("not a list of turns", f"{name} is {_type(listed)}")
        items, turns = [*filterfalse(_is_absent, listed or ())], []
        # A list of two is a pair, unless the first two of them begin with roles: ["user", "Hi"].
        begin = [_role_of(item[0]) for item in items[:2] if isinstance(item, list)]
        are_turns = len(begin) == 2 and all(begin) and begin[0] != "assistant"
        for item in items:
            if isinstance(item, dict):
                turn = _Row(item, self._columns)
                turns += turn._turn(name)
                if len(turn._taken) < len(item):
                    left = item.keys() - turn._taken
                    self._unused |= {f"{name}.{key}" for key in left if _holds_text(item[key])}
            elif isinstance(item, list) and len(item) == 2 and are_turns:
                turns += [(_known_role(item[0]), _text(name, item[1]))]
            elif isinstance(item, list) and len(item) == 2:
                turns += [("user", _text(name, item[0])), ("assistant", _text(name, item[1]))]
            else:
                raise Reject("turn is not an object", f"{_type(item)} in {name}")
        if called := [key for key in TOOL_CALLS if f"{name}.{key}" in self._unused]:
            raise Reject("turn calls a tool", called[0])
        return turns

    def _turn(self, name: str) -> list[Turn]:
        """One turn of a role, or two of a pair."""
        _, role = self._take("role")
        if role is None:
            if pair := self.pair():
                return pair
            raise Reject("turn without a role")
        key, content = self._take("content")
        return [(_known_role(role), _text(f"{name}.{key}", content))]


def _role_of(name: object) -> str:
    """The role that goes by this name; '' where none does."""
    return ROLES.get(name.strip().lower(), "") if isinstance(name, str) else ""


def _known_role(name: object) -> str:
    if role := _role_of(name):
        return role
    raise Reject("unknown role", name if isinstance(name, str) else _type(name))


def _type(value: object) -> str:
    return _TYPES.get(type(value), f"a {type(value).__name__}")


def _text(name: str, value: object) -> str:
    """A text, or the text parts of a list of content, joined."""
    if value is None or isinstance(value, str):
        return value or ""
    if not isinstance(value, list):
        raise Reject("not text", f"{name} is {_type(value)}")
    texts = []
    for part in filterfalse(_is_absent, value):
        kind = part.get("type") or TEXT_PARTS[0] if isinstance(part, dict) else ""
        if kind and kind not in TEXT_PARTS:
            raise Reject("content is not text", f"type {kind}")
        text = (part.get("text") or "") if kind else None
        if not isinstance(text, str):
            raise Reject("not text", f"{name} is a list")  # perhaps of several answers
        texts.append(text)
    return "".join(texts)


def _holds_text(value: object) -> bool:
    return any(True for _ in _texts(value, depth=4))


def _check_turns(turns: list[Turn]) -> None:
    body = turns[1:] if turns and turns[0][0] == "system" else turns
    if not body:
        raise Reject("no turns")
    if body[0][0] not in ("user", TEXT):
        raise Reject("does not begin with the user")
    order = ["user", "assistant"] * len(body) if body[0][0] == "user" else [TEXT]
    for (role, text), wanted in zip(body, order, strict=False):
        if role != wanted:
            raise Reject("turns do not alternate")
        if not text.strip():
            raise Reject("empty turn", role)
    if body[-1][0] == "user":
        raise Reject("does not end with an answer")
    for _, text in turns:
        # Readers take a byte that is not UTF-8 for a lone surrogate of U+DC80 to U+DCFF.
        if not is_unicode(text):
            if re.search("[\ud800-\udc7f\udd00-\udfff]", text):
                raise Reject("text is not valid Unicode", "a lone surrogate")
            raise Reject("text is not UTF-8", "cp1252 or another encoding of single bytes")
        if len(text) >= MOST_SPACES:
            runs = (len(run[0]) for run in re.finditer(r"\s+", text))
            if max(runs, default=0) >= MOST_SPACES:
                raise Reject("spaces without end")


def names_of(row: object, file: str, columns: Columns = COLUMNS) -> tuple[str, str]:
    """A row's source and category, their first 80 characters; the file stands for a source that
    is not given.
    """
    named = row if isinstance(row, dict) else {}
    found = []
    for use, otherwise in (("source", file), ("category", UNNAMED)):
        values = [named.get(name) for name in columns[use]]
        texts = [value for value in values if isinstance(value, str) and value.strip()]
        found.append((texts or [otherwise])[0][:80].encode("utf-8", "replace").decode())
    return found[0], found[1]


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
        known = [key for key in _TEXT_COLUMNS if key in value]
        others = (key for key in value if key not in (*known, *COLUMNS["role"]))
        for key in (*known, *others):
            yield from _texts(value[key], depth - 1)


# Known troubles of synthetic conversations. Rules of thumb, cheap enough for every row: they are
# counted always, and a row is dropped for one only where prepare.py is told to.

RUN_LENGTH = 100  # of one character, from which on it is a trouble
_STRIDE = 25  # a run of RUN_LENGTH holds RUN_LENGTH // _STRIDE of every _STRIDE-th characters
_SPARSE_RUN = re.compile(rf"(.)\1{{{RUN_LENGTH // _STRIDE - 1}}}", re.DOTALL)
_RUN = re.compile(rf"(.)\1{{{RUN_LENGTH - 1}}}", re.DOTALL)

_BOILERPLATE_HINTS = ("an ai", "an artificial", "language model")  # faster to search for
_BOILERPLATE = re.compile(
    r"(?:as an (?:ai|artificial intelligence)|as a (?:large )?language model"
    r"|(?:i'm|i am) (?:just )?an ai)\b"
)
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
                any(hint in text for hint in _BOILERPLATE_HINTS) and _BOILERPLATE.search(text)
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
