"""Our tokenizer and chat template as Hugging Face's files, and the check of a folder's tokenizer.

GPT-2's byte-level BPE is kept there as a vocabulary of letters, one for each byte, and a list of
merges; both are recovered from the rank table. Writes nothing: the values are those of the files.
"""

import functools
import json
from pathlib import Path

from nanosynth import UserError, tokenizer

SPECIAL_IDS = (tokenizer.END_OF_TEXT, tokenizer.IM_START, tokenizer.IM_END)

# Equal to chat.prompt_ids where a prompt is asked for, else to chat.encode_conversations.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}"
    "{% else %}{{ '<|endoftext|>' }}{% endif %}"
)


@functools.cache
def _letters() -> list[str]:
    """The letter that stands for each byte: itself where it prints, else one from U+0100 on."""
    prints = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in prints else next(others)) for byte in range(256)]


def _spell(token: bytes) -> str:
    return "".join(_letters()[byte] for byte in token)


@functools.cache
def vocabulary() -> dict[str, int]:
    """GPT-2's 50,257 tokens spelt in letters, <|endoftext|> among them, as in its vocab.json."""
    tokens = {_spell(tokenizer.token_text(id)): id for id in range(tokenizer.END_OF_TEXT)}
    return tokens | {"<|endoftext|>": tokenizer.END_OF_TEXT}


@functools.cache
def merges() -> list[str]:
    """GPT-2's 50,000 merges in order, each as 'LEFT RIGHT'.

    A token's merge is what its bytes come down to when only the merges before it are made.

    >>> merges()[:3]
    ['Ġ t', 'Ġ a', 'h e']
    """
    ranks = {tokenizer.token_text(id): id for id in range(tokenizer.END_OF_TEXT)}
    found = []
    for token, rank in ranks.items():
        if len(token) == 1:
            continue
        parts = [token[place : place + 1] for place in range(len(token))]
        while len(parts) > 2:
            pairs = [ranks.get(a + b, rank) for a, b in zip(parts, parts[1:], strict=False)]
            place = pairs.index(min(pairs))
            assert pairs[place] < rank, f"{token!r} is no merge of two tokens"
            parts[place : place + 2] = [parts[place] + parts[place + 1]]
        found.append(" ".join(map(_spell, parts)))
    return found


def tokenizer_json() -> dict:
    """tokenizer.json: text to the ids of tiktoken, the three special tokens read out of it."""
    # A role's line is encoded apart from the text behind it, as chat.encode_conversations does:
    # newlines that open the text must not merge with the role's own.
    opening = "\\A(?:" + "|".join(tokenizer.ROLES) + ")\\n"
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    byte_level["use_regex"] = True
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": id, "content": tokenizer.decode([id]), **plain, "special": True}
            for id in SPECIAL_IDS
        ],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {
                    "type": "Split",
                    "pattern": {"Regex": opening},
                    "behavior": "Isolated",
                    "invert": False,
                },
                byte_level,
            ],
        },
        "post_processor": {**byte_level, "trim_offsets": False},
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocabulary(),
            "merges": merges(),
        },
    }


def special_tokens_map() -> dict:
    """special_tokens_map.json: a turn's end ends an answer; <|endoftext|> begins and pads."""
    end_of_text, im_start, im_end = (tokenizer.decode([id]) for id in SPECIAL_IDS)
    return {
        "bos_token": end_of_text,
        "eos_token": im_end,
        "pad_token": end_of_text,
        "unk_token": end_of_text,
        "additional_special_tokens": [im_start, im_end],
    }


def tokenizer_config(block_size: int) -> dict:
    """tokenizer_config.json, with the chat template."""
    return {
        # GPT2Tokenizer would build its own pre-tokenizer and ignore tokenizer.json's.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": block_size,
        "padding_side": "left",  # a batch of prompts goes on at its right end
        "clean_up_tokenization_spaces": False,
        "add_bos_token": False,
        "add_eos_token": False,
        **special_tokens_map(),
        "chat_template": CHAT_TEMPLATE,
    }


def check(folder: Path) -> str:
    """Which file shows that a folder's tokenizer is GPT-2's, or ''; another one is refused."""
    if (path := folder / "tokenizer.json").is_file():
        content = read_json(path)
        try:
            added = {token["content"]: token["id"] for token in content.get("added_tokens") or []}
            found = {**content["model"]["vocab"], **added}
            pairs = content["model"]["merges"]
            found_merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in pairs]
        except (KeyError, TypeError) as error:
            wanted = "a BPE model's vocab and merges, as GPT-2 has them"
            raise UserError(f"{path}: wanted {wanted} ({error!r})") from None
        _compare(path, found)
        if found_merges != merges():
            raise UserError(f"{path} has other merges than GPT-2's; wanted GPT-2's tokenizer")
        return path.name
    if (path := folder / "vocab.json").is_file():
        extra = folder / "added_tokens.json"
        _compare(path, read_json(path) | (read_json(extra) if extra.is_file() else {}))
        return path.name
    return ""


def _compare(path: Path, found: dict) -> None:
    """Refuse another vocabulary, and an added token whose id means another one here."""
    ours = vocabulary() | {tokenizer.decode([id]): id for id in SPECIAL_IDS}
    if different := [token for token, id in found.items() if ours.get(token) != id]:
        token = different[0]
        means = f"{token!r} is id {found[token]}"
        raise UserError(
            f"{path} is not GPT-2's tokenizer: {means}, and {len(different) - 1:,} other tokens "
            "differ; a model of another vocabulary cannot be used here"
        )
    if absent := [token for token in list(ours)[: tokenizer.END_OF_TEXT] if token not in found]:
        raise UserError(f"{path} is not GPT-2's tokenizer: it lacks {len(absent):,} of its tokens")


def read_json(path: Path) -> dict:
    """The object of a JSON file that a user brings."""
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"no {path.name} in {str(path.parent)!r}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: wanted a JSON object, got {type(content).__name__}")
    return content
