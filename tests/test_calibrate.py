"""Calibration: what it measures, the file it is kept in, and the command that makes it."""

import dataclasses
import json

import calibrated
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

from convert.errors import CheckpointError
from sixbit_jax import Pipeline, cli
from sixbit_jax.calibrate import calibrate, psnr, read_prompts, work
from sixbit_jax.errors import ArgumentError
from sixbit_jax.models.linears import SITES
from sixbit_jax.pipeline import prompt_list
from sixbit_jax.precision import DeltaSkipper, PrecisionPolicy, calibration, measuring
from sixbit_jax.precision.calibration import Calibration, fit
from sixbit_jax.precision.measuring import LOW_BIT, Measured
from sixbit_jax.precision.targets import QuantizationConfig
from sixbit_jax.sampling import sampler, schedulers
from sixbit_jax.sampling.noise import video_keys

STEPS = 6
pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return calibrated.write(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def pipe(model):
    return Pipeline.from_pretrained(model, dtype=jnp.float32, quantization="w4a16")


@pytest.fixture(scope="module")
def made(pipe):
    return calibrate(pipe, calibrated.PROMPTS, num_inference_steps=STEPS, points=0)


@pytest.fixture
def file(made, tmp_path):
    made.save(tmp_path / "c.safetensors")
    return tmp_path / "c.safetensors"


def run_inputs(pipe, position=0):
    positive, negative = (pipe.encode(text) for text in ([calibrated.PROMPTS[position]], [""]))
    keys = video_keys(0, 2)[position : position + 1]
    shape = pipe._latents_shape(*pipe.default_size)
    schedule = schedulers.make_schedule(pipe.scheduler, STEPS)
    return pipe.sampler_inputs(positive, negative, keys, shape, schedule, guidance_scale=6.0)


def test_the_measured_run_is_the_16_bit_route(pipe, made):
    """Same latents, volatility and change of deltas as a run that looks and skips nothing."""
    latents, measured = measuring.sample(pipe.transformer, *run_inputs(pipe))
    watching = PrecisionPolicy(skipper=DeltaSkipper(threshold=jnp.asarray(0.0, jnp.float32)), outlier_limit=None)
    wanted, trace = sampler.sample(pipe.transformer, *run_inputs(pipe), policy=watching)
    np.testing.assert_allclose(latents, wanted, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(measured.volatility, trace.precision.volatility[:, :, 0], rtol=1e-3)
    np.testing.assert_allclose(measured.delta_change, trace.precision.delta_change[:, :, 0], rtol=1e-2)
    np.testing.assert_allclose(made.trace.volatility[0], measured.volatility, rtol=2e-3)


def test_errors_are_those_of_the_products(pipe):
    layer = jax.tree.map(lambda leaf: leaf[0], pipe.transformer.params)["blocks"]["ff_out"]
    block_graph, params = nnx.split(pipe.transformer.merge().blocks)
    block = nnx.merge(block_graph, jax.tree.map(lambda leaf: leaf[0], params))
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 6, block.ff_out.weight.shape[-1])), jnp.float32)
    linears = measuring.MeasuringLinears(SITES)
    linears._measure("ff_out", block.ff_out, x)
    bias = layer["bias"][...]
    exact, *found = (np.asarray(block.ff_out(x, route=route) - bias) for route in ("16bit", *LOW_BIT))
    wanted = [np.linalg.norm(other - exact) / np.linalg.norm(exact) for other in found]
    np.testing.assert_allclose(linears.error["ff_out"], wanted, rtol=1e-4)
    assert 0.04 < wanted[0] < 0.2
    assert wanted[1] < 0.03
    np.testing.assert_allclose(linears.outlier["ff_out"], np.abs(x).max() / np.abs(x).mean(), rtol=1e-6)


def test_shapes_and_sizes_of_the_trace(pipe, made):
    config = pipe.transformer.merge().config
    lead = (len(calibrated.PROMPTS), STEPS, config.num_layers)
    more = {"error": (len(SITES), 2), "outlier": (len(SITES),), "delta_error": (len(SITES),), "cache_error": (2,)}
    for field in dataclasses.fields(Measured):
        values = getattr(made.trace, field.name)
        assert (values.shape, values.dtype) == ((*lead, *more.get(field.name, ())), np.float16), field.name
    assert np.isinf(made.trace.delta_change[:, 0]).all()
    assert np.isfinite(made.trace.delta_change[:, 1:]).all()
    assert (made.trace.error[..., 0] > made.trace.error[..., 1]).mean() > 0.9
    assert (made.trace.cache_error[..., 1] > made.trace.cache_error[..., 0]).all()
    assert (made.trace.outlier > 1).all()
    assert made.prompts == calibrated.PROMPTS


