"""Loads and saves tokenizers of Hugging Face folders, and makes the byte-level tokenizer of the quickstart."""

from collections.abc import Sequence
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from jaxtrain.hub import local_folder

END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerFast:
    """Load the tokenizer of a Hugging Face folder or of a model on the hub, with its chat template.

    Reads tokenizer.json directly, which needs neither torch nor a tokenizer class of the model. A tokenizer without a
    padding token uses its end-of-sequence token, which is safe because padding is marked by segment ids.

    Raises ValueError for a missing or invalid tokenizer.json.
    """
    folder = local_folder(folder, weights=False)
    if not (folder / "tokenizer.json").is_file():
        raise ValueError(_why_missing(folder))
    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    except (ValueError, KeyError) as error:
        raise ValueError(f"{folder}: the tokenizer cannot be read: {error}") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def add_tokens(tokenizer: PreTrainedTokenizerFast, tokens: Sequence[str], special: bool) -> list[int]:
    """Add the `tokens` that the tokenizer lacks. Returns their ids, which are consecutive."""
    known = tokenizer.get_vocab()
    new = [token for token in tokens if token not in known]
    backend = tokenizer.backend_tokenizer
    add = backend.add_special_tokens if special else backend.add_tokens
    add([AddedToken(token, special=special, normalized=False) for token in new])
    ids = tokenizer.convert_tokens_to_ids(new) if new else []
    assert isinstance(ids, list) and ids == list(range(len(known), len(known) + len(new))), ids
    return ids


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, out: str | Path) -> None:
    """Write a tokenizer and its chat template into a Hugging Face folder."""
    Path(out).mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(out)


def write_byte_tokenizer(out: str | Path) -> PreTrainedTokenizerFast:
    """Write and return a tokenizer of 256 bytes and the three special tokens of ChatML, which encodes any text.

    Its end-of-sequence token <|im_end|> ends both turns and texts, so that a sampler stops after either.
    """
    bytes_in_order = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={token: number for number, token in enumerate(bytes_in_order)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True) for token in (END_OF_TEXT, TURN_START, TURN_END)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=TURN_END,
        pad_token=END_OF_TEXT,
        chat_template=CHATML,
        clean_up_tokenization_spaces=False,
    )
    save_tokenizer(tokenizer, out)
    return tokenizer


def _why_missing(folder: Path) -> str:
    if not folder.is_dir():
        return f"tokenizer folder {folder} does not exist"
    if (folder / "tokenizer.model").is_file():
        return f"{folder} has only a sentencepiece model; save it once with transformers to get a tokenizer.json"
    return f"{folder} has no tokenizer.json; set model.tokenizer to a folder that has one"
