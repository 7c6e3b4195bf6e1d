"""The command: what it writes, what it says, and how it ends."""

import json
import shutil
from importlib.metadata import version

import av
import jax
import numpy as np
import published_folder
import pytest
from terminal import on_a_terminal
from typer.testing import CliRunner

import convert.__main__
import sixbit_jax
from sixbit_jax import Pipeline, cli, pipeline
from sixbit_jax.errors import ArgumentError

TEXTS = ["a red 3 moves left slowly", "a blue 7 moves up fast"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny random model: 9 frames of 16 x 16 of the form 2k + 1."""
    return published_folder.write(tmp_path_factory.mktemp("model") / "tiny")


def run(*arguments, app=cli.app):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def plain(text: str) -> str:
    """Without the box, and the line breaks, that typer puts around a wrong option."""
    return " ".join(text.replace("│", " ").split())


def generate(out, *arguments):
    return run("generate", "--no-compilation-cache", "--out", out, *arguments)


def decoded(path) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def psnr(found, wanted) -> float:
    return 10 * np.log10(255**2 / np.mean((found.astype(float) - wanted) ** 2))


def test_version():
    result = run("--version")
    assert (result.exit_code, result.stdout) == (0, f"sixbit_jax {sixbit_jax.__version__}\n")


def test_videos_of_the_bundled_model(tmp_path, monkeypatch):
    calls, call = [], Pipeline.__call__

    def spy(self, *arguments, **settings):
        calls.append((self, arguments, settings, call(self, *arguments, **settings)))
        return calls[-1][-1]

    monkeypatch.setattr(Pipeline, "__call__", spy)
    options = {"num_frames": 9, "num_inference_steps": 4, "guidance_scale": 5.0}
    arguments = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    texts = [argument for text in TEXTS for argument in ("--prompt", text)]
    out = tmp_path / "new" / "v.mp4"
    done = generate(out, *texts, *arguments, "--seed=3", "--seed=4", "--dtype=float32", "--fps=12")
    assert done.exit_code == 0, done.output
    assert sorted(p.name for p in out.parent.iterdir()) == ["v_0.json", "v_0.mp4", "v_1.json", "v_1.mp4"]
    [(pipe, prompts, settings, wanted)] = calls
    assert prompts == (TEXTS,)
    assert settings.items() >= {**options, "seed": [3, 4], "negative_prompt": None, "height": 64}.items()
    assert pipe.transformer.merge().dtype == "float32"
    for i in range(2):
        path = out.with_name(f"v_{i}.mp4")
        assert f"wrote {path}" in done.output
        found = decoded(path)
        assert found.shape == (9, 64, 64, 3)
        # The codec keeps over 30 dB; the other video is below 20 dB.
        assert psnr(found, wanted.frames[i]) > 28
        assert psnr(found, wanted.frames[1 - i]) < 22
        record = json.loads(path.with_suffix(".json").read_text())
        assert record.items() >= {**options, "prompt": TEXTS[i], "batch": TEXTS, "position_in_batch": i}.items()
        assert record.items() >= {"seed": [3, 4], "fps": 12, "dtype": "float32", "model": "mini"}.items()
        assert record.items() >= {"height": 64, "width": 64, "frames_written": 9, "negative_prompt": None}.items()
        assert record.items() >= {"use_dynamic_cfg": False, "vae_tiling": False, "compilation_cache": False}.items()
        assert record["scheduler"]["_class_name"] == "CogVideoXDDIMScheduler"
        assert set(record["seconds"]) == {"text_encoder", "sampling", "vae", "compilation"}
        assert all(value > 0 for value in record["seconds"].values())
        np.testing.assert_allclose(record["latents_rms"], wanted.trace.latents_rms[:, i], atol=1e-6)
        assert record["versions"]["jax"] == version("jax")
        assert record["versions"]["sixbit_jax"] == sixbit_jax.__version__
        assert record["device"]["platform"] == "cpu"


def test_one_video_replaces_a_file_and_the_record_says_what_was_left_to_defaults(model, tmp_path):
    out = tmp_path / "a.mp4"
    out.write_bytes(b"old")
    out.with_suffix(".trace.npz").write_bytes(b"of an older, quantised run")
    done = generate(out, "--model", model, "--prompt", "up", "--steps", 2, "--scheduler", "dpm", "--dtype", "float32")
    assert done.exit_code == 0, done.output
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.json", "a.mp4"]
    assert decoded(out).shape == (9, 16, 16, 3)
    record = json.loads((tmp_path / "a.json").read_text())
    assert record["scheduler"]["_class_name"] == "CogVideoXDPMScheduler"
    assert (record["seed"], record["num_frames"], record["height"], record["guidance_scale"]) == (0, 9, 16, 6.0)
    assert record["model"] == str(model)


def test_a_cut_prompt_is_shown(model, tmp_path):
    prompt = "a red 3 moves left slowly and a green 1 moves up fast"
    done = generate(tmp_path / "a.mp4", "--model", model, "--prompt", prompt, "--steps", 1, "--dtype", "float32")
    assert done.exit_code == 0, done.output
    assert f"warning: the prompt '{prompt}' has 14 tokens, the model takes 8; cut: 'a green 1 moves up fast'\n" in (
        done.stderr
    )


BAD_OPTIONS = {
    "frames": (["--num-frames", 6], "error: num_frames=6 must be of the form 2k + 1; the nearest is"),
    "height": (["--height", 30], "error: height=30 must be a positive multiple of 4"),
    "no step": (["--steps", 0], "greater than or equal to 1"),
    "steps": (["--steps", 2000], "error: num_inference_steps=2000 must be between 1 and"),
    "seeds": (["--seed", 1, "--seed", 2], "2 for 1 prompts: one, or one for each"),
    "negative seed": (["--seed", -1], "error: seed=-1 must be an integer between 0 and"),
    "guidance": (["--guidance-scale", "inf"], "error: guidance_scale=inf must be a finite number"),
    "scheduler": (["--scheduler", "CogVideoXDDIMScheduler"], "is not one of"),
    "dtype": (["--dtype", "int8"], "is not one of"),
}


@pytest.mark.parametrize("case", BAD_OPTIONS)
def test_bad_options(model, tmp_path, case):
    options, message = BAD_OPTIONS[case]
    done = generate(tmp_path / "a.mp4", "--model", model, "--prompt", "up", *options)
    assert done.exit_code == 2
    assert message in plain(done.stderr)
    assert "Traceback" not in done.output
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["text_encoder", "tokenizer", "vae", "transformer"])
def test_missing_components(model, tmp_path, name):
    copy = shutil.copytree(model, tmp_path / "model", ignore=shutil.ignore_patterns(name))
    done = generate(tmp_path / "out" / "a.mp4", "--model", copy, "--prompt", "up")
    assert done.exit_code == 2
    message = {"vae": "error: this checkpoint has no VAE", "transformer": "needs a transformer and a scheduler"}
    assert message.get(name, "no text encoder or no tokenizer, so prompt cannot be encoded") in done.stderr


@pytest.mark.parametrize("command", ["generate", "info"])
def test_a_model_that_is_not_there(tmp_path, command):
    options = ["--prompt", "up", "--out", tmp_path / "a.mp4", "--model"] if command == "generate" else []
    done = run(command, *options, tmp_path / "absent")
    assert done.exit_code == 2
    assert done.stderr.startswith(f"error: {tmp_path / 'absent'}: no such folder")
    assert '"mini"' in done.stderr
    assert run(command, *options, tmp_path).exit_code == 2


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("file/a.mp4", "error: {}/file/a.mp4: cannot be written"),
        ("folder.mp4", "error: {}/folder.mp4: is a folder"),
        ("b.mp4", "error: {}/b.json: is a folder"),
        ("a.avi", "must end in .mp4"),
    ],
)
def test_places_that_cannot_be_written_are_found_before_the_model_is_loaded(tmp_path, monkeypatch, out, message):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "b.json").mkdir()
    monkeypatch.setattr(Pipeline, "from_pretrained", lambda *a, **k: pytest.fail("the model was loaded"))
    done = generate(tmp_path / out, "--prompt", "up")
    assert done.exit_code == 2
    assert message.format(tmp_path) in plain(done.stderr)


def test_a_small_device_is_told_in_one_line(tmp_path, monkeypatch):
    def fail(*arguments, **options):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 12 bytes.\nthe whole allocator")

    monkeypatch.setattr(pipeline.Pipeline, "from_pretrained", fail)
    done = generate(tmp_path / "a.mp4", "--prompt", "up")
    assert done.exit_code == 2
    assert done.stderr.startswith("error: the device has too little memory: RESOURCE_EXHAUSTED: Out of memory alloc")
    assert "--vae-tiling" in done.stderr
    assert "allocator" not in done.stderr


def test_the_bundled_calibration_is_not_written_over(tmp_path):
    (tmp_path / "prompts.txt").write_text("a red 3 moves left fast")
    done = run("calibrate", "--prompts", tmp_path / "prompts.txt")
    assert done.exit_code == 2
    assert 'is needed for "mini"' in plain(done.stderr)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ArgumentError("mine"), 2),
        (OSError("disk"), 2),
        (ValueError("bug"), 1),
        (TypeError("bug"), 1),
        (RuntimeError("bug"), 1),
    ],
)
def test_a_bug_keeps_its_traceback(tmp_path, monkeypatch, error, code):
    def fail(*arguments, **options):
        raise error

    monkeypatch.setattr(pipeline.Pipeline, "from_pretrained", fail)
    done = generate(tmp_path / "a.mp4", "--prompt", "up")
    assert done.exit_code == code
    if code == 2:
        assert done.stderr == f"error: {error}\n"
    else:
        assert done.exception is error  # CliRunner holds what would be Python's traceback


def test_info(model, tmp_path):
    bundled = json.loads(run("info", "mini").stdout)
    assert bundled["kind"] == "diffusers"
    assert set(bundled["components"]) == {"transformer", "vae", "text_encoder"}
    assert bundled["scheduler"]["prediction_type"] == "v_prediction"
    assert run("convert", model, tmp_path / "out", "--quiet").exit_code == 0
    ours = json.loads(run("info", tmp_path / "out").stdout)
    assert (ours["kind"], ours["source"]) == ("sixbit", str(model))


def test_convert_is_the_converters_own_command(model, tmp_path):
    own = convert.__main__.app
    for app, prefix, name in ((cli.app, ["convert"], "a"), (own, [], "b")):
        done = run(*prefix, model, tmp_path / name, "--components", "vae", "--dtype", "float16", "--quiet", app=app)
        assert (done.exit_code, done.output) == (0, f"wrote {tmp_path / name}\n")
    manifests = [json.loads((tmp_path / name / "sixbit.json").read_text()) for name in "ab"]
    assert manifests[0] == manifests[1]
    for bad in (
        [model, tmp_path / "a"],
        [tmp_path / "absent", tmp_path / "c"],
        [model, tmp_path / "absent" / "c"],
        [model, tmp_path / "c", "--dtype", "int8"],
        [model],
        [model, tmp_path / "c", "--unknown"],
    ):
        ours, theirs = run("convert", *bad), run(*bad, app=own)
        assert ours.exit_code == theirs.exit_code == 2
        assert "Traceback" not in ours.output
        if ours.stderr.startswith("error: "):
            assert ours.stderr == theirs.stderr


def test_progress_cache_and_interrupt_of_the_real_command(model, tmp_path):
    """Three runs of one program: compiled, then from the cache (its loop still reports), then stopped in its middle."""
    environment = {"XDG_CACHE_HOME": str(tmp_path / "cache"), "JAX_PLATFORMS": "cpu"}
    size = ["--height", 32, "--width", 32, "--steps", 150, "--dtype", "float32"]
    arguments = ["generate", "--model", model, "--prompt", "up", "--out", tmp_path / "a.mp4", *size]
    cached = {}
    for run_number in range(2):
        code, shown, _ = on_a_terminal(arguments, environment)
        assert code == 0, shown
        assert "PyTorch" not in shown
        assert "| 150/150 " in shown
        assert any(f"| {n}/150 " in shown for n in range(1, 149))  # not only the first and the last
        files = {p.name for p in (tmp_path / "cache" / "sixbit_jax" / "xla").iterdir()}
        cached[run_number] = {name for name in files if name.startswith(("jit_sample-", "jit_decode_latents-"))}
    assert {"jit_sample", "jit_decode_latents"} <= {name.rsplit("-", 2)[0] for name in cached[0]}
    assert cached[0] == cached[1]
    (tmp_path / "a.mp4").unlink()
    code, shown, seconds = on_a_terminal(arguments, environment, interrupt_at=r"\| [1-9]\d*/150")
    assert code == 130
    assert shown.endswith("interrupted\r\n")
    assert "Traceback" not in shown
    assert seconds < 5
    assert not list(tmp_path.glob(".a.*"))
    assert not (tmp_path / "a.mp4").exists()
