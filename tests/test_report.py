"""The page of a run: what it is made from, that it needs nothing else, and that it says what run.json says."""

import base64
import dataclasses
import hashlib
import json
import re
from html.parser import HTMLParser

import av
import calibrated
import jax.numpy as jnp
import numpy as np
import pytest
from typer.testing import CliRunner

from sixbit_jax import Pipeline, cli, metrics, report
from sixbit_jax.errors import ArgumentError
from sixbit_jax.pipeline import PipelineOutput, decode_latents, encode_text
from sixbit_jax.precision.blocks import PrecisionTrace
from sixbit_jax.precision.targets import QuantizationConfig
from sixbit_jax.sampling.sampler import Trace

pytestmark = pytest.mark.usefixtures("quick_compilation")
STEPS, BLOCKS = 6, 3
EVIL = (
    """</title></blockquote><script src=//evil.test/x.js>alert(1)</script>"'><img src=x onerror=alert(2)> $style & Ω"""
)


class Page(HTMLParser):
    """What a browser would see: elements with attributes, texts by element, rows of tables."""

    def __init__(self, path):
        super().__init__(convert_charrefs=True)
        self.elements, self.texts, self.rows, self._open = [], {}, [], []
        self.text = path.read_text(encoding="utf-8")
        self.feed(self.text)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self._open.append(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert tag in self._open
        while self._open.pop() != tag:  # elements without an end
            pass

    def handle_data(self, data):
        self.texts.setdefault(self._open[-1] if self._open else "", []).append(data)
        if self._open and self._open[-1] in ("td", "th"):
            self.rows[-1][-1] += data

    def row(self, title):
        [found] = [row[1:] for row in self.rows if row[0] == title]
        return found

    def named(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


def output(seed, trace=None):
    rng = np.random.default_rng(seed)
    return PipelineOutput(
        frames=rng.integers(0, 256, (1, 5, 32, 32, 3), np.uint8),
        latents=rng.standard_normal((1, 3, 4, 8, 8)).astype(np.float32),
        trace=Trace(
            timestep=np.arange(STEPS, dtype=np.int32),
            guidance_scale=np.ones(STEPS, np.float32),
            latents_rms=np.ones((STEPS, 1), np.float32),
            finite=np.ones((STEPS, 1), bool),
            precision=trace,
        ),
        timings={"text_encoder": 0.5, "sampling": 7.0, "vae": 0.25, "compilation": 4.0},
    )


def precision_trace():
    bits = np.full((STEPS, BLOCKS, 1, 4), 4, np.uint8)
    bits[3:, 1] = 0
    values = np.where(bits > 0, 0.3, np.nan).astype(np.float32)
    return PrecisionTrace(
        bits=bits,
        volatility=values[..., 0],
        delta_change=values[..., 0],
        predicted=values,
        outlier=values,
        age=np.zeros(bits.shape[:3], np.int32),
    )


def run_record(**changes):
    seconds = {"text_encoder": 0.0123, "sampling": 3.2101, "vae": 0.4567, "compilation": 5.8912}
    weights = {"text_encoder": 3 * 2**20, "sampling": 2**29, "vae": 2**21}
    run = {"weights": "nvfp4", "seconds": seconds, "weights_bytes": weights}
    run |= {"delta_cache_bytes": 2**22, "peak_bytes": None}
    other = {"weights": "bfloat16", "seconds": {name: 2 * value for name, value in seconds.items()}}
    other |= {"weights_bytes": {name: 4 * value for name, value in weights.items()}, "delta_cache_bytes": 0}
    return {
        "prompt": "a red 3",
        "model": "mini",
        "height": 32,
        "seed": 17,
        "negative_prompt": None,
        "fps": 8,
        "dtype": "bfloat16",
        "quantization": {"name": "sixbit", "target_skip": 0.1},
        "device": {"kind": "cpu", "platform": "cpu", "count": 1},
        "versions": {"jax": "1.2.3"},
        "command": ["sixbit", "generate", "--prompt", "a red 3"],
        "summary": {
            "mean_bits": 3.3333,
            "mean_bits_computed": 4.0,
            "skip_share": 0.1667,
            "route_shares": {"skipped": 0.1667, "nvfp4": 0.8333, "int8": 0.0, "16bit": 0.0},
        },
        "runs": {"quantized": run, "reference": other | {"peak_bytes": 3 * 2**29}},
    } | changes


def save(folder, quantized=None, reference=None, **changes):
    quantized = quantized or output(0, precision_trace())
    report.save_run(folder, run_record(**changes), quantized, reference or output(1))
    return folder


@pytest.fixture
def run_dir(tmp_path):
    return save(tmp_path / "run")


def decoded(path) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def test_the_page_holds_everything_and_asks_for_nothing(run_dir):
    page = Page(report.write(run_dir))
    links = [(tag, a[name]) for tag, a in page.elements for name in ("src", "href", "poster", "srcset") if name in a]
    assert [tag for tag, _ in links] == ["link", "video", "video", "video", "img"]
    assert all(link.startswith("data:") for _, link in links)
    for (_, link), name in zip(links[1:4], report.VIDEOS, strict=True):
        kind, content = link.split(",")
        assert kind == "data:video/mp4;base64"
        assert base64.b64decode(content) == (run_dir / name).read_bytes()
    assert base64.b64decode(links[4][1].split(",")[1]).startswith(b"\x89PNG")
    own = re.sub(r"data:[^\"]*", "", page.text)
    assert not re.search(r"https?:|url\(|@import|fetch\(|import\(", own)
    [policy] = [a["content"] for a in page.named("meta") if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; img-src data:; media-src data:;")
    [script] = page.texts["script"]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy


def test_the_page_needs_nothing_but_the_files_it_names(run_dir, tmp_path):
    text = report.write(run_dir).read_text()
    assert {p.name for p in run_dir.iterdir()} == {*report.FILES, report.PAGE}
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in report.FILES:
        (copy / name).write_bytes((run_dir / name).read_bytes())
    assert report.write(copy).read_text() == text


def test_texts_of_the_user_stay_texts(tmp_path):
    plain = Page(report.write(save(tmp_path / "plain")))
    changes = {"model": EVIL, "negative_prompt": EVIL, "command": [EVIL], "versions": {EVIL: EVIL}}
    changes |= {"quantization": {"name": EVIL}, "device": {"kind": EVIL}}
    page = Page(report.write(save(tmp_path / "evil", prompt=EVIL, **changes)))
    assert page.texts["blockquote"] == [EVIL]
    assert page.texts["title"] == [f"{EVIL} (sixbit report)"]
    assert page.row("negative_prompt") == page.row(EVIL) == [EVIL]
    assert page.named("video")[1]["aria-label"] == f"Quantised: {EVIL}"
    kinds = {name for name, _ in page.elements}
    assert kinds == {name for name, _ in plain.elements}
    assert len(page.named("script")) == len(page.named("img")) == 1
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    assert "<script src" not in page.text


def test_numbers_are_those_of_the_record(run_dir):
    page, record = Page(report.write(run_dir)), json.loads((run_dir / report.RUN).read_text())
    close, runs = record["fidelity"], [record["runs"][name] for name in ("reference", "quantized")]
    worst = int(np.argmin(close["psnr_by_frame"]))
    assert page.row("PSNR of the video")[0] == f"{close['psnr']:.2f} dB"
    assert page.row("PSNR of its worst frame")[0] == f"{close['psnr_by_frame'][worst]:.2f} dB (frame {worst + 1})"
    assert page.row("SSIM")[0] == f"{close['ssim']:.4f}"
    assert page.row("Relative error of the latents")[0] == f"{close['latent_error']:.4f}"
    assert page.row("Mean activation width")[0] == "3.33 bits"
    assert page.row("Without skipped blocks")[0] == "4.00 bits"
    assert page.row("Blocks skipped")[0] == "16.7%"
    assert page.row("Work by route")[0] == "16.7% skipped, 83.3% nvfp4, 0.0% int8, 0.0% 16bit"
    for title, stage in (("Text encoder", "text_encoder"), ("Sampling", "sampling"), ("VAE decoder", "vae")):
        assert page.row(f"{title}, time") == [f"{run['seconds'][stage]:.4f} s" for run in runs]
    assert page.row("Compiling sampling, or loading it compiled") == ["11.7824 s", "5.8912 s"]
    assert page.row("Text encoder, weights") == ["12.00 MiB", "3.00 MiB"]
    assert page.row("Sampling, weights") == ["2,048.00 MiB", "512.00 MiB"]
    assert page.row("VAE decoder, weights") == ["8.00 MiB", "2.00 MiB"]
    assert page.row("Delta cache") == ["0.00 MiB", "4.00 MiB"]
    assert page.row("Highest device memory so far") == ["1,536.00 MiB", "not reported on this platform"]
    assert page.row("seed") == ["17"]
    assert page.row("negative_prompt") == ["none"]
    assert page.row("target_skip") == ["0.1"]
    assert page.row("jax") == ["1.2.3"]
    assert "sixbit generate --prompt 'a red 3'" in page.texts["pre"]
    slider = page.named("input")[0]
    assert (slider["max"], slider["data-fps"]) == ("4", "8")


def test_fidelity_and_videos_are_of_the_frames(run_dir):
    quantized, reference = output(0), output(1)
    close = json.loads((run_dir / report.RUN).read_text())["fidelity"]
    assert close["psnr"] == pytest.approx(float(metrics.psnr(quantized.frames, reference.frames)[0]))
    assert close["ssim"] == pytest.approx(float(metrics.ssim(quantized.frames, reference.frames)[0]))
    gap = quantized.frames[0].astype(float) - reference.frames[0]
    wanted = -10 * np.log10(np.square(gap / 255).mean((1, 2, 3)))
    np.testing.assert_allclose(close["psnr_by_frame"], wanted, rtol=1e-5)
    norm = np.linalg.norm(quantized.latents - reference.latents) / np.linalg.norm(reference.latents)
    assert close["latent_error"] == pytest.approx(norm)
    shown = np.minimum(report.GAIN * np.abs(gap), 255)
    for name, frames in zip(report.VIDEOS, (reference.frames[0], quantized.frames[0], shown), strict=True):
        # Noise loses half of its colour to the codec, 5 to 20 levels of brightness remain; another video is at 60.
        brightness = [values.astype(float).mean(-1) for values in (decoded(run_dir / name), frames)]
        assert np.abs(brightness[0] - brightness[1]).mean() < 25


def test_difference_is_symmetric_and_saturates():
    a, b = (np.array(values, np.uint8) for values in ([0, 10, 255, 7], [0, 12, 0, 0]))
    for pair in ((a, b), (b, a)):
        np.testing.assert_array_equal(report.difference(*pair), [0, 2 * report.GAIN, 255, 7 * report.GAIN])


def test_equal_and_tiny_videos(tmp_path):
    quantized, reference = (
        dataclasses.replace(run, frames=run.frames[:, :, :8, :8]) for run in (output(0, precision_trace()), output(0))
    )
    page = Page(report.write(save(tmp_path, quantized, reference)))
    assert page.row("PSNR of the video")[0] == "identical"
    assert page.row("PSNR of its worst frame")[0].startswith("identical")
    assert page.row("SSIM")[0] == "frames are too small"
    assert page.row("Relative error of the latents")[0] == "0.0000"


def test_a_reference_with_quantised_weights_is_called_so(tmp_path):
    runs = run_record()["runs"]
    page = Page(report.write(save(tmp_path, runs=runs | {"reference": runs["reference"] | {"weights": "nvfp4"}})))
    assert "Reference: bf16 activations, NVFP4 weights" in page.texts["figcaption"]


def test_a_folder_that_is_no_run(run_dir, tmp_path):
    with pytest.raises(ArgumentError, match=r"absent: no such folder; `sixbit generate .*--report FOLDER` writes one"):
        report.write(tmp_path / "absent")
    (run_dir / report.TRACE).unlink()
    (run_dir / "reference.mp4").unlink()
    with pytest.raises(ArgumentError, match=r"run: is not a complete run, reference\.mp4, trace\.npz missing; `sixbit"):
        report.write(run_dir)
    assert not (run_dir / report.PAGE).exists()


DAMAGES = {
    "no JSON": (report.RUN, lambda content: content[:-20], r"run\.json: cannot be read: "),
    "no UTF-8": (report.RUN, lambda content: b"\xff" + content, r"run\.json: cannot be read: "),
    "no record": (report.RUN, lambda content: b"[]", r"run\.json: is not of format 1"),
    "other format": (report.RUN, lambda content: b'{"format": 2}', r"run\.json: is not of format 1"),
    "cut trace": (report.TRACE, lambda content: content[:100], r"trace\.npz: cannot be read: "),
    "no trace": (report.TRACE, lambda content: b"", r"trace\.npz: cannot be read: "),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_damaged_files_leave_the_old_page(run_dir, case):
    name, damage, message = DAMAGES[case]
    (run_dir / report.PAGE).write_text("old")
    (run_dir / name).write_bytes(damage((run_dir / name).read_bytes()))
    done = CliRunner().invoke(cli.app, ["report", str(run_dir)])
    assert done.exit_code == 2
    assert re.match(f"error: {re.escape(str(run_dir))}/{message}", done.stderr)
    assert (run_dir / report.PAGE).read_text() == "old"
    assert {p.name for p in run_dir.iterdir()} == {*report.FILES, report.PAGE}


def test_a_run_that_fails_halfway_is_no_run(run_dir):
    whole = output(0, precision_trace())
    odd = dataclasses.replace(whole, frames=whole.frames[:, :, :31])
    with pytest.raises(ArgumentError, match="even height"):
        save(run_dir, odd, odd)
    with pytest.raises(ArgumentError, match=r"run\.json missing"):
        report.write(run_dir)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return calibrated.write(tmp_path_factory.mktemp("model") / "tiny")


def test_memory_of_a_run(model):
    config = QuantizationConfig(activations="int8", skip_threshold=0.1)
    dense = Pipeline.from_pretrained(model, dtype=jnp.bfloat16)
    pipe = dense.quantized(config)
    guided, plain = (report.measured(pipe, output(0), guided=guided) for guided in (True, False))
    # Two samples of 8 + 3 x 4 x 4 tokens, 32 wide, one scale a token, in each of 3 blocks.
    assert guided["delta_cache_bytes"] == 3 * 2 * (8 + 48) * (32 + 4) == 2 * plain["delta_cache_bytes"]
    assert guided["seconds"] == {"text_encoder": 0.5, "sampling": 3.0, "vae": 0.25, "compilation": 4.0}
    assert guided["weights"] == "nvfp4"
    found = report.measured(dense, output(0), guided=True)
    assert (found["weights"], found["delta_cache_bytes"]) == ("bfloat16", 0)
    size = sum(p.stat().st_size for p in (model / "transformer").glob("*.safetensors"))
    assert found["weights_bytes"]["sampling"] == pytest.approx(size / 2, rel=0.15)  # stored in float32, with a header


@pytest.mark.parametrize("converted", [False, True])
def test_the_command_runs_both_and_writes_the_page(model, tmp_path, monkeypatch, converted):
    """From a converted folder arrays come bound to a device, for which JAX compiles apart."""
    if converted:
        source, model = model, tmp_path / "converted"
        assert CliRunner().invoke(cli.app, ["convert", str(source), str(model), "--quiet"]).exit_code == 0
    calls, call = [], Pipeline.__call__

    def spy(self, *arguments, **settings):
        compiled = [function._cache_size() for function in (encode_text, decode_latents)]
        result = call(self, *arguments, **settings)
        assert [function._cache_size() for function in (encode_text, decode_latents)] == compiled
        del settings["on_step"]
        calls.append((self.quantization, (arguments, settings), result))
        return result

    monkeypatch.setattr(Pipeline, "__call__", spy)
    folder = tmp_path / "new" / "run"
    options = ["--model", model, "--quantization", "nvfp4", "--steps", 2, "--seed", 5, "--dtype", "float32"]
    options += ["--prompt", "<b>up</b> $x$", "--no-compilation-cache", "--num-frames", 3, "--report", folder]
    done = CliRunner().invoke(cli.app, ["generate", *map(str, options)])
    assert done.exit_code == 0, done.output
    assert f"wrote {folder / report.PAGE}\n" in done.output
    assert {p.name for p in folder.iterdir()} == {*report.FILES, report.PAGE}
    [(config, asked, quantized), (no_config, asked_again, reference)] = calls
    assert (config.activations, no_config) == ("nvfp4", None)
    assert asked == asked_again
    record = json.loads((folder / report.RUN).read_text())
    assert record["fidelity"]["psnr"] == pytest.approx(float(metrics.psnr(quantized.frames, reference.frames)[0]))
    assert record.items() >= {"prompt": "<b>up</b> $x$", "seed": 5, "num_inference_steps": 2, "height": 16}.items()
    assert record["quantization"]["name"] == "nvfp4"
    assert record["summary"]["mean_bits"] == pytest.approx(4)
    for name, result in (("quantized", quantized), ("reference", reference)):
        seconds, timings = record["runs"][name]["seconds"], result.timings
        assert seconds["sampling"] + seconds["compilation"] == pytest.approx(timings["sampling"], abs=1e-3)
    weights = [record["runs"][name]["weights_bytes"]["sampling"] for name in ("quantized", "reference")]
    assert weights[0] < 0.75 * weights[1]
    assert record["runs"]["reference"]["weights"] == "float32"

    page = Page(folder / report.PAGE)
    assert page.texts["blockquote"] == ["<b>up</b> $x$"]
    assert page.row("SSIM")[0] == f"{record['fidelity']['ssim']:.4f}"
    (folder / report.PAGE).unlink()
    done = CliRunner().invoke(cli.app, ["report", str(folder)])
    assert (done.exit_code, done.output) == (0, f"wrote {folder / report.PAGE}\n")
    assert (folder / report.PAGE).read_text() == page.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "--out, --report: give exactly one of the two"),
        (["--out", "a.mp4", "--report", "r"], "--out, --report: give exactly one of the two"),
        (["--report", "r"], "--report: goes with --quantization"),
        (["--report", "r", "--quantization", "int8", "--prompt", "down"], "--report: takes one prompt"),
        (["--report", "file", "--quantization", "int8"], "file/reference.mp4: cannot be written"),
    ],
)
def test_options_that_do_not_fit(tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(Pipeline, "from_pretrained", lambda *a, **k: pytest.fail("the model was loaded"))
    done = CliRunner().invoke(cli.app, ["generate", "--prompt", "up", *options])
    assert done.exit_code == 2
    assert message in " ".join(done.stderr.replace("│", " ").split())
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_prompt_with_dollars_titles_the_picture_of_a_trace(tmp_path):
    cli._save_trace(tmp_path / "a.mp4", precision_trace(), 0, title=r"from $\nowhere to $2")
    assert {p.name for p in tmp_path.iterdir()} == {"a.trace.npz", "a.trace.png"}
