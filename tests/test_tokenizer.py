"""Token ids: sentencepiece's, with the end token, cut and padded as transformers does it."""

from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st

from mlx_audio_native.errors import InputError, TokenizerError
from mlx_audio_native.tokenizer import Tokenizer

LENGTH = 12


@pytest.fixture(scope="module")
def tokenizer(spiece: Path) -> Tokenizer:
    return Tokenizer(spiece, LENGTH)


@pytest.fixture(scope="module")
def pieces(spiece: Path) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(spiece))


texts = st.lists(st.sampled_from(["kick", "snare drum", "F#", " ", "\t", "\n", "é", "☃", "日本", "120", "x"])).map(
    "".join
)


@given(st.lists(texts, min_size=1, max_size=4))
def test_ids_end_and_padding(tokenizer, pieces, batch):
    ids, mask = tokenizer.encode(batch)
    assert ids.shape == mask.shape == (len(batch), LENGTH)
    for text, row, real in zip(batch, ids, mask, strict=True):
        tokens = [*pieces.encode(text)[: LENGTH - 1], 1]
        assert row.tolist() == tokens + [0] * (LENGTH - len(tokens))
        assert real.tolist() == [1] * len(tokens) + [0] * (LENGTH - len(tokens))


@given(texts)
def test_what_is_cut_is_the_end_of_the_text(tokenizer, pieces, text):
    tokens = pieces.encode(text)
    cut = tokenizer.find_cut(text, LENGTH)
    assert bool(cut) == bool(pieces.decode(tokens[LENGTH - 1 :]))
    assert pieces.decode(tokens).endswith(cut)


def test_cut_words(tokenizer):
    assert tokenizer.find_cut("kick drum", LENGTH) == ""
    assert tokenizer.find_cut("kick snare drum loop sine tone saw bass square lead", LENGTH).endswith("lead")


def test_special_tokens_in_a_text_are_themselves(tokenizer, pieces):
    """As transformers' T5Tokenizer: split there, and no second end token."""
    ids, mask = tokenizer.encode(["x<unk>x</s>"])
    expected = [*pieces.encode("x"), 2, *pieces.encode("x"), 1]
    assert ids[0, : len(expected)].tolist() == expected
    assert mask.sum() == len(expected)


def test_empty_text_is_the_end_token(tokenizer):
    ids, mask = tokenizer.encode([""])
    assert (ids[0, 0], mask.sum()) == (1, 1)


@pytest.mark.parametrize("text", ["\ud800", None, 3, b"kick"])
def test_no_text(tokenizer, text):
    with pytest.raises(InputError, match="must be a string"):
        tokenizer.encode([text])


def test_damaged_files(spiece: Path, tmp_path: Path):
    whole = spiece.read_bytes()
    path = tmp_path / "spiece.model"
    for damaged in (b"", b"not a model", whole[: len(whole) // 2]):
        path.write_bytes(damaged)
        with pytest.raises(TokenizerError, match="sentencepiece model"):
            Tokenizer(path)
    with pytest.raises(TokenizerError, match="cannot read"):
        Tokenizer(tmp_path / "none.model")
    with pytest.raises(TokenizerError, match="cannot read"):
        Tokenizer(tmp_path)


def test_a_vocabulary_of_another_kind(tmp_path: Path):
    """sentencepiece's own defaults put <unk> first and have no padding."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["kick snare drum"] * 5),
        model_prefix=str(tmp_path / "other"),
        vocab_size=20,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    with pytest.raises(TokenizerError, match="no T5 vocabulary"):
        Tokenizer(tmp_path / "other.model")
