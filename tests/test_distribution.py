"""What is published: the sdist, the wheel, and the command that a fresh environment gets from it."""

import email
import importlib.metadata
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import NamedTuple

import av
import pytest

import sixbit_jax

ROOT = Path(__file__).parents[1]
PACKAGES = ("convert", "pallas_kernels", "sixbit_jax")


class Built(NamedTuple):
    """The sdist, the wheel made from it, and the wheel made from the tree."""

    sdist: Path
    wheel: Path
    direct: Path


def run(*command: str | Path, cwd: Path) -> str:
    """What a command prints; it sees no Python path and no cache of ours."""
    environment = {"HOME": str(cwd), "PATH": "/usr/bin:/bin", "LC_ALL": "C.UTF-8", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def tracked() -> list[str]:
    """Files of the repository, as a clean clone would have them."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [name for name in listed.split("\0") if name and (ROOT / name).is_file()]


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Built:
    folder = tmp_path_factory.mktemp("dist")
    tree = folder / "tree"
    for name in tracked():
        if not name.startswith(("tests/parity/references/", "benchmarks/results/")):
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, tree / name)
    build = (sys.executable, "-m", "build", "--no-isolation")
    run(*build, "--outdir", folder / "dist", ".", cwd=tree)
    run(*build, "--wheel", "--outdir", folder / "direct", ".", cwd=tree)
    (sdist,), (wheel,) = (folder / "dist").glob("*.tar.gz"), (folder / "dist").glob("*.whl")
    (direct,) = (folder / "direct").glob("*.whl")
    return Built(sdist, wheel, direct)


def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_the_wheel_holds_the_packages_whole_and_nothing_else(built):
    found = contents(built.wheel)
    wanted = {name for name in tracked() if name.split("/")[0] in PACKAGES}
    assert {name for name in found if ".dist-info/" not in name} == wanted
    assert all(found[name] == (ROOT / name).read_bytes() for name in wanted)
    for needed in (
        *(f"{package}/py.typed" for package in PACKAGES),
        "pallas_kernels/tuned/nvidia_h200.json",
        "sixbit_jax/assets/report/page.html",
        "sixbit_jax/assets/moving_mnist/model_index.json",
        "sixbit_jax/assets/moving_mnist/transformer/diffusion_pytorch_model.safetensors",
        f"sixbit_jax-{sixbit_jax.__version__}.dist-info/licenses/LICENSE",
    ):
        assert needed in found


def test_the_sdist_builds_the_wheel_that_the_tree_builds(built):
    with tarfile.open(built.sdist) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "README.md", "CHANGELOG.md", "CITATION.cff", "LICENSE"} <= held
    assert not [name for name in held if name.split("/")[0] in ("tests", "benchmarks", "notebooks", "docs")]
    assert contents(built.wheel) == contents(built.direct)


def test_the_metadata(built):
    text = contents(built.wheel)[f"sixbit_jax-{sixbit_jax.__version__}.dist-info/METADATA"].decode()
    found = email.message_from_string(text)
    assert found["Version"] == sixbit_jax.__version__
    assert found["License-Expression"] == "Apache-2.0"
    assert found["Description-Content-Type"] == "text/markdown"
    assert text.endswith((ROOT / "README.md").read_text(encoding="utf-8"))
    assert set(found.get_all("Provides-Extra", [])) == {"cuda12", "cuda13", "dev", "docs", "train"}


@pytest.fixture(scope="module")
def fresh(built, tmp_path_factory) -> Path:
    """An environment with the wheel; the dependencies are those of this one, whose .pth files do not count there."""
    folder = tmp_path_factory.mktemp("fresh")
    run(sys.executable, "-m", "venv", "--without-pip", folder / "venv", cwd=folder)
    python = folder / "venv" / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", built.wheel, cwd=folder)
    (site_packages,) = (folder / "venv" / "lib").glob("python*/site-packages")
    (ours,) = {str(Path(importlib.metadata.distribution(name).locate_file(""))) for name in ("jax", "numpy", "av")}
    (site_packages / "dependencies.pth").write_text(ours + "\n")
    return folder


def test_a_fresh_environment_runs_the_command(fresh):
    code = f"import {', '.join(PACKAGES)}; print(*(m.__file__ for m in ({', '.join(PACKAGES)})))"
    files = run(fresh / "venv" / "bin" / "python", "-c", code, cwd=fresh).split()
    assert len(files) == 3
    assert all(Path(file).is_relative_to(fresh / "venv") for file in files)

    sixbit = fresh / "venv" / "bin" / "sixbit"
    assert run(sixbit, "--version", cwd=fresh) == f"sixbit_jax {sixbit_jax.__version__}\n"
    assert '"transformer"' in run(sixbit, "info", "mini", cwd=fresh)
    options = ("--num-inference-steps", "2", "--num-frames", "9", "--prompt", "a red 3 moves left fast")
    run(sixbit, "generate", "--model", "mini", *options, "--out", fresh / "three.mp4", cwd=fresh)
    with av.open(str(fresh / "three.mp4")) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert [frame.shape for frame in frames] == [(64, 64, 3)] * 9
