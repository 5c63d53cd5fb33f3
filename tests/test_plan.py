import functools
import json
import re
import sys

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.experimental import topologies
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from lumen import plan
from lumen.attention import Full, Mask, Streaming, attend
from lumen.sharding import make_mesh
from pallas_kernels.aot import TARGETS
from pallas_kernels.decode_attention import decode_attention
from pallas_kernels.dispatch import Implementation
from pallas_kernels.w4a16_matmul import PackedInt4, w4a16_matmul

# --- FLOPs: closed forms.


def flops(f, *shapes):
    args = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return plan.count_flops(jax.jit(f).trace(*args).jaxpr)


def test_a_matrix_product_is_two_operations_per_product():
    counted = flops(jnp.dot, (3, 5), (5, 7))
    assert counted == plan.Flops(total=2 * 3 * 5 * 7, matmul=2 * 3 * 5 * 7)


def test_batch_axes_are_not_contracted():
    assert flops(lambda a, b: jnp.einsum("bij,bjk->bik", a, b), (4, 3, 5), (4, 5, 7)).matmul == 4 * 2 * 3 * 5 * 7


def test_elementwise_operations_are_kept_apart():
    # tanh and add of [3, 7], then a sum over its 21 elements; the reshape is free.
    counted = flops(lambda a, b: jnp.sum(jnp.reshape(jnp.tanh(a) + b, (21,))), (3, 7), (3, 7))
    assert counted == plan.Flops(total=3 * 21)


def test_a_scan_counts_times_its_length():
    counted = flops(lambda x, ws: jax.lax.scan(lambda x, w: (x @ w, None), x, ws)[0], (3, 5), (6, 5, 5))
    assert counted.matmul == 6 * 2 * 3 * 5 * 5


def test_a_loop_of_known_length_is_a_scan():
    assert flops(lambda x: jax.lax.fori_loop(0, 6, lambda i, x: x @ x, x), (5, 5)).matmul == 6 * 2 * 5**3


def test_a_while_loop_counts_once_and_is_reported():
    counted = flops(lambda x: jax.lax.while_loop(lambda x: x[0, 0] > 0, lambda x: x @ x, x), (5, 5))
    assert counted.matmul == 2 * 5**3
    assert counted.notes == ("a while loop of unknown length is counted once",)


def test_a_conditional_counts_as_its_largest_branch():
    def f(x):
        return jax.lax.cond(x[0, 0] > 0, lambda x: x @ x, lambda x: x @ x @ x, x)

    assert flops(f, (5, 5)).matmul == 2 * 2 * 5**3