def test_fit_recovers_a_line():
    rng = np.random.default_rng(0)
    volatility = rng.uniform(0.1, 1, (3, 20, 2))
    alpha, beta = rng.uniform(-1, 1, (2, 4)), rng.uniform(0, 1, (2, 4))
    error = np.zeros((3, 20, 2, 4))
    error[:, 1:] = alpha * volatility[:, :-1, :, None] + beta
    found = fit(volatility, error)
    np.testing.assert_allclose(found["alpha"], alpha, atol=1e-5)
    np.testing.assert_allclose(found["beta"], beta, atol=1e-5)
    np.testing.assert_allclose(found["correlation"], np.sign(alpha), atol=1e-5)
    still = fit(np.ones((1, 5, 2)), np.ones((1, 5, 2, 4)))
    assert (still["alpha"] == 0).all()
    assert (still["correlation"] == 0).all()
    np.testing.assert_array_equal(still["beta"], 1)
    with pytest.raises(ArgumentError, match="at least 2 steps"):
        fit(np.ones((1, 1, 2)), np.ones((1, 1, 2, 4)))


def test_a_file_gives_back_what_was_saved(made, file, pipe):
    found = Calibration.load(file, pipe.transformer)
    for name in ("alpha", "beta", "correlation", "site_correlation"):
        np.testing.assert_array_equal(getattr(found, name), getattr(made, name))
    for field in dataclasses.fields(Measured):
        np.testing.assert_array_equal(getattr(found.trace, field.name), getattr(made.trace, field.name))
    assert (found.prompts, found.settings, found.version) == (made.prompts, made.settings, made.version)
    assert found.transformer_config == pipe.transformer.merge().config
    assert str(found) == str(made)
    assert all(site in str(found) for site in SITES)


def test_files_of_another_model_are_refused_by_name(file, model, tmp_path):
    other = calibrated.write(tmp_path / "other")
    weights = load_file(other / "transformer" / "diffusion_pytorch_model.safetensors")
    changed = {name: value[..., ::-1].copy() if "ff.net" in name else value for name, value in weights.items()}
    save_file(changed, other / "transformer" / "diffusion_pytorch_model.safetensors")
    options = {"dtype": jnp.float32, "quantization": "w4a16", "calibration": file}
    with pytest.raises(CheckpointError, match=r"c\.safetensors: was made for another model: the quantised weights"):
        Pipeline.from_pretrained(other, **options)
    path = other / "transformer" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"norm_eps": 1e-3}))
    with pytest.raises(CheckpointError, match=r"norm_eps is 1e-05 there and 0\.001 here"):
        Pipeline.from_pretrained(other, **options)
    config = QuantizationConfig(activations="16bit", hadamard=0)
    with pytest.raises(CheckpointError, match="the rotation of attn_in is 32 there and 0 here"):
        Pipeline.from_pretrained(model, **options | {"quantization": config})


def test_the_dtype_that_a_model_is_loaded_in_does_not_matter(file, model):
    Pipeline.from_pretrained(model, quantization="w4a16", calibration=file)


def test_files_of_another_format_are_refused_by_name(file):
    with safe_open(file, "numpy") as opened:
        about = json.loads(opened.metadata()["sixbit"])
    tensors = load_file(file)
    save_file(tensors, file, {"sixbit": json.dumps(about | {"format": 99, "version": "7.8"})})
    with pytest.raises(CheckpointError, match=r"format 99, written by sixbit_jax 7\.8.*reads format 1"):
        Calibration.load(file)
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match="is not a calibration file"):
        Calibration.load(file)
    file.write_bytes(b"not tensors")
    with pytest.raises(CheckpointError, match="cannot be read"):
        Calibration.load(file)
    with pytest.raises(CheckpointError, match="no such calibration file"):
        Calibration.load(file.with_name("absent"))


