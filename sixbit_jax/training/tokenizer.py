"""The mini model's tokenizer: a T5 Unigram vocabulary in which every word of the caption grammar is one piece."""

import dataclasses

import numpy as np
from jaxtyping import Int

from sixbit_jax.notices import without_torch_notice
from sixbit_jax.training.data import COLOUR_NAMES, DIRECTION_NAMES, JOINER, SPEED_NAMES, caption_table

with without_torch_notice():
    from transformers import T5Tokenizer

PAD_ID, EOS_ID, UNK_ID = 0, 1, 2
MAX_LENGTH = 32

GRAMMAR_WORDS = (
    "a",
    *(str(digit) for digit in range(10)),
    *COLOUR_NAMES,
    "moves",
    *DIRECTION_NAMES,
    *SPEED_NAMES,
    JOINER,
)
"""Every word that a caption can contain."""

VOCABULARY = ("<pad>", "</s>", "<unk>", *(f"▁{word}" for word in GRAMMAR_WORDS))
"""Piece of each id; "▁" marks the start of a word, as in SentencePiece."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CaptionTokens:
    """What `data.compose_token_ids` needs to write captions on the device.

    Attributes:
        phrases: int32 [480, p], ids of the phrases of `data.caption_table`, without the end marker.
        joiner: int32 [j], ids of the word between two phrases.
    """

    phrases: Int[np.ndarray, "480 p"]
    joiner: Int[np.ndarray, " j"]


def build_tokenizer() -> T5Tokenizer:
    """A new tokenizer of the vocabulary above.

    It loads again with `T5Tokenizer.from_pretrained` after `save_pretrained`. Text outside the grammar becomes <unk>,
    one for each run of unknown characters: pieces for single letters would only ever be seen untrained.
    """
    pieces = [(piece, 0.0 if i <= UNK_ID else -1.0) for i, piece in enumerate(VOCABULARY)]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=MAX_LENGTH)


def caption_tokens(tokenizer: T5Tokenizer) -> CaptionTokens:
    """Tokenises every phrase of the grammar and the joiner.

    Raises:
        ValueError: if phrases differ in length, so that they do not form a table.
    """
    phrases = tokenizer(list(caption_table()), add_special_tokens=False).input_ids
    if len(lengths := {len(ids) for ids in phrases}) != 1:
        raise ValueError(f"the tokenizer splits phrases into different numbers of tokens: {sorted(lengths)}")
    joiner = tokenizer(JOINER, add_special_tokens=False).input_ids
    return CaptionTokens(phrases=np.asarray(phrases, np.int32), joiner=np.asarray(joiner, np.int32))
