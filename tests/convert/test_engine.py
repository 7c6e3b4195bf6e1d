import jax
import ml_dtypes
import numpy as np
import pytest

from convert.engine import assemble, plan, to_diffusers
from convert.errors import ConversionError
from convert.rules import Rule

RULES = (
    Rule(source=r"position_ids", target=""),
    Rule(source=r"proj\.weight", target="proj.kernel", layout="patch"),
    Rule(source=r"layer\.(?P<i>\d+)\.q\.weight", target="blocks.qk.kernel", layout="linear", index="i", part=(0, 2)),
    Rule(source=r"layer\.(?P<i>\d+)\.k\.weight", target="blocks.qk.kernel", layout="linear", index="i", part=(1, 2)),
    Rule(source=r"(?P<name>in|out)\.norm\.weight", target=r"\g<name>.scale"),
)


def shape(*sizes):
    return jax.ShapeDtypeStruct(sizes, np.float32)


ABSTRACT = {
    "proj": {"kernel": shape(8, 3)},
    "blocks": {"qk": {"kernel": shape(2, 4, 6)}},
    "in": {"scale": shape(5)},
    "out": {"scale": shape(5)},
}


def tensors(dtype=np.float32):
    shapes = {
        "proj.weight": (3, 2, 2, 2),
        **{f"layer.{i}.{x}.weight": (3, 4) for i in range(2) for x in "qk"},
        "in.norm.weight": (5,),
        "out.norm.weight": (5,),
        "position_ids": (1, 7),
    }
    rng = np.random.default_rng(0)
    return {key: rng.standard_normal(size).astype(dtype) for key, size in shapes.items()}


def test_stacked_fused_and_patched_parameters_by_hand():
    source = tensors()
    out = assemble(source, RULES, ABSTRACT)
    for i in range(2):
        both = np.concatenate([source[f"layer.{i}.q.weight"].T, source[f"layer.{i}.k.weight"].T], axis=-1)
        np.testing.assert_array_equal(out["blocks"]["qk"]["kernel"][i], both)
    np.testing.assert_array_equal(out["proj"]["kernel"], source["proj.weight"].reshape(3, 8).T)
    np.testing.assert_array_equal(out["in"]["scale"], source["in.norm.weight"])


def test_export_is_the_inverse():
    source = tensors()
    out = dict(to_diffusers(assemble(source, RULES, ABSTRACT), RULES, {"proj.weight": (3, 2, 2, 2)}))
    assert out.keys() == source.keys() - {"position_ids"}
    for key, array in out.items():
        assert array.flags.c_contiguous
        np.testing.assert_array_equal(array, source[key])


def test_everything_that_is_wrong_is_listed_at_once():
    source = tensors()
    del source["layer.1.k.weight"], source["out.norm.weight"]
    source |= {
        "in.norm.weight": np.zeros(6, np.float32),
        "layer.0.q.weight": np.zeros((4, 3), np.float32),
        "layer.2.q.weight": np.zeros((3, 4), np.float32),
        "layer.00.k.weight": np.zeros((3, 4), np.float32),
        "head.weight": np.zeros((2, 2), np.float32),
    }
    with pytest.raises(ConversionError) as caught:
        assemble(source, RULES, ABSTRACT)
    assert str(caught.value).splitlines() == [
        "tensors: 7 problems; nothing was converted",
        "  ! wrong      in.norm.weight (tensors): found [6], wanted [5]",
        "  ! wrong      layer.0.q.weight (tensors): found [4, 3], wanted [3, 4]",
        "  - missing    layer.1.k.weight (tensors): wanted [3, 4]",
        "  - missing    out.norm.weight (tensors): wanted [5]",
        "  + unexpected head.weight (tensors): found [2, 2]",
        "  + unexpected layer.00.k.weight (tensors): found [3, 4]",
        "  + unexpected layer.2.q.weight (tensors): found [3, 4]",
    ]


def test_dtypes_are_kept_or_cast():
    half = tensors(ml_dtypes.bfloat16)
    kept = assemble(half, RULES, ABSTRACT)
    assert kept["proj"]["kernel"].dtype == ml_dtypes.bfloat16
    half["layer.0.k.weight"] = half["layer.0.k.weight"].astype(np.float16)
    mixed = assemble(half, RULES, ABSTRACT)
    assert mixed["blocks"]["qk"]["kernel"].dtype == np.float32
    assert mixed["in"]["scale"].dtype == ml_dtypes.bfloat16
    for dtype in (np.float32, np.float16, ml_dtypes.bfloat16):
        cast = assemble(tensors(), RULES, ABSTRACT, dtype)
        np.testing.assert_array_equal(cast["in"]["scale"], tensors()["in.norm.weight"].astype(dtype))
        assert cast["in"]["scale"].dtype == dtype


@pytest.mark.parametrize("source_dtype", [np.float32, ml_dtypes.bfloat16])
def test_a_value_that_float16_cannot_hold_is_an_error(source_dtype):
    source = tensors(source_dtype)
    source["in.norm.weight"][2] = 1e6
    with pytest.raises(ConversionError, match=r"in\.norm\.weight .*found 1 values beyond 65504"):
        assemble(source, RULES, ABSTRACT, np.float16)


@pytest.mark.parametrize(
    "rules",
    [RULES[:3] + RULES[4:], RULES[:4], (*RULES[:3], Rule(source="k", target="blocks.qk.kernel"), RULES[4])],
    ids=["half of the parts", "nothing", "stacked and not"],
)
def test_a_table_that_does_not_cover_the_model_is_a_mistake(rules):
    with pytest.raises(ValueError, match="do not cover"):
        plan(tensors(), rules, ABSTRACT)
