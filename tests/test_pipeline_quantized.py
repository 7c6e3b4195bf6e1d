"""The pipeline and the command with quantised linears: by name, by configuration, and what they report."""

import dataclasses
import json
import shutil
import warnings

import calibrated
import jax.numpy as jnp
import numpy as np
import pytest
from typer.testing import CliRunner

from convert.errors import CheckpointError
from sixbit_jax import Pipeline, cli
from sixbit_jax.calibrate import calibrate
from sixbit_jax.errors import ArgumentError, CalibrationWarning
from sixbit_jax.precision.blocks import PrecisionTrace
from sixbit_jax.precision.calibration import FILE_NAME
from sixbit_jax.precision.targets import NAMED, QuantizationConfig

STEPS = 10
CALL = {"num_inference_steps": STEPS, "output_type": "latent"}
pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """A model without a calibration."""
    return calibrated.write(tmp_path_factory.mktemp("bare") / "tiny")


@pytest.fixture(scope="module")
def model(bare, tmp_path_factory):
    """The same with one."""
    folder = shutil.copytree(bare, tmp_path_factory.mktemp("model") / "tiny")
    pipe = Pipeline.from_pretrained(folder, dtype=jnp.float32)
    calibrate(pipe, calibrated.PROMPTS, num_inference_steps=STEPS, points=0).save(folder / FILE_NAME)
    return folder


def load(folder, quantization, **options):
    return Pipeline.from_pretrained(folder, dtype=jnp.float32, quantization=quantization, **options)


@pytest.mark.parametrize(("name", "bits"), [("w4a16", 16), ("int8", 8), ("nvfp4", 4)])
def test_one_route_by_name(bare, name, bits):
    result = load(bare, name)("up", **CALL)
    assert (result.trace.precision.bits == bits).all()
    assert result.summary.mean_bits == pytest.approx(bits)
    assert result.summary.skip_share == 0


def test_every_second_step_is_reused_by_name(bare):
    bits = load(bare, "int8-reuse")("up", **CALL | {"num_inference_steps": 11}).trace.precision.bits
    # Five steps of warm-up; then one computed, one taken from the cache; two of cool-down.
    assert [bool((step == 0).all()) for step in bits] == [i in (6, 8) for i in range(11)]
    assert {int(value) for value in np.unique(bits)} == {0, 8}


def test_without_quantization_nothing_changes(model):
    pipe = Pipeline.from_pretrained(model, dtype=jnp.float32)
    result = pipe("up", num_inference_steps=2, output_type="latent")
    assert (pipe.quantization, pipe.policy(), result.summary, result.trace.precision) == (None, None, None, None)
    assert pipe.calibration.prompts == calibrated.PROMPTS


def test_a_target_by_configuration(model):
    config = QuantizationConfig(target_mean_bits=5.5, target_skip=0.1, warm_up=2, cool_down=1)
    pipe = load(model, config)
    result = pipe(list(calibrated.PROMPTS), **CALL)
    assert len(result.summary.videos) == 2
    assert set(np.unique(result.trace.precision.bits)) <= {0, 4, 8, 16}
    assert 0.02 < result.summary.skip_share < 0.3
    assert pipe.policy(STEPS) is pipe.policy(STEPS)
    assert pipe.policy(STEPS) is not pipe.policy(STEPS + 1)


def test_targets_need_a_calibration(bare, model):
    with pytest.raises(CheckpointError, match="no such calibration file; `sixbit calibrate` makes one"):
        load(bare, "sixbit")
    with pytest.raises(ArgumentError, match="run `sixbit calibrate"):
        load(bare, "int8").quantized(NAMED["sixbit"]).policy(STEPS)
    given = load(bare, "sixbit", calibration=model / FILE_NAME)
    assert given.calibration.prompts == calibrated.PROMPTS
    assert load(bare, "sixbit", calibration=given.calibration).calibration is given.calibration


def test_an_unfit_calibration_in_the_folder(model, tmp_path, caplog):
    """An error where it is needed; where it is not, the model still loads."""
    other = shutil.copytree(model, tmp_path / "other")
    config = QuantizationConfig(activations="int8", hadamard=0)
    assert load(other, config).calibration is None
    assert "not used" in caplog.text
    with pytest.raises(CheckpointError, match="rotation"):
        load(other, QuantizationConfig(target_mean_bits=6.0, hadamard=0))


def test_quantising_later_checks_the_calibration(model, caplog):
    """That a model has from its folder, before it is known what it will be quantised to."""
    pipe = load(model, None)
    assert pipe.quantized(NAMED["sixbit"]).calibration is pipe.calibration
    assert pipe.quantized(QuantizationConfig(activations="int8", hadamard=0)).calibration is None
    assert f"not used: {model / FILE_NAME}: was made for another model: the rotation" in caplog.text
    with pytest.raises(CheckpointError, match="the rotation of attn_in is 32 there and 0 here"):
        pipe.quantized(QuantizationConfig(target_mean_bits=6.0, hadamard=0))
    assert load(model, None, calibration=pipe.calibration).calibration is pipe.calibration


