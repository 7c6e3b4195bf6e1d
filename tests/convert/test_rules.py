import dataclasses
import re

import hypothesis
import jax
import numpy as np
import pytest
from hypothesis import strategies as st
from published_folder import CONFIGS

from convert.components import MODELS, abstract_state
from convert.engine import assemble, dotted, slots_of, to_diffusers
from convert.rules import Rule, ours_shape, published_shape, to_ours, to_published
from convert.rules_transformer import published_shapes
from sixbit_jax.config import TransformerConfig


@pytest.mark.parametrize("name", MODELS)
def test_every_rule_runs_backwards(name):
    """Path -> published key -> path, for every slot of every parameter, by the rule that matches first."""
    rules = MODELS[name].rules
    keys = set()
    for path, leaf in dotted(abstract_state(MODELS[name], CONFIGS[name])).items():
        for slot in slots_of(path, tuple(leaf.shape), rules).values():
            rule = next(rule for rule in rules if rule.pattern.fullmatch(slot.key))
            match = rule.pattern.fullmatch(slot.key)
            assert match.expand(rule.target) == path
            assert (int(match[rule.index]) if rule.index else None) == slot.index
            assert slot.key not in keys
            keys.add(slot.key)


def test_released_transformers_have_the_published_number_of_parameters():
    """The numbers are those of diffusers' own modules for the same configurations."""
    for config, count in (
        (TransformerConfig.cogvideox_2b(), 1_693_783_872),
        (TransformerConfig.cogvideox_5b(), 5_570_283_072),
        (TransformerConfig.cogvideox_1_5_5b(), 5_570_676_352),
    ):
        state = dotted(abstract_state(MODELS["transformer"], config))
        assert sum(int(np.prod(leaf.shape)) for leaf in state.values()) == count


@pytest.mark.parametrize(
    ("layout", "shape"),
    [("same", (3, 4)), ("linear", (3, 4)), ("linear", (3,)), ("conv", (3, 4, 1, 2, 5)), ("conv", (3, 4, 2, 5))],
)
def test_layouts_invert(layout, shape):
    x = np.arange(np.prod(shape)).reshape(shape)
    ours = to_ours(layout, x)
    assert ours.shape == ours_shape(layout, shape)
    assert published_shape(layout, ours.shape) == shape
    np.testing.assert_array_equal(to_published(layout, ours), x)


def test_layouts_by_hand():
    x = np.arange(3 * 4 * 2 * 2).reshape(3, 4, 2, 2)
    np.testing.assert_array_equal(to_ours("linear", x[:, :, 0, 0]), x[:, :, 0, 0].T)
    np.testing.assert_array_equal(to_ours("conv", x), x.transpose(2, 3, 1, 0))
    np.testing.assert_array_equal(to_ours("patch", x)[:, 1], x[1].ravel())
    np.testing.assert_array_equal(to_ours("patch", x.reshape(3, 16)), to_ours("patch", x))


def test_published_patches_are_a_convolution_only_without_temporal_patches():
    assert published_shapes(TransformerConfig.cogvideox_2b()) == {"patch_embed.proj.weight": (1920, 16, 2, 2)}
    assert published_shapes(TransformerConfig.cogvideox_1_5_5b()) == {}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"source": "a", "target": "b", "layout": "transposed"}, "layout 'transposed'"),
        ({"source": "a", "target": "b", "part": (3, 3)}, r"part \(3, 3\)"),
        ({"source": "a", "target": "b", "index": "i"}, "no group 'i'"),
        ({"source": r"a\.(?P<x>\d+)", "target": "b"}, r"groups \['x'\], of which the target uses \[\]"),
        ({"source": "a.b", "target": "b"}, "neither literal"),
        ({"source": r"a\d", "target": "b"}, "neither literal"),
    ],
)
def test_rules_that_cannot_be_run_backwards_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Rule(**arguments)


PLAIN = st.text("ab._-+ ", min_size=1, max_size=4)
VALUES = {r"\d+": st.integers(0, 10**6).map(str), r"x|yy?|z{2}": st.sampled_from(["x", "y", "yy", "zz"])}


@hypothesis.settings(derandomize=True, deadline=None, database=None, max_examples=100)
@hypothesis.given(data=st.data())
def test_any_rule_runs_backwards(data):
    """Literal text and groups in any number and order: key -> path and index -> key."""
    patterns = data.draw(st.lists(st.sampled_from(list(VALUES)), min_size=1, max_size=3))
    values = [data.draw(VALUES[pattern]) for pattern in patterns]
    texts = [data.draw(PLAIN) for _ in patterns]
    names = [f"g{i}" for i in range(len(patterns))]
    parts = zip(texts, names, patterns, strict=True)
    source = "".join(re.escape(text) + f"(?P<{name}>{pattern})" for text, name, pattern in parts)
    numbered = [name for name, pattern in zip(names, patterns, strict=True) if pattern == r"\d+"]
    index = data.draw(st.sampled_from([None, *numbered]))
    target = "".join(rf"to.\g<{name}>" for name in data.draw(st.permutations(names)) if name != index) or "to"
    rule = Rule(source=source, target=target, index=index)
    key = "".join(text + value for text, value in zip(texts, values, strict=True))
    match = rule.pattern.fullmatch(key)
    assert match is not None
    assert rule.key_for(match.expand(target), int(match[index]) if index else 0) == key
    assert rule.key_for("from" + match.expand(target)) is None


@pytest.mark.parametrize("name", MODELS)
@hypothesis.settings(derandomize=True, deadline=None, database=None, max_examples=4)
@hypothesis.given(data=st.data())
def test_models_of_any_size_are_published_and_read_again(name, data):
    """Every value comes back to its place; names of the published tensors are distinct."""
    few, flag = st.integers(1, 3), st.booleans()
    changes = {
        "transformer": {
            "num_layers": few,
            "num_attention_heads": few,
            "in_channels": st.sampled_from([2, 4]),
            "patch_size_t": st.sampled_from([None, 2]),
            "ofs_embed_dim": st.sampled_from([None, 6]),
            "attention_bias": flag,
            "use_rotary_positional_embeddings": flag,
        },
        "vae": {"layers_per_block": few, "latent_channels": few, "use_quant_conv": flag, "use_post_quant_conv": flag},
        "text_encoder": {"num_layers": few, "num_heads": few, "d_ff": st.integers(1, 9), "vocab_size": few},
    }[name]
    config = dataclasses.replace(CONFIGS[name], **{field: data.draw(values) for field, values in changes.items()})
    abstract, rules = abstract_state(MODELS[name], config), MODELS[name].rules
    rng = np.random.default_rng(0)
    state = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape, np.float32), abstract)
    shapes = published_shapes(config) if name == "transformer" else {}
    pairs = list(to_diffusers(state, rules, shapes))
    published = dict(pairs)
    assert len(published) == len(pairs)
    found = dotted(assemble(published, rules, abstract))
    for path, wanted in dotted(state).items():
        np.testing.assert_array_equal(found[path], wanted)
