import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from published_folder import CONFIGS, SCHEDULER, edit_json, modules, same_bits, write

from convert import convert, store
from convert.errors import CheckpointError, ConversionError
from convert.readers import LazyTensor
from sixbit_jax import Pipeline, checkpoint

pytestmark = pytest.mark.usefixtures("quick_compilation")

SENTENCE = "a red 3 moves left slowly"
MODELS = tuple(CONFIGS)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    return write(tmp_path_factory.mktemp("published") / "model")


@pytest.fixture(scope="module")
def ours(published, tmp_path_factory):
    return convert(published, tmp_path_factory.mktemp("ours") / "model", progress=False)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, "float16"])
def test_both_kinds_load_the_same_bits(published, ours, dtype):
    direct, through = checkpoint.load(published, dtype=dtype), checkpoint.load(ours, dtype=dtype)
    for name, original in modules().items():
        assert same_bits(getattr(direct, name), getattr(through, name))
        assert getattr(direct, name).config == getattr(through, name).config == CONFIGS[name]
        if dtype == jnp.float32:
            assert same_bits(getattr(direct, name), original)
    assert direct.scheduler == through.scheduler == SCHEDULER
    assert direct.tokenizer(SENTENCE).input_ids == through.tokenizer(SENTENCE).input_ids
    assert len(direct.tokenizer(SENTENCE).input_ids) == 7


@pytest.mark.parametrize("kind", ["diffusers", "sixbit"])
def test_progress_is_in_bytes_of_what_is_loaded(published, ours, kind):
    folder, parts = published if kind == "diffusers" else ours, ("transformer", "vae", "scheduler")
    seen = []
    checkpoint.load(folder, dtype="float32", components=parts, progress=lambda *bytes_: seen.append(bytes_))
    held = checkpoint.describe(folder)["components"]
    wanted = sum(held[name]["bytes"] for name in ("transformer", "vae"))
    done, totals = zip(*seen, strict=True)
    assert set(totals) == {wanted} == {done[-1]}
    assert len(set(done)) == len(done) >= 2
    assert list(done) == sorted(done)


def test_storing_in_16_bits_is_loading_in_16_bits(published, tmp_path):
    half = checkpoint.load(convert(published, tmp_path / "half", dtype="bfloat16", progress=False))
    cast = checkpoint.load(published)
    assert all(same_bits(getattr(half, name), getattr(cast, name)) for name in MODELS)


def test_sharded_is_single(published, tmp_path):
    limit = 20_000
    sharded = write(tmp_path / "sharded", max_shard_size=limit, dtype=jnp.bfloat16)
    single = write(tmp_path / "single", dtype=jnp.bfloat16)
    many, one = checkpoint.load(sharded), checkpoint.load(single)
    assert all(same_bits(getattr(many, name), getattr(one, name)) for name in MODELS)
    shards = sorted((sharded / "transformer").glob("*.safetensors"))
    assert len(shards) > 1
    assert all(p.stat().st_size < limit + 4000 for p in shards)  # and a header
    index = json.loads((sharded / "transformer" / "diffusion_pytorch_model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == checkpoint.describe(sharded)["components"]["transformer"]["bytes"]
    assert set(index["weight_map"].values()) == {p.name for p in shards}


def test_loaded_modules_compute(ours):
    loaded = checkpoint.load(ours, dtype=jnp.float32, components=["transformer", "text_encoder"])
    text = loaded.text_encoder(jnp.ones((1, 8), jnp.int32))
    out = loaded.transformer(jnp.ones((1, 3, 4, 8, 8)), text, jnp.ones((1,), jnp.int32))
    assert out.shape == (1, 3, 4, 8, 8)
    assert np.isfinite(out).all()


@pytest.mark.parametrize("kind", ["published", "ours"])
def test_subset(kind, request):
    folder = request.getfixturevalue(kind)
    loaded = checkpoint.load(folder, components=["vae"])
    assert loaded.vae is not None
    assert [loaded.transformer, loaded.text_encoder, loaded.tokenizer, loaded.scheduler] == [None] * 4


def test_absent_components(published, tmp_path):
    out = convert(published, tmp_path / "out", components=["transformer", "scheduler"], progress=False)
    loaded = checkpoint.load(out)
    assert loaded.transformer is not None
    assert loaded.vae is None
    with pytest.raises(CheckpointError, match="has no vae, tokenizer; it has transformer, scheduler"):
        checkpoint.load(out, components=["vae", "tokenizer", "transformer"])


def test_describe_reads_no_tensor(published, ours, monkeypatch):
    monkeypatch.setattr(LazyTensor, "__array__", None)
    theirs, mine = checkpoint.describe(published), checkpoint.describe(ours)
    assert (theirs["kind"], mine["kind"]) == ("diffusers", "sixbit")
    assert theirs["components"] == mine["components"]
    assert theirs["scheduler"] == mine["scheduler"]
    assert theirs["tokenizer"] == mine["tokenizer"]
    entry = mine["components"]["transformer"]
    assert entry["dtypes"] == {"float32": entry["parameters"]}
    assert entry["bytes"] == 4 * entry["parameters"]
    assert entry["config"]["num_layers"] == 3
    json.dumps([theirs, mine])


def test_wrong_kinds_of_folder(tmp_path):
    (tmp_path / "weights.safetensors").touch()
    for action in (checkpoint.load, checkpoint.describe):
        with pytest.raises(
            CheckpointError, match=r"neither sixbit\.json .*, nor .* model_index\.json, or one of trans"
        ):
            action(tmp_path)
        with pytest.raises(CheckpointError, match="no such folder"):
            action(tmp_path / "absent")


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"version": 2}, "version 2; this program reads"), ({"format": "other"}, "format 'other'")],
)
def test_other_versions(ours, tmp_path, changes, message):
    copy = shutil.copytree(ours, tmp_path / "copy")
    edit_json(copy / "sixbit.json", **changes)
    with pytest.raises(CheckpointError, match=message):
        checkpoint.load(copy)


