"""Trains the demo model's sentencepiece model on its captions, case folded, digits and sharps pieces of their own."""

from __future__ import annotations

import io
import random
import string
from pathlib import Path

from golden import sounds

VOCABULARY = 192


def train(captions: int = 20_000, seed: int = 0) -> bytes:
    """A unigram model with T5's special ids (pad 0, eos 1, unk 2), as the bytes of a spiece.model."""
    import sentencepiece

    rng = random.Random(seed)
    lines = [sounds.caption(sounds.draw(rng, captioned=True), rng) for _ in range(captions)]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        model_type="unigram",
        vocab_size=VOCABULARY,
        hard_vocab_limit=False,
        normalization_rule_name="nmt_nfkc_cf",
        # any English word can be spelled, so that an unknown one is not one unknown token
        required_chars=string.ascii_lowercase + "".join(sorted(set(string.punctuation) - {"+", "-"})),
        user_defined_symbols=[
            *string.digits,
            *(name.lower() for name in sounds.PITCH_CLASSES if "#" in name),
            "+",
            "-",
        ],
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    return model.getvalue()


def pieces(spiece: Path) -> int:
    """How many pieces a spiece.model has."""
    import sentencepiece

    return sentencepiece.SentencePieceProcessor(model_file=str(spiece)).vocab_size()
