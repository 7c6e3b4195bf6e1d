import numpy as np
import pytest
from published_folder import CONFIGS

from convert.components import MODELS, abstract_state
from convert.engine import dotted, slots_of
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
