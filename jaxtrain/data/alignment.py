"""Two tokenisations of one text, aligned by the bytes that their tokens write.

A group is the smallest run of tokens of either that ends at the same byte, as in GOLD (Patiño et al. 2025, Hugging
Face; TRL's `GOLDTrainer`). There the ends are offsets into the text; here they follow from what the tokens themselves
write. So ids that no tokenizer would choose for their text, as a model samples them, are aligned as well, and so are
characters that are split over several tokens.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerFast

from jaxtrain.data.packing import trained_spans
from jaxtrain.types import Example

_Ids = Sequence[int] | np.ndarray
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SHOWN = 40  # bytes of a text in an error


class Groups(NamedTuple):
    """Aligned runs of tokens: places [G, 2] int64 of the first one and after the last one, ascending."""

    student: np.ndarray
    teacher: np.ndarray

    def within(self, length: int) -> Groups:
        """Without the groups that reach beyond so many tokens, or hold a first token, which nothing predicts."""
        kept = np.ones(len(self.student), bool)
        for places in self:
            kept &= (places[:, 0] > 0) & (places[:, 1] <= length)
        return Groups(self.student[kept], self.teacher[kept])

    @classmethod
    def none(cls) -> Groups:
        return cls(*np.zeros((2, 0, 2), np.int64))


class Written(NamedTuple):
    """What tokens write, as far as it is text."""

    text: str
    tokens: int  # so many of them write it, or end it
    ended: bool  # whether a special token ends it


class TokenBytes:
    """What each token of a tokenizer writes."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast):
        """Raises ValueError for a tokenizer whose decoder is neither byte-level nor SentencePiece's."""
        added = tokenizer.added_tokens_decoder
        write = _writer(tokenizer)
        self._bytes = {number: write(token) for token, number in tokenizer.get_vocab().items() if number not in added}
        self._bytes |= {number: token.content.encode() for number, token in added.items()}
        self._begin = tokenizer.bos_token_id
        self._special = {number for number, token in added.items() if token.special}
        self._special |= {tokenizer.eos_token_id} if isinstance(tokenizer.eos_token_id, int) else set()

    def content(self, ids: _Ids) -> tuple[int, int]:
        """The places of the tokens between a beginning-of-sequence token and a special token that ends the ids."""
        stop = len(ids) - (len(ids) > 0 and int(ids[-1]) in self._special)
        return int(stop > 0 and int(ids[0]) == self._begin), stop

    def of(self, ids: _Ids) -> list[bytes]:
        """An id that the tokenizer lacks, such as the padding of a vocabulary, writes nothing."""
        return [self._bytes.get(int(number), b"") for number in ids]


class Aligner:
    """Aligns tokens of two tokenizers. Raises ValueError for a tokenizer whose tokens' bytes are not known."""

    def __init__(self, student: PreTrainedTokenizerFast, teacher: PreTrainedTokenizerFast):
        tables = []
        for role, tokenizer in (("student", student), ("teacher", teacher)):
            try:
                tables.append(TokenBytes(tokenizer))
            except ValueError as error:
                raise ValueError(f"the {role}'s tokenizer cannot be aligned: {error}") from None
        self._student, self._teacher = tables

    def examples(self, student: Example, teacher: Example) -> Groups:
        """The groups of the trained tokens of two examples, whose answers are the same.

        Raises ValueError where their numbers or their texts differ.
        """
        spans = [trained_spans(example.loss_weights) for example in (student, teacher)]
        if len(spans[0]) != len(spans[1]):
            raise ValueError(
                f"{len(spans[0])} runs of tokens are trained under the student's chat template, and {len(spans[1])} "
                "under the teacher's"
            )
        found = [Groups.none()]
        for number, (mine, other) in enumerate(zip(*spans, strict=True)):
            try:
                groups = self.ids(
                    np.asarray(student.input_ids)[slice(*mine)], np.asarray(teacher.input_ids)[slice(*other)]
                )
            except ValueError as error:
                raise ValueError(f"answer {number + 1} of the row: {error}") from None
            found.append(Groups(groups.student + mine[0], groups.teacher + other[0]))
        return Groups(*(np.concatenate(places) for places in zip(*found, strict=True)))

    def written(self, student: _Ids) -> Written:
        """The text of the student's tokens, up to the first one that writes bytes that are no UTF-8."""
        start, stop = self._student.content(student)
        tokens = self._student.of(student[start:stop])
        count = len(tokens)
        while True:
            try:
                text = b"".join(tokens[:count]).decode()
            except UnicodeDecodeError as error:
                count = int(np.cumsum([len(token) for token in tokens[:count]]).searchsorted(error.start, "right"))
                continue
            complete = count == len(tokens)
            return Written(text, len(student) if complete else start + count, complete and stop < len(student))

    def ids(self, student: _Ids, teacher: _Ids) -> Groups:
        """The groups of the tokens of one answer. The special token that ends one goes with that of the other.

        Text of white space at either end that only one of the two has is in no group. Raises ValueError where the texts
        differ otherwise.
        """
        places = self._student.content(student), self._teacher.content(teacher)
        texts = [
            table.of(ids[slice(*content)])
            for table, ids, content in zip((self._student, self._teacher), (student, teacher), places, strict=True)
        ]
        groups = [side + begin for side, (begin, _) in zip(align_texts(*texts), places, strict=True)]
        ends = [stop for _, stop in places]
        if ends[0] < len(student) and ends[1] < len(teacher):
            groups = [np.append(side, [[end, end + 1]], 0) for side, end in zip(groups, ends, strict=True)]
        return Groups(*groups)


