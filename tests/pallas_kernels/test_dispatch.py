import logging

import jax
import pytest
from jax.sharding import AbstractMesh, AxisType

from pallas_kernels import dispatch


def under_mesh_of(kind):
    """A context in which JAX's mesh is made of such devices."""
    device = jax.sharding.AbstractDevice(device_kind=kind, num_cores=None, platform="gpu")
    mesh = AbstractMesh((1,), ("data",), axis_types=(AxisType.Auto,), abstract_device=device)
    return jax.sharding.use_abstract_mesh(mesh)


def test_xla_is_never_refused():
    assert dispatch.choose("op", "xla", "x is int8 and the kernel takes bfloat16") == "xla"


def test_explicit_wishes_run_or_say_why_not():
    assert dispatch.choose("op", "interpret", None) == "interpret"
    with pytest.raises(
        ValueError, match=r"op: interpret cannot run this: x is int8; use implementation='auto' or 'xla'"
    ):
        dispatch.choose("op", "interpret", "x is int8")
    with pytest.raises(ValueError, match=r"op: mosaic_gpu cannot run this: the kernel needs a Hopper GPU .* is cpu"):
        dispatch.choose("op", "mosaic_gpu", None)


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"implementation='triton' is unknown; use one of auto, xla, mosaic_gpu"):
        dispatch.choose("op", "triton", None)


def test_auto_falls_back_and_says_so_once_for_every_op_and_reason(caplog):
    dispatch._say_once.cache_clear()
    with caplog.at_level(logging.INFO, "pallas_kernels"):
        with under_mesh_of("NVIDIA H200"):
            for op in ("first", "second", "first"):
                assert dispatch.choose(op, "auto", "x is int8") == "xla"
        for unsupported in (None, "x is int8"):  # no kernel for this chip, whatever x is
            assert dispatch.choose("first", "auto", unsupported) == "xla"
    messages = [(record.levelno, record.getMessage()) for record in caplog.records]
    assert messages[:2] == [
        (logging.WARNING, "first: using XLA, because x is int8."),
        (logging.WARNING, "second: using XLA, because x is int8."),
    ]
    assert len(messages) == 3
    assert messages[2][0] == logging.INFO
    assert "needs a Hopper GPU" in messages[2][1]


@pytest.mark.parametrize("kind", ["NVIDIA H100 80GB HBM3", "NVIDIA H200", "NVIDIA GH200 480GB", "NVIDIA H20"])
def test_the_chip_of_the_mesh_decides(kind):
    with under_mesh_of(kind):
        assert dispatch.choose("op", "auto", None) == "mosaic_gpu"
        assert dispatch.choose("op", "mosaic_gpu", None) == "mosaic_gpu"
        assert dispatch.choose("op", "auto", "x is int8") == "xla"


@pytest.mark.parametrize("kind", ["NVIDIA A100-SXM4-80GB", "NVIDIA B200", "NVIDIA L4", "TPU v5p", "NVIDIA H2000"])
def test_other_chips_get_xla(kind):
    with under_mesh_of(kind):
        assert dispatch.choose("op", "auto", None) == "xla"
