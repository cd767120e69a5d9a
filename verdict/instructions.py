"""Instructions whose obedience can be checked exactly: one rule of CHECKS for each prompt.

data/tasks/prompts.jsonl holds lines of {"prompt": ..., "check": {"kind": ..., arguments}}.
"""

import json
import re
from pathlib import Path

from nanosynth import UserError
from nanosynth.data import utf8
from nanosynth.schema import fields, misfit

_BULLET = re.compile(r"^\s*[-*•]\s+\S", re.MULTILINE)
_SENTENCE_END = r"[.!?]+[\"'”)]*(?:\s+|$)"  # or the text's end
_NUMBER = re.compile(r"^\s*(\d+)[.):]\s+\S", re.MULTILINE)


def words(text: str) -> list[str]:
    """Runs of letters and digits, with apostrophes and hyphens within.

    >>> words("It's a well-known fact, 2nd to none.")
    ["It's", 'a', 'well-known', 'fact', '2nd', 'to', 'none']
    """
    return re.findall(r"\w+(?:['’-]\w+)*", text)


def lower_words(text: str) -> list[str]:
    return [word.lower() for word in words(text)]


def plain(text: str) -> str:
    """Without the quotation marks and the full stop that may stand around an answer."""
    return text.strip().strip("\"'“”").rstrip(".").strip()


def n_lines(text: str) -> int:
    return sum(bool(line.strip()) for line in text.splitlines())


def n_parts(text: str, separator: str) -> int:
    """Stretches between the separators, the blank ones apart."""
    return len([part for part in re.split(separator, text) if part.strip()])


def items(text: str) -> int:
    """Of a bulleted or numbered list, or of several lines; else parts between commas or 'and'."""
    marked = len(_BULLET.findall(text)) or len(_NUMBER.findall(text))
    listed = marked or n_lines(text)
    if marked or listed > 1:
        return listed
    return n_parts(plain(text.rsplit(":", 1)[-1]), r",\s*(?:and\s+)?|\s+and\s+")


def numbered(answer: str, n: int) -> bool:
    found = _NUMBER.findall(answer)
    return len(found) == n and all(text == str(k) for k, text in enumerate(found, start=1))


def is_json(text: str, keys: list[str]) -> bool:
    body = re.sub(r"^```(?:json)?\s*|\s*```$", "", text.strip())
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        return False
    return isinstance(value, dict) and set(keys) <= set(value)


CHECKS = {  # of an answer, by kind; the other arguments are those of the check
    "one_word": lambda answer: len(words(answer)) == 1,
    "n_words": lambda answer, n: len(words(answer)) == n,
    "max_words": lambda answer, n: len(words(answer)) <= n,
    "min_words": lambda answer, n: len(words(answer)) >= n,
    "n_items": lambda answer, n: items(answer) == n,
    "numbered": numbered,
    "bullets": lambda answer, n: len(_BULLET.findall(answer)) == n,
    "n_lines": lambda answer, n: n_lines(answer) == n,
    "n_sentences": lambda answer, n: n_parts(answer, _SENTENCE_END) == n,
    "n_paragraphs": lambda answer, n: n_parts(answer, r"\n\s*\n") == n,
    "upper_case": str.isupper,
    "lower_case": str.islower,
    "starts_with": lambda answer, text: answer.strip().startswith(text),
    "ends_with": lambda answer, text: answer.strip().rstrip(".").endswith(text),
    "equals": lambda answer, text: plain(answer) == plain(text),
    "one_of": lambda answer, options: plain(answer).lower() in options,
    "contains": lambda answer, words: set(words) <= set(lower_words(answer)),
    "contains_text": lambda answer, texts: all(part in answer for part in texts),
    "excludes": lambda answer, words: not set(words) & set(lower_words(answer)),
    "excludes_text": lambda answer, texts: not any(part in answer for part in texts),
    "in_order": lambda answer, words: [w for w in lower_words(answer) if w in words] == words,
    "quoted": lambda answer: bool(re.fullmatch(r'["“].+["”]', answer.strip(), re.DOTALL)),
    "json": is_json,
}

CHECK = fields("kind:text n?:count text?:text") | {
    name: ["text"] for name in ("options?", "words?", "texts?", "keys?")
}


def obeys(answer: str, check: dict) -> bool:
    """Does an answer do what the prompt asked? One without a letter or digit never does."""
    arguments = {name: value for name, value in check.items() if name != "kind"}
    has_content = any(char.isalnum() for char in answer)
    return has_content and bool(CHECKS[check["kind"]](answer, **arguments))


def read_prompts(path: Path) -> list[dict]:
    """The lines of a prompt file, each with a prompt and a check that can be applied."""
    if not path.is_file():
        raise UserError(f"no prompt file {str(path)!r}; wanted .jsonl with prompt and check")
    rows = []
    for number, line in utf8.lines(path):
        try:
            row = json.loads(line)
            if wrong := misfit(row, {"prompt": "text", "check": CHECK}):
                raise TypeError(wrong)
            obeys("a", row["check"])
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            wanted = f"a prompt, and a check of kind {', '.join(CHECKS)} with its arguments"
            raise UserError(f"{path}, line {number}: {error!r}; wanted {wanted}") from None
        rows.append(row)
    if not rows:
        raise UserError(f"{path} has no prompt")
    return rows
