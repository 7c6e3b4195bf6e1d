import jax
import jax.numpy as jnp
import numpy as np
import pytest
from transformers import AutoTokenizer, T5Tokenizer

from sixbit_jax.training import data
from sixbit_jax.training.tokenizer import (
    EOS_ID,
    GRAMMAR_WORDS,
    MAX_LENGTH,
    PAD_ID,
    UNK_ID,
    VOCABULARY,
    build_tokenizer,
    caption_tokens,
)

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


def test_every_grammar_word_is_one_token(tokenizer):
    ids = tokenizer(" ".join(GRAMMAR_WORDS)).input_ids
    assert ids == [*range(3, 3 + len(GRAMMAR_WORDS)), EOS_ID]
    assert len(tokenizer) == len(VOCABULARY)
    assert {w for text in data.caption_table() for w in text.split()} | {data.JOINER} == set(GRAMMAR_WORDS)


def test_special_ids_are_those_of_t5(tokenizer):
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (PAD_ID, EOS_ID, UNK_ID)
    assert tokenizer("", padding="max_length", max_length=4).input_ids == [EOS_ID, PAD_ID, PAD_ID, PAD_ID]


def test_text_outside_the_grammar_becomes_one_unknown_per_run(tokenizer):
    known = tokenizer("a red 3 moves left").input_ids
    assert tokenizer("a crimson 3 moves left").input_ids == [known[0], UNK_ID, *known[2:]]
    assert tokenizer("a red 3, moves left").input_ids == [*known[:3], UNK_ID, *known[3:]]


@pytest.mark.parametrize("cls", [T5Tokenizer, AutoTokenizer])
def test_loads_again_from_a_folder(tokenizer, tmp_path, cls):
    tokenizer.save_pretrained(tmp_path)
    loaded = cls.from_pretrained(tmp_path)
    assert isinstance(loaded, T5Tokenizer)
    texts = ["a red 3 moves left slowly and a blue 7 moves up fast", "a crimson 12, moving", ""]
    options = {"padding": "max_length", "max_length": MAX_LENGTH, "truncation": True}
    assert loaded(texts, **options).input_ids == tokenizer(texts, **options).input_ids
    assert loaded.model_max_length == MAX_LENGTH
    assert loaded.decode(loaded(texts[0]).input_ids, skip_special_tokens=True) == texts[0]


def test_captions_composed_on_the_device_are_what_the_tokenizer_says(tokenizer):
    table = caption_tokens(tokenizer)
    digits, labels = jnp.zeros((10, 28, 28), jnp.uint8), jnp.arange(10)
    scene = data.sample_batch(jax.random.key(0), digits, labels, 16, two_digits=0.5).scene
    found = data.compose_token_ids(
        scene,
        jnp.asarray(table.phrases),
        jnp.asarray(table.joiner),
        length=MAX_LENGTH,
        eos_id=EOS_ID,
        pad_id=PAD_ID,
    )
    wanted = tokenizer(data.captions(scene), padding="max_length", max_length=MAX_LENGTH).input_ids
    np.testing.assert_array_equal(found, wanted)
    assert set(np.asarray(scene.count).tolist()) == {1, 2}


def test_a_tokenizer_with_ragged_phrases_is_refused():
    pieces = [piece for piece in VOCABULARY if piece != "▁red"] + ["▁re", "d"]
    ragged = T5Tokenizer(vocab=[(piece, -1.0) for piece in pieces], extra_ids=0)
    with pytest.raises(ValueError, match=r"different numbers of tokens: \[6, 7\]"):
        caption_tokens(ragged)
