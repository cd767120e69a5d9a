"""Our tokenizer and chat template in Hugging Face's files, and the check of another's tokenizer."""

import functools
import itertools
import json
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models
from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from nanosynth import UserError, tokenizer

END_OF_TEXT, IM_START, IM_END = (
    tokenizer.decode([id]) for id in (tokenizer.END_OF_TEXT, tokenizer.IM_START, tokenizer.IM_END)
)
# Equal to tokenizer.prompt_ids where a prompt is asked for, else to tokenizer.encode_conversations.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}"
    "{% else %}{{ '<|endoftext|>' }}{% endif %}"
)


@functools.cache
def gpt2_bpe() -> Tokenizer:
    """Text to the ids of tiktoken; the three special tokens, too, are read out of the text."""
    ids = {tokenizer.token_text(id): id for id in range(tokenizer.END_OF_TEXT)}
    letters = bytes_to_unicode()  # GPT-2's files spell each byte as a letter
    spelt = {token: "".join(letters[byte] for byte in token) for token in ids}
    vocabulary = {spelt[token]: id for token, id in ids.items()}
    merges = [(spelt[left], spelt[right]) for left, right in _merges(ids)]
    bpe = Tokenizer(models.BPE(vocabulary | {END_OF_TEXT: tokenizer.END_OF_TEXT}, merges))
    # A role's line is encoded apart from the text behind it, as encode_conversations does:
    # newlines that open the text must not merge with the role's own.
    opening = Regex(rf"\A(?:{'|'.join(tokenizer.ROLES)})\n")
    bpe.pre_tokenizer = Sequence([Split(opening, "isolated"), ByteLevel(add_prefix_space=False)])
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens([END_OF_TEXT, IM_START, IM_END])
    return bpe


def _merges(ids: dict[bytes, int]) -> list[list[bytes]]:
    """GPT-2's 50,000 merges in order, of which the rank table has the results only.

    A token's merge is what its bytes come down to when only the merges before it are made.
    (transformers' TikTokenConverter lists every split into two tokens, 108,299 of them.)
    """
    merges = []
    for token, rank in ids.items():
        parts = [bytes([byte]) for byte in token]
        while len(parts) > 2:
            ranks = [ids.get(left + right, rank) for left, right in itertools.pairwise(parts)]
            place = ranks.index(min(ranks))
            parts[place : place + 2] = [parts[place] + parts[place + 1]]
        merges += [parts] if len(parts) == 2 else []
    return merges


def save(folder: Path, block_size: int) -> None:
    """Write tokenizer.json, and tokenizer_config.json with the chat template."""
    PreTrainedTokenizerFast(
        tokenizer_object=gpt2_bpe(),
        bos_token=END_OF_TEXT,
        eos_token=IM_END,  # a turn's end ends an answer
        pad_token=END_OF_TEXT,
        unk_token=END_OF_TEXT,
        model_max_length=block_size,
        padding_side="left",  # a batch of prompts goes on at its right end
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(folder, save_jinja_files=False)
    path = folder / "tokenizer_config.json"
    for_others = {
        "tokenizer_class": "PreTrainedTokenizerFast",  # known to transformers 4, too
        "additional_special_tokens": [IM_START, IM_END],
        "add_bos_token": False,  # llama.cpp's converter reads it
    }
    path.write_text(json.dumps(json.loads(path.read_text()) | for_others, indent=2) + "\n")


def check(folder: Path) -> str:
    """Which file shows that a folder's tokenizer is GPT-2's, or ''; another one is refused."""
    ours, theirs = gpt2_bpe(), None
    if (path := folder / "tokenizer.json").is_file():
        try:
            theirs = Tokenizer.from_file(str(path))
        except Exception as error:  # the library has no class of its own
            raise UserError(f"{path} cannot be read: {error}") from None
        found = theirs.get_vocab()
    elif (path := folder / "vocab.json").is_file():
        added = folder / "added_tokens.json"
        found = read_json(path) | (read_json(added) if added.is_file() else {})
    else:
        return ""
    wanted = ours.get_vocab()
    absent = wanted.keys() - found.keys() - {END_OF_TEXT, IM_START, IM_END}
    if wrong := [token for token in found if found[token] != wanted.get(token)] or sorted(absent):
        first = f"{wrong[0]!r} is id {found.get(wrong[0])}, wanted {wanted.get(wrong[0])}"
        raise UserError(f"{path} is not GPT-2's tokenizer in {len(wrong):,} tokens: {first}")
    if theirs and _merges_of(theirs) != _merges_of(ours):
        raise UserError(f"{path} has other merges than GPT-2's; wanted GPT-2's tokenizer")
    return path.name


def _merges_of(bpe: Tokenizer) -> list | None:
    return json.loads(bpe.to_str())["model"].get("merges")


def read_json(path: Path) -> dict:
    """The object of a JSON file that a user brings."""
    try:
        return {**json.loads(path.read_bytes())}
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