def test_an_interrupted_save_leaves_the_old_file(made, file, monkeypatch):
    before = file.read_bytes()

    def interrupted(tensors, path, metadata):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(calibration, "save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        made.save(file)
    assert file.read_bytes() == before
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_bad_arguments(pipe, monkeypatch):
    """Before anything is measured."""

    def no_run(*arguments):
        raise AssertionError("measured")

    monkeypatch.setattr(measuring, "sample", no_run)
    for prompts, options, message in (
        ([], {}, "prompts is an empty list"),
        (["up"], {"points": -1}, "points=-1"),
        (["up"], {"num_inference_steps": 1}, "num_inference_steps=1 must be at least 2"),
        (["up"], {"cache_format": "int4"}, "cache_format='int4'"),
        (["up"], {"guidance_scale": float("nan")}, "guidance_scale=nan must be a finite number"),
    ):
        with pytest.raises(ArgumentError, match=message):
            calibrate(pipe, prompts, **options)
    with pytest.raises(AssertionError, match="measured"):
        calibrate(pipe, "up")
    with pytest.raises(ArgumentError, match="prompts must be a string or a list of strings"):
        prompt_list("prompts", ["up", 3])


def test_the_first_prompt_that_overflows_is_named(pipe, monkeypatch):
    latents, measured = measuring.sample(pipe.transformer, *run_inputs(pipe))
    broken = measured.replace(volatility=measured.volatility.at[2].set(jnp.inf))
    runs = []
    monkeypatch.setattr(measuring, "sample", lambda *arguments: runs.append(arguments) or (latents, broken))
    with pytest.raises(ArgumentError, match="volatility became NaN or Inf with 'up'"):
        calibrate(pipe, ["up", "down"], num_inference_steps=STEPS)
    assert len(runs) == 1


def test_prompts_are_read_as_editors_write_them(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeffa red 3\r\n\r\n  a blue 7 \r\n".encode())
    assert read_prompts(file) == ["a red 3", "a blue 7"]
    file.write_text("\n  \n")
    with pytest.raises(ArgumentError, match="holds no prompt"):
        read_prompts(file)
    file.write_bytes("caf\xe9".encode("latin-1"))
    with pytest.raises(ArgumentError, match=r"prompts\.txt: is not UTF-8 text"):
        read_prompts(file)


def test_psnr():
    video = np.zeros((1, 2, 2, 2, 3), np.uint8)
    assert psnr(video, video) == 100
    assert psnr(video + np.uint8(255), video) == pytest.approx(0, abs=1e-4)
    latents = np.asarray([1.0, -2.0], np.float32)
    assert psnr(latents + 0.2, latents) == pytest.approx(20, abs=1e-3)


def test_the_command_writes_into_the_models_folder(tmp_path):
    model = calibrated.write(tmp_path / "tiny")
    (tmp_path / "prompts.txt").write_text("up\n\ndown\n")
    options = ["--model", model, "--prompts", tmp_path / "prompts.txt", "--steps", 9, "--points", 1]
    done = run("calibrate", *options, "--dtype", "float32", "--no-compilation-cache")
    assert done.exit_code == 0, done.output
    path = model / "calibration.safetensors"
    assert done.stdout.endswith(f"wrote {path}\n")
    assert all(site in done.stdout for site in SITES)
    pipe = Pipeline.from_pretrained(model, dtype=jnp.float32, quantization="w4a16")
    assert pipe.calibration.prompts == ("up", "down")
    assert pipe.calibration.points.psnr.shape == (4, 3)
    assert np.isfinite(pipe.calibration.points.psnr).all()
    assert pipe.calibration.points.skip_share[0].max() == 0
    assert work(2, 1) == 2 + 12


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    monkeypatch.setattr(Pipeline, "from_pretrained", lambda *a, **k: pytest.fail("the model was loaded"))
    model, prompts = tmp_path / "model", tmp_path / "prompts.txt"
    (model / "calibration.safetensors").mkdir(parents=True)
    prompts.write_text("up")
    done = run("calibrate", "--model", model, "--prompts", prompts)
    assert done.exit_code == 2
    assert "--out FILE" in done.stderr
    assert run("calibrate", "--model", model, "--prompts", tmp_path / "absent").exit_code == 2


def run(*arguments):
    return CliRunner().invoke(cli.app, [str(a) for a in arguments])
