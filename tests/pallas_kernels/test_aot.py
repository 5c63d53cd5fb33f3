"""The compilation report: of a kernel that is easy to count, and of everything that can go wrong in the child."""

import functools
import os
import time

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.aot import CompileError, compile_report, compile_reports, count_instructions


def double(x, *, name):
    """Doubles tiles of 128 rows through shared memory: TMA in, TMA out."""

    def kernel(x_gmem, o_gmem, x_smem, o_smem, arrived):
        rows = pl.ds(128 * jax.lax.axis_index("i"), 128)
        plgpu.copy_gmem_to_smem(x_gmem.at[rows], x_smem, arrived)
        plgpu.barrier_wait(arrived)
        o_smem[...] = 2 * x_smem[...]
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(o_smem, o_gmem.at[rows])
        plgpu.wait_smem_to_gmem(0)

    tile = plgpu.SMEM((128, x.shape[1]), x.dtype)
    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct(x.shape, x.dtype),
        grid=(x.shape[0] // 128,),
        grid_names=("i",),
        scratch_types=[tile, tile, plgpu.Barrier()],
        kernel_name=name,
    )(x)


def square(x):
    return x * x


def contradict(x):
    return x + jnp.zeros(x.shape[0] + 1)


def wait(x):
    time.sleep(600)
    return x


TILES = jax.ShapeDtypeStruct((512, 128), jnp.float32)


def test_every_case_has_its_own_reports():
    narrow = jax.ShapeDtypeStruct((512, 64), jnp.float32)
    cases = [(functools.partial(double, name="wide"), (TILES,)), (square, (TILES,))]
    (wide,), none, (half,) = compile_reports([*cases, (functools.partial(double, name="narrow"), (narrow,))])
    assert wide.name.startswith("wide")
    assert none == []
    assert half.name.startswith("narrow")
    # Two tiles of float32 and a barrier.
    assert wide.shared_bytes == 2 * 128 * 128 * 4 + 8
    assert half.shared_bytes == 2 * 128 * 64 * 4 + 8
    assert wide.spill_bytes == wide.stack_bytes == 0
    assert not wide.serialised_wgmma
    assert 0 < wide.registers <= 255
    assert wide.count("HGMMA") == 0
    assert wide.count("UTMALDG") == 1  # the copy in; the copy out is contiguous, and needs no tensor map
    assert wide.count("UBLKCP") == 1
    # 128 x 128 elements over 128 threads.
    assert wide.count("FADD") == 128  # 2 x = x + x
    assert f"{wide.registers} registers, 0 B spilled" in str(wide)


def test_an_abort_of_the_compiler_is_an_exception_here():
    with pytest.raises(CompileError, match="compiling for h100: SIGABRT"):
        compile_report(os.abort, target="h100")


def test_an_error_of_the_function_is_shown():
    with pytest.raises(CompileError, match=r"(?s)exit code 1.*case 0.*contradict.*incompatible shapes"):
        compile_report(contradict, jax.ShapeDtypeStruct((3,), jnp.float32))


def test_a_child_that_takes_too_long_is_stopped():
    with pytest.raises(CompileError, match="stopped after 1 s"):
        compile_report(wait, TILES, timeout=1.0)


def test_an_unknown_chip_names_the_known_ones():
    with pytest.raises(ValueError, match="target='b200' is unknown; use one of a100, h100, h200"):
        compile_report(square, TILES, target="b200")


def test_the_hot_loop_is_the_innermost_with_tensor_cores():
    listing = """
    .L_x_0:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
    .L_x_1:
        /*0010*/                   LDS R2, [R3] ;
        /*0020*/              @!P0 HGMMA.64x16x16.F32 R24, R4, gdesc[UR4], R24 ;
        /*0030*/               @P1 BRA `(.L_x_1) ;
    .L_x_2:
        /*0040*/                   FFMA R2, R2, R2, R2 ;
        /*0050*/               @P1 BRA `(.L_x_2) ;
        /*0060*/               @P2 BRA `(.L_x_0) ;
        /*0070*/                   BRA `(.L_x_0) ;
        /*0080*/                   EXIT ;
    """
    everything, loop = count_instructions(listing)
    assert everything == {"MOV": 1, "LDS": 1, "HGMMA": 1, "BRA": 4, "FFMA": 1, "EXIT": 1}
    assert loop == {"LDS": 1, "HGMMA": 1, "BRA": 1}
