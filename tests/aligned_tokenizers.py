"""Tokenizers of different kinds for one text, and texts that they split differently."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import chat_templates
from tokenizers import Tokenizer, decoders, models, normalizers, trainers
from transformers import PreTrainedTokenizerFast

from converters.tokenizer import write_byte_tokenizer

TEXTS = [
    "The capital of France is Paris.",
    "Zo\u00eb paid 12 \u20ac for na\u00efve caf\u00e9s\n\n  and 3 more.",
    "\u6771\u4eac\u306f\u65e5\u672c\u306e\u9996\u90fd \U0001f469\U0001f3fd\u200d\U0001f680\U0001f600!",
    "e\u0301 \t\t tabs, <think> and    spaces    .",
    "x",
]
_CORPUS = [*chat_templates._CORPUS[:2], "caf\u00e9 na\u00efve \u6771\u4eac"] * 8


def pieces(template: str | None = chat_templates.CHATML) -> PreTrainedTokenizerFast:
    """Byte-level BPE with merges, as GPT-2's."""
    return chat_templates.tokenizer(template, eos_token="<|im_end|>")


def characters(folder: Path) -> PreTrainedTokenizerFast:
    """Byte-level without merges."""
    return write_byte_tokenizer(folder)


@cache
def _sentencepiece_json() -> str:
    backend = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=special, show_progress=False)
    backend.train_from_iterator(_CORPUS, trainer)
    spec = json.loads(backend.to_str())
    vocab = spec["model"]["vocab"]
    spec["model"]["vocab"] = vocab | {f"<0x{byte:02X}>": len(vocab) + byte for byte in range(256)}
    return json.dumps(spec)


def sentencepiece(template: str | None = chat_templates.MISTRAL) -> PreTrainedTokenizerFast:
    """A space before the text, spaces within tokens, bytes for unknown characters, as Llama 2's."""
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_sentencepiece_json()),
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        chat_template=template,
        clean_up_tokenization_spaces=False,
    )
