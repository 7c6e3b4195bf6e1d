"""Which implementation runs, and what the default device can."""

import logging
import types

import jax
import pytest

from pallas_kernels.common import choice, device
from pallas_kernels.common.choice import Implementation, choose

H100 = types.SimpleNamespace(device_kind="NVIDIA H100 80GB HBM3", compute_capability="9.0", core_count=132)


def fast(x):
    return "fast"


def plain(x):
    return "plain"


TABLE = {
    "fast": Implementation(
        run=fast,
        refusal=lambda x: "x is odd" if x % 2 else None,
        passed_over=lambda x: "x is large" if x > 100 else None,
    ),
    "plain": plain,
}


def test_none_takes_the_first_that_does_the_call_well(caplog):
    choice._log_once.cache_clear()
    with caplog.at_level(logging.INFO, "pallas_kernels"):
        assert [choose("op", TABLE, None, x) for x in (2, 2, 3, 102)] == [fast, fast, plain, plain]
    assert [r.getMessage() for r in caplog.records] == [
        f"op: implementation=None took {n!r}" for n in ("fast", "plain")
    ]


def test_a_name_is_taken_or_is_an_error():
    assert choose("op", TABLE, "fast", 102) is fast
    assert choose("op", TABLE, "plain", 3) is plain
    with pytest.raises(NotImplementedError, match="op: 'fast' can't do this call: x is odd"):
        choose("op", TABLE, "fast", 3)
    with pytest.raises(ValueError, match="op: unknown implementation 'best'; this version offers fast, plain"):
        choose("op", TABLE, "best", 3)
    with pytest.raises(NotImplementedError, match="x is odd"):
        choose("op", {"fast": TABLE["fast"]}, None, 3)


def test_the_default_device_here():
    assert device.default_device() == jax.local_devices()[0]
    with jax.default_device(jax.devices("cpu")[0]):
        assert device.kind() == "cpu"
        assert device.compute_capability() is None
    with jax.default_device("cpu"):
        assert device.kind() == "cpu"


@pytest.mark.parametrize(("text", "found"), [("9.0", (9, 0)), ("12.1", (12, 1)), ("gfx942", None), (None, None)])
def test_compute_capability(monkeypatch, text, found):
    monkeypatch.setattr(device, "default_device", lambda: types.SimpleNamespace(compute_capability=text))
    assert device.compute_capability() == found


def test_refusal(monkeypatch):
    message = "it needs an NVIDIA GPU of compute capability 8.0 or newer; the default device is 'cpu'"
    assert device.refusal(at_least=(8, 0)) == message
    with device.interpret():
        assert device.interpreting()
        assert device.refusal(at_least=(8, 0)) is None
    assert not device.interpreting()
    monkeypatch.setattr(device, "default_device", lambda: H100)
    assert device.refusal(at_least=(8, 0)) is None
    assert device.refusal(at_least=(9, 0), below=(10, 0)) is None
    assert (
        "10.0 to below 11.0; the default device is 'NVIDIA H100 80GB HBM3', compute capability 9.0"
        in device.refusal(at_least=(10, 0), below=(11, 0))
    )
    assert "8.0 to below 9.0" in device.refusal(at_least=(8, 0), below=(9, 0))


def test_core_count(monkeypatch):
    monkeypatch.setattr(device, "default_device", lambda: H100)
    assert device.core_count() == 132
    gpu = jax.sharding.AbstractDevice(device_kind="NVIDIA A100", num_cores=108, platform="cuda")
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), (), abstract_device=gpu)):
        assert device.core_count() == 108