def align_texts(student: Sequence[bytes], teacher: Sequence[bytes]) -> Groups:
    """The groups of the tokens that write one text. Raises ValueError where they write different ones."""
    texts = [b"".join(tokens) for tokens in (student, teacher)]
    core, offsets = texts[0], [0, 0]
    if texts[0] != texts[1]:
        core = texts[0].strip()
        if core != texts[1].strip():
            raise _different(*texts)
        offsets = [len(text) - len(text.lstrip()) for text in texts]
    ends = [
        np.clip(np.cumsum([len(token) for token in tokens], dtype=np.int64) - offset, 0, len(core))
        for tokens, offset in zip((student, teacher), offsets, strict=True)
    ]
    common = np.intersect1d(ends[0], ends[1])
    common = common[common > 0]
    before = np.concatenate([[0], common])[:-1]
    return Groups(*(np.stack([side.searchsorted(before, "right"), side.searchsorted(common) + 1], 1) for side in ends))


def group_log_ratios(groups: Groups, student_logps: np.ndarray, teacher_logps: np.ndarray) -> np.ndarray:
    """log q - log p of each group, spread evenly over the student's tokens: [n] float32, 0 outside of groups.

    q and p are the probabilities that the teacher [m] and the student [n] give to the text of the group after the text
    before it, the products over its tokens. This is the advantage of a token in on-policy distillation with another
    tokenizer: of groups of one token it is log q - log p of the token, and its sum over an answer is that of the text,
    minus a sample of the reverse KL.
    """
    ratios = np.zeros(len(student_logps), np.float32)
    for (start, stop), (first, last) in zip(groups.student, groups.teacher, strict=True):
        ratio = np.sum(teacher_logps[first:last]) - np.sum(student_logps[start:stop])
        ratios[start:stop] = ratio / (stop - start)
    return ratios


def _writer(tokenizer: PreTrainedTokenizerFast) -> Any:
    """A function of the vocabulary's tokens -> the bytes that they write within a text."""
    spec = json.loads(tokenizer.backend_tokenizer.to_str())["decoder"] or {}
    steps = spec["decoders"] if spec.get("type") == "Sequence" else [spec]
    kinds = {step.get("type") for step in steps}
    if "ByteLevel" in kinds:
        byte_of = _bytes_of_characters()
        return lambda token: b"".join(byte_of[char] if char in byte_of else char.encode() for char in token)
    spaces = [step["pattern"].get("String") for step in steps if step.get("type") == "Replace"]
    spaces += [step["replacement"] for step in steps if step.get("type") == "Metaspace"]
    if len(spaces) != 1 or spaces[0] is None or not kinds <= {"Replace", "Metaspace", "ByteFallback", "Fuse", "Strip"}:
        raise ValueError(
            f"its decoder, {' + '.join(sorted(map(str, kinds)))}, is neither byte-level nor SentencePiece's, so the "
            "bytes of a token are not known"
        )

    def write(token: str) -> bytes:
        found = _BYTE_TOKEN.fullmatch(token) if "ByteFallback" in kinds else None
        return bytes([int(found[1], 16)]) if found else token.replace(spaces[0], " ").encode()

    return write


def _bytes_of_characters() -> dict[str, bytes]:
    """GPT-2's characters of the 256 bytes: those that print are unchanged, the others follow 255 in order."""
    printed = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printed]
    return {chr(byte): bytes([byte]) for byte in printed} | {
        chr(256 + number): bytes([byte]) for number, byte in enumerate(others)
    }


def _different(student: bytes, teacher: bytes) -> ValueError:
    length = min(len(student), len(teacher))
    at = next((place for place in range(length) if student[place] != teacher[place]), length)
    shown = [text[max(at - _SHOWN // 2, 0) :][:_SHOWN].decode(errors="replace") for text in (student, teacher)]
    return ValueError(
        f"the student's tokens write {shown[0]!r} and the teacher's {shown[1]!r}, which differ from byte {at} on: the "
        "text of an answer must be the same under both chat templates and tokenizers; data.prompt_format=plain has no "
        "template, and data.on_bad_row=skip leaves such rows out"
    )
