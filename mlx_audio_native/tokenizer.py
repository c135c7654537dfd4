"""Texts to T5's token ids, as transformers' T5Tokenizer gives them (without its sentinels)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import sentencepiece

from .errors import InputError, TokenizerError

_SPECIAL = {"<pad>": 0, "</s>": 1, "<unk>": 2}
_PAD, _EOS = _SPECIAL["<pad>"], _SPECIAL["</s>"]


class Tokenizer:
    """A T5 vocabulary from a `spiece.model`, giving `length` tokens a text. Raises TokenizerError."""

    def __init__(self, path: Path | str, length: int = 128) -> None:
        self.length = length
        try:
            # an empty model would be taken for none, and found out at the first text
            self._pieces = sentencepiece.SentencePieceProcessor(model_proto=Path(path).read_bytes() or b"empty")
        except OSError as error:
            raise TokenizerError(f"cannot read {path}: {error.strerror or error}") from None
        except RuntimeError:
            raise TokenizerError(f"{path} is not a sentencepiece model, or is damaged") from None
        found = [self._pieces.piece_to_id(piece) for piece in _SPECIAL]
        if found != list(_SPECIAL.values()):
            expected = ", ".join(f"{piece} as {id_}" for piece, id_ in _SPECIAL.items())
            raise TokenizerError(f"{path} is no T5 vocabulary: it should have {expected}, and has {found}")

    def __len__(self) -> int:
        """Pieces in the vocabulary; every id is below."""
        return self._pieces.get_piece_size()

    def encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Texts to ids and mask, int32 (B, length): tokens, end token, padding; a longer text keeps its first tokens.

        Raises InputError.
        """
        ids = np.full((len(texts), self.length), _PAD, np.int32)
        mask = np.zeros_like(ids)
        for row, text in enumerate(texts):
            tokens = self._tokenize(text)[: self.length - 1]
            if tokens[-1:] != [_EOS]:
                tokens.append(_EOS)
            ids[row, : len(tokens)] = tokens
            mask[row, : len(tokens)] = 1
        return ids, mask

    def find_cut(self, text: str, heard: int) -> str:
        """The end of a text that is not among the first `heard` tokens that `encode` gives; empty if all of it is."""
        return self._pieces.decode(self._tokenize(text)[min(heard, self.length - 1) :])

    def _tokenize(self, text: str) -> list[int]:
        try:
            text.encode()
        except (AttributeError, UnicodeEncodeError):
            raise InputError(f"a text must be a string of valid characters, found {text!r:.60}") from None
        tokens: list[int] = []
        # a special token spelled out in the text is that token, as in transformers
        for span in re.split(f"({'|'.join(_SPECIAL)})", text):
            tokens += [_SPECIAL[span]] if span in _SPECIAL else self._pieces.encode(span)
        return tokens