def test_our_checkpoint_that_does_not_fit_its_configuration(ours, tmp_path):
    copy = shutil.copytree(ours, tmp_path / "copy")
    components = json.loads((copy / "sixbit.json").read_text())["components"]
    arrays = components["text_encoder"]["arrays"]
    arrays["more"] = arrays.pop("final_layer_norm.scale")
    arrays["shared.embedding"]["shape"] = [41, 16]
    edit_json(copy / "sixbit.json", components=components)
    with pytest.raises(CheckpointError) as caught:
        checkpoint.load(copy)
    assert str(caught.value).splitlines() == [
        f"{copy / 'text_encoder'}: does not fit its configuration",
        "  - missing final_layer_norm.scale: wanted [16]",
        "  + unexpected more: found [16]",
        "  ! wrong shared.embedding: found [41, 16], wanted [40, 16]",
    ]


@pytest.fixture(scope="module")
def text_encoder_by_items(published, tmp_path_factory):
    """One parameter in each item. Where orbax reads several at once, those it gives up on after an error warn later."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "ITEM_BYTES", 1)
        return convert(
            published, tmp_path_factory.mktemp("items") / "model", components=["text_encoder"], progress=False
        )


@pytest.mark.parametrize("damage", ["missing", "data", "truncated", "metadata"])
def test_damaged_items_are_named(text_encoder_by_items, tmp_path, damage):
    copy = shutil.copytree(text_encoder_by_items, tmp_path / "copy")
    item = copy / "text_encoder" / "000"
    if damage == "missing":
        shutil.rmtree(item)
    elif damage == "metadata":
        (item / "_METADATA").write_text("{")
    else:
        for file in [p for p in item.rglob("d/*") if p.is_file()]:
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]) if damage == "truncated" else file.unlink()
    with pytest.raises(CheckpointError, match="text_encoder/000: cannot be read; convert the checkpoint again"):
        checkpoint.load(copy, components=["text_encoder"])


def test_tokenizer_that_cannot_be_loaded(published, tmp_path):
    copy = shutil.copytree(published, tmp_path / "copy")
    for file in (copy / "tokenizer").iterdir():
        file.unlink()
    with pytest.raises(CheckpointError, match="the tokenizer cannot be loaded"):
        checkpoint.load(copy, components=["tokenizer"])


def test_bad_arguments(published, tmp_path):
    with pytest.raises(CheckpointError, match="dtype 'float64'"):
        checkpoint.load(published, dtype="float64")
    with pytest.raises(CheckpointError, match="dtype: None"):
        checkpoint.load(published, dtype=None)
    with pytest.raises(CheckpointError, match="components: unet unknown"):
        checkpoint.load(published, components=["unet"])
    with pytest.raises(CheckpointError, match="exists; choose another place"):
        write(published)


def test_published_folder_that_is_wrong_is_a_listed_error(published, tmp_path):
    copy = shutil.copytree(published, tmp_path / "copy")
    edit_json(copy / "transformer" / "config.json", num_layers=2)
    with pytest.raises(ConversionError) as caught:
        checkpoint.load(copy)
    assert {p.mark for p in caught.value.problems} == {"+"}
    assert all(p.key.startswith("transformer_blocks.2.") for p in caught.value.problems)
    assert len(caught.value.problems) == 24


def test_quantised_models_are_not_exported(tmp_path):
    module = Pipeline.from_pretrained("mini", quantization="w4a16").transformer.merge()
    with pytest.raises(CheckpointError, match="transformer: its linears are quantised, which diffusers cannot read"):
        checkpoint.write_diffusers(tmp_path / "out", transformer=module)
    assert not list(tmp_path.iterdir())


def test_failed_export_leaves_nothing(tmp_path):
    class Tokenizer:
        def save_pretrained(self, folder):
            raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space left"):
        checkpoint.write_diffusers(tmp_path / "out", **modules(), tokenizer=Tokenizer())
    assert list(tmp_path.iterdir()) == []
