"""Known troubles of synthetic conversations: refusals, other languages, runs of one character.

Rules of thumb, cheap enough for every row: they are counted always, and a row is dropped for one
only where prepare.py is told to.
"""

import re
from collections.abc import Callable, Sequence

from nanosynth.tokenizer import Turn

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