@pytest.mark.parametrize(("groups", "stride"), [(1, 1), (4, 1), (1, 2)])
def test_a_convolution_and_its_two_gradients_cost_the_same(groups, stride):
    def convolve(x, w):
        return jax.lax.conv_general_dilated(
            x, w, (stride, stride), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=groups
        )

    x, w = (2, 9, 9, 8), (3, 3, 8 // groups, 16)
    side = (9 - 3) // stride + 1
    forward = 2 * (2 * side * side * 16) * (3 * 3 * 8 // groups)  # per output: window x input channels of its group
    assert flops(convolve, x, w).matmul == forward
    kernel_gradient = flops(jax.grad(lambda w, x: jnp.sum(convolve(x, w) ** 2)), w, x)
    assert kernel_gradient.matmul == 2 * forward
    # The input's gradient is a convolution at all 9 x 9 inputs, including padding at the border, of a dilated array
    # whose zeros (stride - 1 between rows and columns) are not counted.
    both = flops(jax.grad(lambda x, w: jnp.sum(convolve(x, w) ** 2)), x, w)
    assert both.matmul == forward + 2 * (2 * 9 * 9 * 8) * (3 * 3 * 16 // groups) // stride**2


def test_training_a_two_layer_mlp_is_three_forward_passes_less_the_inputs_gradient():
    def loss(weights, x):
        return jnp.sum((jnp.tanh(x @ weights[0]) @ weights[1]) ** 2)

    def gradient(w0, w1, x):
        return jax.grad(loss)((w0, w1), x)

    first, second = 2 * 3 * 5 * 7, 2 * 3 * 7 * 4
    assert flops(gradient, (5, 7), (7, 4), (3, 5)).matmul == 3 * (first + second) - first


def test_rematerialised_layers_count_their_recomputation():
    def gradient(ws, x):
        def loss(ws):
            def layer(x, w):
                return jnp.tanh(x @ w), None

            return jnp.sum(jax.lax.scan(jax.checkpoint(layer), x, ws)[0] ** 2)

        return jax.grad(loss)(ws)

    # Forward, once more in the backward pass, and two gradients.
    assert flops(gradient, (6, 5, 5), (3, 5)).matmul == 4 * 6 * 2 * 3 * 5 * 5


def test_unused_results_are_not_counted():
    assert flops(lambda a, b: ((a @ b).shape, jnp.zeros(())), (3, 5), (5, 7)).matmul == 0


def test_custom_derivatives_are_looked_into():
    f = jax.custom_vjp(lambda x: x @ x)
    f.defvjp(lambda x: (x @ x, x), lambda x, g: (g @ x.T + x.T @ g,))
    assert flops(f, (5, 5)).matmul == 2 * 5**3
    assert flops(jax.grad(lambda x: jnp.sum(f(x) ** 2)), (5, 5)).matmul == 3 * 2 * 5**3


def test_the_inside_of_a_shard_map_counts_on_every_device():
    mesh = AbstractMesh((4, 2), ("a", "b"), axis_types=(AxisType.Auto, AxisType.Auto))

    def f(x, w):
        # [2, 10] @ [10, 7] on each of the 8 devices: together the products of [8, 20] @ [20, 7].
        specs = (PartitionSpec("a", "b"), PartitionSpec("b"))
        product = jax.shard_map(
            lambda x, w: jax.lax.psum(x @ w, "b"), mesh=mesh, in_specs=specs, out_specs=PartitionSpec("a")
        )
        return product(x, w)

    assert flops(f, (8, 20), (20, 7)).matmul == 2 * 8 * 20 * 7


def test_a_ragged_product_touches_each_row_once():
    def f(x, w):
        return jax.lax.ragged_dot(x, w, jnp.array([4, 5], jnp.int32))

    assert flops(f, (9, 5), (2, 5, 7)).matmul == 2 * 9 * 5 * 7
    # Forward, and a gradient for each operand.
    gradients = flops(jax.grad(lambda x, w: jnp.sum(f(x, w) ** 2), argnums=(0, 1)), (9, 5), (2, 5, 7))
    assert gradients.matmul == 3 * 2 * 9 * 5 * 7


@pytest.mark.parametrize("estimate", [None, pl.CostEstimate(flops=123, transcendentals=0, bytes_accessed=0)])
def test_a_kernel_counts_by_its_estimate(estimate):
    def body(x_ref, o_ref):
        o_ref[...] = 2 * x_ref[...]

    def double(x):
        shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
        return pl.pallas_call(body, out_shape=shape, cost_estimate=estimate, name="double")(x)

    counted = flops(double, (8, 128))
    assert counted.total == (123 if estimate else 0)
    assert counted.notes == (() if estimate else ("the kernel double has no cost estimate: not counted",))


# --- FLOPs of attention, whose loops and kernels do not show how much they do.

NOTE = (
    "what data decide is counted at its fullest: attention of full rows, full caches and dense heads, sparse "
    "convolutions of full windows at full capacity"
)


def attention_flops(mask, *, shape=(2, 1024, 4, 2, 64), gradient=False, implementation: Implementation = "xla"):
    """Flops of `attend` on [B, T, N, H] and [B, T, K, H], or of its gradients."""
    batch, tokens, heads, keys, size = shape
    q, k = (jax.ShapeDtypeStruct((batch, tokens, count, size), jnp.bfloat16) for count in (heads, keys))

    def f(q, k, v):
        return jnp.sum(attend(q, k, v, mask=mask(), implementation=implementation))

    return plan.count_flops(jax.jit(jax.grad(f, (0, 1, 2)) if gradient else f).trace(q, k, k).jaxpr)


@pytest.mark.parametrize("implementation", ["xla", "interpret"])
def test_attention_counts_the_blocks_that_its_mask_shows(implementation):
    product = 2 * 2 * 4 * 64 * 128**2  # FLOPs a block of 128 x 128, of 2 samples, 4 heads and 64 channels
    causal = 8 * 9 // 2  # blocks
    counted = attention_flops(Mask, implementation=implementation)
    assert counted.matmul == 2 * causal * product
    assert counted.notes == ()
    # Five products more for the gradients; the kernels compute S and dP twice.
    gradient = attention_flops(Mask, gradient=True, implementation=implementation)
    assert gradient.matmul == (2 + (5 if implementation == "xla" else 7)) * causal * product
    # 128 first and 128 latest keys: 1, 2, 3, 3, ... of 8 blocks; two dense heads beside two such.
    some = attention_flops(lambda: Mask((Full(), Streaming(128, 128)), (0, 1, 1, 0)), implementation=implementation)
    assert some.matmul == 2 * (causal + (1 + 2 + 6 * 3)) * product // 2


def test_attention_that_data_decide_is_counted_at_its_fullest():
    full = 2 * 2 * 2 * 4 * 64 * 128**2  # both products of a block
    packed = attention_flops(lambda: Mask(segments=jnp.zeros((2, 1024), jnp.int32)))
    assert packed == plan.Flops(packed.total, 36 * full, (NOTE,))
    heads = attention_flops(lambda: Mask((Full(), Streaming(128, 128)), jnp.arange(4) % 2))
    assert heads == plan.Flops(heads.total, 36 * full, (NOTE,))
    late = attention_flops(lambda: Mask(offset=jnp.int32(0)))
    assert late == plan.Flops(late.total, 64 * full, (NOTE,))


def test_padded_heads_count_what_the_kernel_multiplies():
    counted = attention_flops(Mask, shape=(1, 128, 2, 2, 80), implementation="interpret")
    assert counted.matmul == 2 * 2 * 2 * 128 * 128**2


def test_attention_on_a_mesh_counts_the_same():
    """Samples and heads are split; a device counts the mean head."""
    mask = functools.partial(Mask, (Full(), Streaming(128, 128)), (0, 1, 0, 0))
    with jax.set_mesh(make_mesh({"data": 2, "tensor": 2}, jax.devices()[:4])):
        split = attention_flops(mask, gradient=True)
    assert split.matmul == attention_flops(mask, gradient=True).matmul
    assert split.notes == ()


def test_unused_gradients_of_attention_are_not_counted():
    def f(q, k):
        return jnp.sum(attend(q, k, k, mask=Mask(), implementation="xla"))

    q = jax.ShapeDtypeStruct((1, 1024, 1, 64), jnp.float32)
    counted = plan.count_flops(jax.jit(jax.grad(f)).trace(q, q).jaxpr)
    assert counted.matmul == (2 + 3) * 36 * 2 * 64 * 128**2


def test_a_batch_of_attentions_counts_each():
    def f(q):
        return jax.vmap(lambda q: attend(q, q, q, mask=Mask(), implementation="xla"))(q)

    assert flops(f, (3, 1, 1024, 1, 64)).matmul == 3 * 2 * 36 * 2 * 64 * 128**2


@pytest.mark.parametrize("implementation", ["xla", "interpret"])
def test_decoding_counts_a_full_cache(implementation):
    def f(q, k, v, ranges):
        return decode_attention(q, k, v, ranges, implementation=implementation)[0]

    q, k = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((2, 4, 64), (2, 2, 4096, 64)))
    counted = plan.count_flops(jax.jit(f).trace(q, k, k, jax.ShapeDtypeStruct((2, 1, 4), jnp.int32)).jaxpr)
    assert counted.matmul == 2 * 2 * 2 * 4 * 64 * 4096
    assert counted.notes == (NOTE,)


def test_the_packed_product_counts_in_its_kernel():
    x, side = jnp.zeros((16, 256), jnp.bfloat16), jnp.ones((2, 128), jnp.bfloat16)
    w = PackedInt4(jnp.zeros((128, 64), jnp.uint16), side, side, 128)
    traced = jax.jit(functools.partial(w4a16_matmul, implementation="interpret")).trace(x, w)
    counted = plan.count_flops(traced.jaxpr)
    assert counted.matmul == 2 * 16 * 256 * 128
    assert counted.notes == ()


# --- Collectives in compiled text.

# In libtpu's way: no trip counts, layouts with brackets, a counter that is copied, 7 = ceil((15 - 1) / 2) trips.
TPU_TEXT = """HloModule jit_step, is_scheduled=true

%sum (x: f32[], y: f32[]) -> f32[] {
  %y = f32[]{:T(256)} parameter(1)
  %x = f32[]{:T(256)} parameter(0)
  ROOT %add.1 = f32[]{:T(256)} add(%x, %y)
}

%all-reduce-scatter.1 (input.1: bf16[16,32]) -> bf16[4,32] {
  %input.1 = bf16[16,32]{1,0:T(8,128)(2,1)} parameter(0)
  %all-reduce.1 = bf16[16,32]{1,0:T(8,128)(2,1)} all-reduce(%input.1), replica_groups={{0,1,2,3}}, to_apply=%sum
  %constant.9 = u32[] constant(0)
  ROOT %dynamic-slice.1 = bf16[4,32]{1,0:T(8,128)(2,1)} dynamic-slice(%all-reduce.1, %constant.9, %constant.9)
}

%body (param.1: (s32[], bf16[16,32], /*index=2*/s32[])) -> (s32[], bf16[16,32], s32[]) {
  %param.1 = (s32[]{:T(128)}, bf16[16,32]{1,0:T(8,128)(2,1)}, /*index=2*/s32[]{:T(128)}) parameter(0)
  %constant.2 = s32[]{:T(128)} constant(2)
  %get-tuple-element.1 = s32[]{:T(128)} get-tuple-element(%param.1), index=0
  %get-tuple-element.2 = bf16[16,32]{1,0:T(8,128)(2,1)} get-tuple-element(%param.1), index=1
  %get-tuple-element.3 = s32[]{:T(128)} get-tuple-element(%param.1), index=2
  %add.2 = s32[]{:T(128)} add(%get-tuple-element.1, %constant.2)
  %fusion.1 = bf16[4,32]{1,0:T(8,128)(2,1)S(1)} fusion(%get-tuple-element.2), kind=kCustom, calls=%all-reduce-scatter.1
  %all-gather.1 = bf16[16,32]{1,0:T(8,128)(2,1)} all-gather(%fusion.1), replica_groups={{0,1,2,3}}, dimensions={0}
  ROOT %tuple.1 = (s32[]{:T(128)}, bf16[16,32]{1,0}, s32[]{:T(128)}) tuple(%add.2, %all-gather.1, %get-tuple-element.3)
}

%condition (param.2: (s32[], bf16[16,32], s32[])) -> pred[] {
  %constant.3 = s32[]{:T(128)} constant(15)
  %param.2 = (s32[]{:T(128)}, bf16[16,32]{1,0:T(8,128)(2,1)}, s32[]{:T(128)}) parameter(0)
  %get-tuple-element.4 = s32[]{:T(128)} get-tuple-element(%param.2), index=0
  ROOT %lt.1 = pred[]{:T(512)} compare(%get-tuple-element.4, %constant.3), direction=LT
}

ENTRY %main (param.3: bf16[16,32]) -> bf16[16,32] {
  %param.3 = bf16[16,32]{1,0:T(8,128)(2,1)} parameter(0)
  %constant.4 = s32[]{:T(128)} constant(1)
  %copy.1 = s32[]{:T(128)} copy(%constant.4)
  %tuple.2 = (s32[]{:T(128)}, bf16[16,32]{1,0}, s32[]{:T(128)}) tuple(%copy.1, %param.3, %constant.4)
  %while.1 = (s32[]{:T(128)}, bf16[16,32]{1,0}, s32[]{:T(128)}) while(%tuple.2), condition=%condition, body=%body
  ROOT %get-tuple-element.5 = bf16[16,32]{1,0:T(8,128)(2,1)} get-tuple-element(%while.1), index=1
}
"""

# In the GPU's way: asynchronous pairs, tuples, an asynchronous call, a conditional.
GPU_TEXT = """HloModule jit_step, is_scheduled=true

%scattered (a: f32[8,4]) -> f32[2,4] {
  %a = f32[8,4]{1,0} parameter(0)
  ROOT %reduce-scatter.1 = f32[2,4]{1,0} reduce-scatter(%a), replica_groups=[2,4]<=[4,2]T(1,0), to_apply=%sum
}

%sum (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %add.1 = f32[] add(%x, %y)
}

%small (b: s8[10]) -> s8[10] {
  %b = s8[10]{0} parameter(0)
  ROOT %permute.1 = s8[10]{0} collective-permute(%b), source_target_pairs={{0,1},{1,0}}
}

%large (c: s8[10]) -> s8[10] {
  %c = s8[10]{0} parameter(0)
  ROOT %sum.1 = pred[30]{0} all-reduce(%c), to_apply=%sum
}

ENTRY %main (p: f32[8,4], q: s8[10]) -> f32[8,4] {
  %p = f32[8,4]{1,0} parameter(0)
  %q = s8[10]{0} parameter(1)
  %all-gather-start = ((f32[8,4]{1,0}), f32[16,4]{1,0}) all-gather-start(%p), dimensions={0}
  %all-gather-done = f32[16,4]{1,0} all-gather-done(%all-gather-start)
  %all-reduce.2 = (f32[8,4]{1,0}, f8e4m3fn[6]{0}) all-reduce(%p, %q), to_apply=%sum
  %async-start = ((f32[8,4]{1,0}), f32[2,4]{1,0}, s32[]) async-start(%p), calls=%scattered
  %async-done = f32[2,4]{1,0} async-done(%async-start), calls=%scattered
  %conditional.1 = s8[10]{0} conditional(%q, %q, %q), branch_computations={%small, %large}
  ROOT %copy.1 = f32[8,4]{1,0} copy(%p)
}
"""


def test_a_loop_without_annotation_is_counted_from_its_bounds():
    assert plan.count_collectives(TPU_TEXT) == {"all-gather": 7 * 16 * 32 * 2, "reduce-scatter": 7 * 4 * 32 * 2}


def test_a_loop_of_unknown_length_counts_once():
    text = TPU_TEXT.replace("copy(%constant.4)", "negate(%constant.4)")
    assert plan.count_collectives(text) == {"all-gather": 16 * 32 * 2, "reduce-scatter": 4 * 32 * 2}


def test_the_annotation_of_a_loop_goes_first():
    annotated = 'body=%body, backend_config={"known_trip_count":{"n":"3"}}'
    assert plan.count_collectives(TPU_TEXT.replace("body=%body", annotated))["all-gather"] == 3 * 16 * 32 * 2


def test_asynchronous_collectives_count_once_and_conditionals_as_their_largest_branch():
    assert plan.count_collectives(GPU_TEXT) == {
        "all-gather": 16 * 4 * 4,
        "all-reduce": 8 * 4 * 4 + 6 + 30,
        "reduce-scatter": 2 * 4 * 4,
    }


def test_text_that_is_no_program_is_refused():
    with pytest.raises(ValueError, match=r"as_text\(\)"):
        plan.count_collectives("nothing")


# --- Topologies.


@pytest.mark.parametrize("name", ["b200:8", "h200", "h200:2x2x2", "h200:0", "v5p:2x2", "v5e:8", "cpu:2x2", "cpu:x", ""])
def test_an_unknown_topology_names_the_valid_forms(name):
    with pytest.raises(ValueError, match=rf"{re.escape(repr(name))} is unknown; use h200:8.*v5p:2x2x2.*cpu:8"):
        plan.topology(name)


def test_too_few_simulated_devices_say_how_to_get_them():
    with pytest.raises(RuntimeError, match="xla_force_host_platform_device_count=4096"):
        plan.topology("cpu:4096")


@pytest.mark.parametrize("gpu", ["h200", "h100", "a100"])
def test_gpu_targets_agree_with_the_chip_table(gpu):
    target = (TARGETS / f"{gpu}.textproto").read_text()
    value = {key: int(re.findall(rf"{key}: (\d+)", target)[0]) for key in ("device_memory_size", "memory_bandwidth")}
    assert value["device_memory_size"] == plan.CHIPS[gpu].memory_bytes
    # A data sheet rounds the bandwidth to three digits.
    assert value["memory_bandwidth"] == pytest.approx(plan.CHIPS[gpu].bandwidth, rel=1e-3)


def test_hosts_and_gpus_are_told_apart():
    devices = plan.topology("h200:32x8").devices
    assert [device.process_index for device in devices] == [i // 8 for i in range(256)]


BUSY = "ABORTED: Internal error when accessing libtpu multi-process lockfile."


def test_libtpu_is_waited_for(monkeypatch, capsys):
    answers = iter([BUSY, BUSY, None])

    def find(*_):
        if message := next(answers):
            raise jax.errors.JaxRuntimeError(message)
        return topologies.TopologyDescription(jax.devices())

    monkeypatch.setattr(topologies, "get_topology_desc", find)
    monkeypatch.setattr(plan.time, "sleep", lambda seconds: None)
    assert plan.topology("v5p:2x2x2").chip.name == "TPU v5p"
    assert capsys.readouterr().err.count("waiting for another process") == 1


@pytest.mark.parametrize(
    ("message", "error", "says"),
    [
        (BUSY, RuntimeError, "end the other process that holds libtpu"),
        ("INVALID_ARGUMENT: not divisible", ValueError, "no such topology"),
        ("JAX TPU support not installed", RuntimeError, re.escape("pip install 'lumen[aot]'")),
    ],
)
def test_failures_to_find_a_topology_say_what_to_do(monkeypatch, message, error, says):
    def find(*_):
        raise jax.errors.JaxRuntimeError(message)

    monkeypatch.setattr(topologies, "get_topology_desc", find)
    with pytest.raises(error, match=says):
        plan.topology("v5p:2x2x2", lock_wait=-1.0)


# --- Real compilers, in child processes.

LAYERS, WIDTH, HIDDEN, ROWS = 3, 256, 1024, 64

STEP = """
import sys

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec as P

from lumen import plan, sharding


def step(params, momentum, x):
    def loss(params):
        def layer(x, w):
            return x + jnp.tanh(x @ w[0].astype(jnp.bfloat16)) @ w[1].astype(jnp.bfloat16), None

        return jnp.mean(jax.lax.scan(jax.checkpoint(layer), x, params)[0].astype(jnp.float32) ** 2)

    value, grads = jax.value_and_grad(loss)(params)
    momentum = jax.tree.map(lambda m, g: 0.9 * m + g, momentum, grads)
    return jax.tree.map(lambda p, m: p - 0.1 * m, params, momentum), momentum, value


place = plan.topology(sys.argv[1])
mesh = sharding.make_mesh({"fsdp": 4, "tensor": 2}, place.devices)
for layers, width, hidden, rows in (map(int, size.split(",")) for size in sys.argv[2:]):
    def array(dtype, shape, *spec):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(*spec)))

    params = (
        array(jnp.float32, (layers, width, hidden), None, "fsdp", "tensor"),
        array(jnp.float32, (layers, hidden, width), None, "tensor", "fsdp"),
    )
    made = plan.compile_plan(
        jax.jit(step, donate_argnums=(0, 1)), params, params, array(jnp.bfloat16, (rows, width), "fsdp"),
        topology=place, mesh=mesh,
    )
    print(plan.format_plan(made))
    print(plan.plan_json(made))
"""


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """Plans of a small step and of one with 128 GiB of parameters and momentum per device, by topology."""
    script = tmp_path_factory.mktemp("plan") / "step.py"
    script.write_text(STEP)

    @functools.cache
    def run(name):
        sizes = [(LAYERS, WIDTH, HIDDEN, ROWS), (64, 16384, 65536, ROWS)]
        arguments = [",".join(map(str, size)) for size in sizes]
        code, output = plan.run_isolated([str(script), name, *arguments], topology=name, timeout=300.0)
        assert code == 0, output
        return output, *(json.loads(line) for line in output.splitlines() if line.startswith("{"))

    return run


@pytest.mark.parametrize("name", ["h200:8", "v5p:2x2x2"])
def test_a_small_step_fits(compiled, name):
    output, small, _ = compiled(name)
    weights = LAYERS * WIDTH * HIDDEN * 2  # elements of both arrays
    assert small["fits"]
    assert small["verdict"] == f"fits: {plan._size(small['peak_bytes'])} of {plan._size(small['capacity_bytes'])}"
    assert small["devices"] == 8
    assert small["mesh"] == "fsdp=4 tensor=2"
    # Per device: an eighth of float32 parameters and momentum, a quarter of the bfloat16 rows.
    assert small["argument_bytes"] == 2 * weights * 4 // 8 + ROWS * WIDTH * 2 // 4
    assert sum(small["argument_parts"].values()) == small["argument_bytes"]
    assert small["alias_bytes"] == 2 * weights * 4 // 8
    assert (
        small["peak_bytes"]
        == sum(small[f"{part}_bytes"] for part in ("argument", "output", "temporary", "code")) - (small["alias_bytes"])
    )
    # Forward two products, one recomputed in the backward pass, and four for the gradients.
    assert small["matmul_flops"] == 7 * LAYERS * 2 * ROWS * WIDTH * HIDDEN
    assert small["flops_per_device"] == small["flops"] / 8
    chip = plan.CHIPS[name.partition(":")[0]]
    assert small["compute_seconds"] == pytest.approx(small["matmul_flops"] / 8 / chip.peak_flops)
    assert small["memory_seconds"] == pytest.approx(small["argument_bytes"] / chip.bandwidth)
    # Each layer's weights in bfloat16 are gathered over fsdp, forward and backward; tensor keeps them split in two.
    assert small["collective_bytes"]["all-gather"] >= 2 * weights * 2 // 2
    # Gradients come back split over all eight devices, in bfloat16.
    assert small["collective_bytes"]["reduce-scatter"] == weights * 2 // 8
    assert small["notes"] == []
    assert f"at least {small['compute_seconds'] * 1e3:.3f} ms" in output


@pytest.mark.parametrize("name", ["h200:8", "v5p:2x2x2"])
def test_a_large_step_does_not_fit(compiled, name):
    _, _, large = compiled(name)
    arguments = 2 * 64 * 16384 * 65536 * 2 * 4 // 8 + ROWS * 16384 * 2 // 4
    assert not large["fits"]
    assert large["argument_bytes"] == arguments
    assert large["peak_bytes"] > arguments
    need, have = plan._size(large["peak_bytes"]), plan._size(large["capacity_bytes"])
    assert large["verdict"] == f"does not fit, because one device needs {need} (128.0 GiB of arguments) and has {have}"
    assert large["capacity_bytes"] == plan.CHIPS[name.partition(":")[0]].memory_bytes


COLLECTIVES = """
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec as P

from lumen import plan, sharding

place = plan.topology("cpu:8")
mesh = sharding.make_mesh({"data": 8}, place.devices)


def local(x):  # [16, 32] on each device
    def body(x, _):
        return jnp.tanh(jax.lax.psum(x, "data")), None

    x = jax.lax.scan(body, x, None, length=5)[0]
    x = jax.lax.while_loop(lambda x: x[0, 0] < 0, lambda x: jax.lax.ppermute(x, "data", [(0, 1), (1, 0)]), x)
    return jax.lax.all_gather(x, "data", tiled=True)


f = jax.shard_map(local, mesh=mesh, in_specs=P("data"), out_specs=P("data"), check_vma=False)
x = jax.ShapeDtypeStruct((128, 32), jnp.float32, sharding=NamedSharding(mesh, P("data")))
assert plan.in_child()
print(plan.plan_json(plan.compile_plan(jax.jit(f), x, topology=place, mesh=mesh)))
"""


def test_collectives_of_a_simulated_mesh(tmp_path):
    (tmp_path / "collectives.py").write_text(COLLECTIVES)
    code, output = plan.run_isolated([str(tmp_path / "collectives.py")], topology="cpu:8", timeout=300.0)
    assert code == 0, output
    made = json.loads(output.splitlines()[-1])
    assert made["collective_bytes"] == {
        "all-reduce": 5 * 16 * 32 * 4,
        "all-gather": 8 * 16 * 32 * 4,
        "collective-permute": 16 * 32 * 4,
    }
    assert made["notes"] == [
        "a while loop of unknown length is counted once",
        "collectives in loops of unknown length are counted once",
    ]
    assert made["compute_seconds"] is None


def test_arguments_elsewhere_are_refused():
    place = plan.topology("h200:8")
    mesh = jax.sharding.Mesh([place.devices[0]], ("data",))
    with pytest.raises(ValueError, match="no argument is on h200:8"):
        plan.compile_plan(jax.jit(jnp.sin), jax.ShapeDtypeStruct((2,), jnp.float32), topology=place, mesh=mesh)


# --- The child process.


@pytest.fixture
def script(tmp_path):
    def write(text):
        (tmp_path / "child.py").write_text(text)
        return [str(tmp_path / "child.py"), "--flag=1"]

    return write


def test_an_aborting_compiler_is_survived_and_reported(script, capfd):
    argv = script("import os\nprint('LLVM ERROR: cannot select', flush=True)\nos.abort()\n")
    code, output = plan.run_isolated(argv, topology="h200:8")
    assert code == 128 + 6
    assert (
        "h200:8: the process that compiles died of SIGABRT; its last lines were:\n  LLVM ERROR: cannot select" in output
    )
    assert capfd.readouterr().out == output  # shown, once


def test_a_childs_own_exit_status_and_environment_are_kept(script):
    argv = script(
        "import os, sys\nfrom lumen import plan\n"
        "print(plan.in_child(), sys.argv[1], os.environ['JAX_PLATFORMS'], os.environ['XLA_FLAGS'])\nsys.exit(3)\n"
    )
    code, output = plan.run_isolated(argv, topology="cpu:8")
    assert code == 3
    assert re.fullmatch(r"True --flag=1 cpu .*--xla_force_host_platform_device_count=8\n", output)
    assert not plan.in_child()


@pytest.mark.skipif(sys.platform != "linux", reason="the compiler's wheels are for Linux")
def test_the_childs_path_has_the_assembler(script):
    argv = script("import shutil\nprint(shutil.which('ptxas'))\n")
    assert plan.run_isolated(argv, topology="h200:8")[1].strip().endswith("bin/ptxas")


def test_a_child_that_hangs_is_stopped(script):
    argv = script("import time\nprint('compiling', flush=True)\ntime.sleep(60)\n")
    code, output = plan.run_isolated(argv, topology="v5e:2x2", timeout=1.0)
    assert code == 124
    assert "v5e:2x2: the process that compiles was stopped after 1 s; its last lines were:\n  compiling" in output


def test_a_bad_topology_starts_no_child(script):
    with pytest.raises(ValueError, match="is unknown"):
        plan.run_isolated(script("raise SystemExit(9)"), topology="h300:8")


@pytest.mark.parametrize(
    ("size", "text"), [(None, "unknown"), (0, "0.0 B"), (1023, "1023.0 B"), (2**20, "1.0 MiB"), (3 << 51, "6144.0 TiB")]
)
def test_sizes_are_readable(size, text):
    assert plan._size(size) == text
