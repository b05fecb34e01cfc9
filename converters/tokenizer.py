"""Loads and saves tokenizers of Hugging Face folders, and makes the byte-level tokenizer of the quickstart."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from converters.errors import ConversionError
from converters.json_files import read_json_object
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

    Raises ValueError for a missing or invalid tokenizer.json, tokenizer_config.json or special_tokens_map.json.
    """
    folder = local_folder(folder, weights=False)
    if not (folder / "tokenizer.json").is_file():
        raise ValueError(_why_missing(folder))
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (folder / name).is_file():
            _check_tokenizer_config(folder / name)
    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    except Exception as error:  # the tokenizers library raises plain Exceptions for a malformed file
        raise ValueError(f"{folder}: the tokenizer cannot be read: {error}") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _check_tokenizer_config(file: Path) -> None:
    """Raises ConversionError naming a key whose value transformers would fail on later, or read otherwise."""
    content = read_json_object(file)
    template = () if (file.parent / "chat_template.jinja").is_file() else ("chat_template",)  # it is read instead
    for key in (*_SPECIAL_TOKENS, *template, "added_tokens_decoder"):
        value = content.get(key)
        fits, words = _FORMS.get(key, _FORMS["token"])
        if value is not None and not fits(value):
            raise ConversionError(f"{file}: {key} must be {words}, not {str(value)[:80]!r}")


def _is_token(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, dict) and isinstance(value.get("content"), str))


def _is_template(value: Any) -> bool:
    named = value if isinstance(value, list) else []
    return isinstance(value, str) or (
        bool(named)
        and all(
            isinstance(each, dict) and {type(each.get(key)) for key in ("name", "template")} == {str} for each in named
        )
    )


def _is_added_tokens(value: Any) -> bool:
    return isinstance(value, dict) and all(
        key.isascii() and key.isdigit() and isinstance(token, dict) and _is_token(token) for key, token in value.items()
    )


_SPECIAL_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")
_FORMS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "token": (_is_token, "a token or an object with its content"),
    "chat_template": (_is_template, "a template or a list of objects with name and template"),
    "added_tokens_decoder": (_is_added_tokens, "an object of tokens by their ids"),
}


def end_token_ids(content: Mapping[str, Any], file: str | Path) -> list[int]:
    """The `eos_token_id` of a generation_config.json or config.json: none, one, or several.

    Raises ConversionError, naming the file, for a value that is no token id and no list of them.
    """
    value = content.get("eos_token_id")
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(type(token) is int and 0 <= token < 2**31 for token in ids):
        raise ConversionError(f"{file}: eos_token_id must be a token id or a list of them, not {str(value)[:80]}")
    return list(ids)


def add_tokens(tokenizer: PreTrainedTokenizerFast, tokens: Sequence[str], special: bool) -> list[int]:
    """Add the `tokens` that the tokenizer lacks. Returns their ids, which are consecutive."""
    known = tokenizer.get_vocab()
    new = [token for token in tokens if token not in known]
    backend = tokenizer.backend_tokenizer
    add = backend.add_special_tokens if special else backend.add_tokens
    add([AddedToken(token, special=special, normalized=False) for token in new])
    ids = tokenizer.convert_tokens_to_ids(new) if new else []
    assert isinstance(ids, list) and ids == list(range(len(known), len(known) + len(new))), ids
    return list(ids)


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