def test_a_run_unlike_those_of_the_calibration_is_told(model):
    config = QuantizationConfig(target_mean_bits=6.0, warm_up=2)
    pipe = load(model, config)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipe("up", **CALL)
    dpm = dataclasses.replace(pipe.scheduler, class_name="CogVideoXDPMScheduler")
    pipe = dataclasses.replace(pipe, scheduler=dpm)
    wanted = (
        "scheduler CogVideoXDDIMScheduler, not CogVideoXDPMScheduler; num_frames, height, width .*; guided True, not"
    )
    with pytest.warns(CalibrationWarning, match=wanted):
        pipe("up", **CALL | {"guidance_scale": 1.0, "num_frames": 5})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipe.quantized(NAMED["int8"])("up", **CALL)


def test_names_and_targets_are_checked_first(bare):
    with pytest.raises(ArgumentError, match="unknown quantization 'fp8'"):
        load(bare, "fp8")
    pipe = load(bare, "int8")
    assert pipe.quantized(NAMED["nvfp4"]).quantization is NAMED["nvfp4"]
    with pytest.raises(ArgumentError, match="quantised already"):
        pipe.quantized(QuantizationConfig(activations="int8", hadamard=0))


def test_the_bundled_model_has_a_calibration_of_training_captions():
    from sixbit_jax.training.data import held_out_scenes, parse_caption

    pipe = Pipeline.from_pretrained("mini", quantization="sixbit")
    held_out = set(held_out_scenes())
    assert not any(held_out & set(parse_caption(prompt)) for prompt in pipe.calibration.prompts)
    policy = pipe.policy(50)
    assert 0 < float(policy.skipper.threshold) < 1
    assert pipe.calibration.trace.volatility.shape[1] == 50


def generate(out, *arguments):
    options = ["--out", out, "--steps", STEPS, "--dtype", "float32", "--no-compilation-cache", *arguments]
    return CliRunner().invoke(cli.app, ["generate", *map(str, options)])


def test_the_command_reports_and_saves_the_trace(model, tmp_path):
    options = ["--quantization", "sixbit", "--target-skip", 0.15, "--target-mean-bits", 5.5]
    prompts = ["--prompt", calibrated.PROMPTS[0], "--prompt", calibrated.PROMPTS[1]]
    done = generate(tmp_path / "a.mp4", "--model", model, *prompts, *options)
    assert done.exit_code == 0, done.output
    assert "mean activation bits" in done.stdout
    assert "without skipped blocks" in done.stdout
    names = {f"a_{i}{suffix}" for i in range(2) for suffix in (".mp4", ".json", ".trace.npz", ".trace.png")}
    assert {path.name for path in tmp_path.iterdir()} == names
    for i in range(2):
        record = json.loads((tmp_path / f"a_{i}.json").read_text())
        assert (
            record["quantization"].items() >= {"name": "sixbit", "target_mean_bits": 5.5, "target_skip": 0.15}.items()
        )
        assert record["thresholds"].keys() == {"error_threshold", "skip_threshold"}
        with np.load(tmp_path / f"a_{i}.trace.npz") as saved:
            arrays = dict(saved)
        assert set(arrays) == {field.name for field in dataclasses.fields(PrecisionTrace)}
        assert arrays["bits"].shape == (STEPS, 3, 4)
        assert record["summary"]["skip_share"] == pytest.approx((arrays["bits"] == 0).mean())
        assert (tmp_path / f"a_{i}.trace.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--quantization", "fp8"], "unknown quantization 'fp8'; there are w4a16, int8, nvfp4, int8-reuse, sixbit"),
        (["--target-skip", 0.3], "goes with --quantization"),
        (["--quantization", "int8-reuse", "--target-skip", 0.1], "int8-reuse has a rhythm of its own"),
        (["--quantization", "int8", "--target-mean-bits", 6, "--target-skip", 0.1], "met by skipping"),
        (["--quantization", "sixbit", "--target-skip", 0.99], "target_skip=0.99 cannot be met"),
        (["--quantization", "sixbit", "--calibration", "absent"], "absent: no such calibration file"),
    ],
)
def test_bad_options(model, tmp_path, options, message):
    done = generate(tmp_path / "a.mp4", "--model", model, "--prompt", "up", *options)
    assert done.exit_code == 2
    assert message in " ".join(done.stderr.replace("│", " ").split())
    assert list(tmp_path.iterdir()) == []
