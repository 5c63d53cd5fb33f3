"""What a step needs on hardware that is absent: memory, FLOPs and communication per device, from a CPU-only machine.

    place = topology("h200:32x8")
    mesh = sharding.make_mesh({"fsdp": -1}, place.devices)
    plan = compile_plan(train_step, params, batch, topology=place, mesh=mesh)  # shapes with shardings over the mesh
    print(format_plan(plan))

The target's own compiler does the work, and can abort the whole process: run_isolated gives it a process of its own.
"""

import dataclasses
import functools
import inspect
import json
import math
import os
import pathlib
import re
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from subprocess import PIPE, STDOUT, Popen

import jax
from jax.errors import JaxRuntimeError
from jax.experimental import topologies
from jax.interpreters import partial_eval

from lumen.io.checkpoint import named_leaves
from pallas_kernels.aot import TARGETS
from pallas_kernels.operations import stated_flops

FORMS = (
    "h200:8, h100:8 or a100:8 (GPUs of one host), h200:32x8 (hosts x GPUs per host), v5p:2x2x2, v5e:4x8 or v6e:4x8 "
    "(TPU chips along each axis), cpu:8 (simulated devices)"
)


@dataclasses.dataclass(frozen=True)
class Chip:
    """One accelerator. A simulated one has no speed."""

    name: str
    memory_bytes: int  # what a program can use
    peak_flops: float | None  # dense bf16 FLOP/s of the matrix units
    bandwidth: float | None  # bytes/s of the device memory


CHIPS: Mapping[str, Chip] = {
    # Memory: the total that CUDA reports. Speeds: NVIDIA's data sheets, SXM modules, without sparsity.
    "h200": Chip("NVIDIA H200", 150_110_011_392, 989.4e12, 4.8e12),
    "h100": Chip("NVIDIA H100 SXM", 84_942_979_072, 989.4e12, 3.35e12),
    "a100": Chip("NVIDIA A100 SXM 80GB", 85_100_068_864, 312e12, 2.039e12),
    # Memory: "available HBM" in the out-of-memory message of libtpu 0.0.51. Speeds: cloud.google.com/tpu/docs/<name>.
    "v5p": Chip("TPU v5p", int(95.73 * 2**30), 459e12, 2.765e12),
    "v5e": Chip("TPU v5e", int(15.75 * 2**30), 197e12, 0.819e12),
    "v6e": Chip("TPU v6e", int(31.24 * 2**30), 918e12, 1.64e12),
}
_TPUS = ("v5p", "v5e", "v6e")


@dataclasses.dataclass(frozen=True)
class Topology:
    """The devices of a named machine. Those of GPUs and TPUs can be compiled for, but run nothing."""

    name: str
    chip: Chip
    devices: Sequence


def topology(name: str, *, lock_wait: float = 600.0) -> Topology:
    """Finds the devices of a named topology; FORMS lists the names.

    A TPU v5p chip is one device: its two cores work as one. TPU names load libtpu, which one process of a machine holds
    at a time, until it ends: this waits for its turn, `lock_wait` seconds at most.

    Raises:
      ValueError: for a name of another form, or a size that the TPU compiler does not know.
      RuntimeError: if its compiler is missing, if libtpu stays busy, or if cpu:N finds fewer than N devices.
    """
    kind, sizes = _parse(name)
    if kind == "cpu":
        devices = jax.devices("cpu")[: sizes[0]]
        if len(devices) < sizes[0]:
            fix = f"start it through run_isolated, or with XLA_FLAGS=--xla_force_host_platform_device_count={sizes[0]}"
            raise RuntimeError(f"{name}: this process has {len(devices)} CPU devices; {fix}.")
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // sizes[0]  # all share this machine's
        return Topology(name, Chip("simulated CPU device", memory, None, None), devices)
    find = functools.partial(topologies.get_topology_desc, name, "tpu")
    if kind not in _TPUS:
        target = (TARGETS / f"{kind}.textproto").read_text()
        hosts, gpus = (1, *sizes)[-2:]
        size = f"{hosts}x1x{gpus}"  # the plugin's partitions x hosts x devices; each host is a partition
        find = functools.partial(topologies.get_topology_desc, kind, "cuda", target_config=target, topology=size)
    started, waited = time.monotonic(), False
    while True:
        try:
            return Topology(name, CHIPS[kind], find().devices)
        except (RuntimeError, ImportError) as error:
            if "INVALID_ARGUMENT" in str(error):
                raise ValueError(f"{name}: the compiler knows no such topology ({error}).") from error
            busy = re.search("lockfile|already in use", str(error))
            if not busy or time.monotonic() - started > lock_wait:
                fix = "end the other process that holds libtpu" if busy else "pip install 'lumen[aot]'"
                raise RuntimeError(f"{name}: no compiler for it ({error}); {fix}.") from error
        if not waited:
            print(f"{name}: waiting for another process to let go of libtpu", file=sys.stderr, flush=True)
        waited = True
        time.sleep(1.0)


def _parse(name: str) -> tuple[str, tuple[int, ...]]:
    kind, _, size = name.partition(":")
    axes = {"cpu": (1,), "v5p": (3,), "v5e": (2,), "v6e": (2,)}.get(kind, (1, 2) if kind in CHIPS else ())
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", size) or size.count("x") + 1 not in axes:
        raise ValueError(f"topology: {name!r} is unknown; use {FORMS}.")
    return kind, tuple(int(part) for part in size.split("x"))


@dataclasses.dataclass(frozen=True)
class Flops:
    """Floating-point operations over all devices; a multiply-add is 2."""

    total: int = 0
    matmul: int = 0  # the part in matrix products and convolutions
    notes: tuple[str, ...] = ()  # what could not be counted

    def __add__(self, other: "Flops") -> "Flops":
        notes = tuple(dict.fromkeys(self.notes + other.notes))
        return Flops(self.total + other.total, self.matmul + other.matmul, notes)

    def __mul__(self, times: int) -> "Flops":
        return Flops(self.total * times, self.matmul * times, self.notes)


# Primitives that only move or relabel data.
_MOVES = re.compile(
    "reshape|broadcast_in_dim|transpose|squeeze|expand_dims|slice|dynamic_slice|dynamic_update_slice|gather|scatter|"
    "concatenate|pad|rev|copy|copy_p|convert_element_type|bitcast_convert_type|iota|stop_gradient|split|pvary|get|swap|"
    "optimization_barrier|sharding_constraint|device_put|all_gather|all_to_all|ppermute|axis_index|name|random_.*wrap"
)


_AT_MOST = (
    "what data decide is counted at its fullest: attention of full rows, full caches and dense heads, sparse "
    "convolutions of full windows at full capacity"
)


def count_flops(jaxpr) -> Flops:
    """Counts the operations of a jaxpr, such as `jax.jit(f).trace(*args).jaxpr`, leaving out those with unused results.

    (The compiled program's own count, `cost_analysis`, is absent for CUDA, and sees the body of a loop once.)
    A matrix product is 2 x output elements x contracted length. A convolution likewise, including the padding but not
    the zeros of a dilated input (the gradient of a stride). Other arithmetic is one per output element, a reduction one
    per input element; sorts and Fourier transforms are thus counted too low. A scan counts times its length, a
    conditional as its largest branch, the inside of a shard_map once per device along its axes, a Pallas kernel by its
    cost estimate. Calls that state their FLOPs, as `pallas_kernels.operations.state_flops` has it, are taken at their
    word: attention counts the blocks that its masks show, with products only, a sparse convolution full windows. The
    notes tell of upper bounds, of while loops of unknown length (counted once) and of kernels without an estimate.
    """
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    return _jaxpr_flops(partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))[0])


def _jaxpr_flops(jaxpr) -> Flops:
    return sum(map(_equation_flops, getattr(jaxpr, "jaxpr", jaxpr).eqns), Flops())


def _equation_flops(equation) -> Flops:
    name, params = equation.primitive.name, equation.params
    inputs: list[Sequence[int]] = [getattr(variable.aval, "shape", ()) for variable in equation.invars]
    out = sum(math.prod(getattr(variable.aval, "shape", ())) for variable in equation.outvars)
    match name:
        case "dot_general" | "ragged_dot_general":
            numbers = params.get("ragged_dot_dimension_numbers")
            axes = (numbers.dot_dimension_numbers if numbers else params["dimension_numbers"])[0][0]
            # A ragged contracted axis is shared out between the groups.
            groups = inputs[2][-1] if numbers and set(numbers.lhs_ragged_dimensions) & set(axes) else 1
            products = out * math.prod(inputs[0][axis] for axis in axes) // groups
            return Flops(2 * products, 2 * products)
        case "conv_general_dilated":
            kernel = inputs[1]  # its input channels are those of one group
            length = math.prod(kernel) // kernel[params["dimension_numbers"].rhs_spec[0]]
            products = out * length // math.prod(params["lhs_dilation"])
            return Flops(2 * products, 2 * products)
        case "scan":
            return _jaxpr_flops(params["jaxpr"]) * params["length"]
        case "while":
            note = Flops(notes=("a while loop of unknown length is counted once",))
            return _jaxpr_flops(params["body_jaxpr"]) + _jaxpr_flops(params["cond_jaxpr"]) + note
        case "cond":
            return max(map(_jaxpr_flops, params["branches"]), key=lambda flops: flops.total)
        case "shard_map":
            axes = params.get("newly_manual_axes", params.get("manual_axes", ()))
            return _jaxpr_flops(params["jaxpr"]) * math.prod(params["mesh"].shape[axis] for axis in axes)
        case "pallas_call" | "core_map" | "mpmd_map":
            if cost := params.get("cost_estimate"):
                return Flops(cost.flops, cost.flops)
            return Flops(notes=(f"the kernel {params.get('name') or name} has no cost estimate: not counted",))
    for inner in ("jaxpr", "call_jaxpr", "call"):  # jit, checkpoint, custom_jvp, custom_vjp, custom_vmap
        if inner in params:
            if stated := stated_flops(params[inner]):
                flops, exact = stated
                return Flops(flops, flops, () if exact else (_AT_MOST,))
            return _jaxpr_flops(params[inner])
    if _MOVES.fullmatch(name):
        return Flops()
    if name.startswith("scatter"):
        return Flops(math.prod(inputs[2]))
    return Flops(math.prod(inputs[0]) if name.startswith(("reduce_", "arg")) else out)


COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.-]+) \(.*\{")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.-]+) = (.+?) ([a-z][a-z0-9-]*)\((.*)")


@dataclasses.dataclass(frozen=True)
class _Instruction:
    is_root: bool
    shape: str
    opcode: str
    text: str  # what follows the bracket before the operands

    @property
    def operands(self) -> list[str]:
        return re.findall(r"%([\w.-]+)", self.text.partition(")")[0])

    def called(self, attributes: str) -> list[str]:
        """The computations in attributes such as calls=%a or branch_computations={%a, %b}."""
        found = re.findall(rf"\b(?:{attributes})=(?:\{{([^}}]*)\}}|%?([\w.-]+))", self.text)
        return [name for several, one in found for name in re.findall(r"[\w.-]+", several or one)]


def count_collectives(hlo_text: str) -> dict[str, int]:
    """Bytes of the collectives one device takes part in, by kind, in one run of a program, `compiled.as_text()`.

    The bytes are those of a collective's result on one device. What a ring of N devices makes each of them send is, in
    these bytes: (N-1)/N for all-gather and all-to-all, 2(N-1)/N for all-reduce, N-1 for reduce-scatter, 1 for
    collective-permute. A loop counts times its trip count (once where that is unknown), a conditional as its largest
    branch. Padding is not counted.
    """
    return {kind: size for kind, size in _collectives(hlo_text).items() if kind in COLLECTIVES}


def _collectives(hlo_text: str) -> dict[str, int]:
    """Bytes by kind, and "unknown" loops: those with collectives whose trip count is not in the text."""
    computations: dict[str, dict[str, _Instruction]] = {}
    entry, current = "", {}
    for line in hlo_text.splitlines():
        if found := _INSTRUCTION.match(line):
            current[found[2]] = _Instruction(bool(found[1]), found[3], found[4], found[5])
        elif found := _COMPUTATION.fullmatch(line):
            current = computations[found[2]] = {}
            entry = found[2] if found[1] else entry
    if not entry:
        raise ValueError("count_collectives: the text has no ENTRY computation; give it compiled.as_text().")

    @functools.cache
    def walk(name: str) -> Counter[str]:
        total = Counter()
        for instruction in computations[name].values():
            # An asynchronous collective is counted where it is done: there its shape is the result alone.
            kind = instruction.opcode.removesuffix("-done").removeprefix("ragged-")
            if kind in COLLECTIVES:
                total[kind] += _shape_bytes(instruction.shape)
            elif instruction.opcode == "while":
                inside = walk(instruction.called("body")[0])
                trips = _trip_count(instruction, computations[name], computations) if inside else 0
                total.update({kind: size * (1 if trips is None else trips) for kind, size in inside.items()})
                total["unknown"] += trips is None
            elif instruction.opcode == "conditional":
                branches = instruction.called("branch_computations|true_computation|false_computation")
                total.update(max(map(walk, branches), key=Counter.total))
            elif not instruction.opcode.endswith(("-update", "-done")):  # those were walked at their -start
                for callee in instruction.called("calls|to_apply|called_computations"):
                    # libtpu's reduce-scatter is a fusion of an all-reduce and a slice, known by its name.
                    fused = callee.startswith("all-reduce-scatter")
                    total.update({"reduce-scatter": _shape_bytes(instruction.shape)} if fused else walk(callee))
        return +total

    return dict(sorted(walk(entry).items()))


def _trip_count(loop: _Instruction, around: Mapping[str, _Instruction], computations) -> int | None:
    """Trips of `for (i = constant; i < constant; i += constant)`: as XLA notes them, or (on TPUs) from the loop."""
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.text):
        return int(known[1])
    condition, body = (computations[loop.called(part)[0]] for part in ("condition", "body"))
    test, new_state = (next(i for i in where.values() if i.is_root) for where in (condition, body))
    old_state = around[loop.operands[0]]
    if test.opcode != "compare" or "direction=LT" not in test.text or {new_state.opcode, old_state.opcode} != {"tuple"}:
        return None
    counter, limit = condition[test.operands[0]], _constant(condition, test.operands[1])
    if counter.opcode != "get-tuple-element" or limit is None:
        return None
    index = int(re.findall(r"index=(\d+)", counter.text)[0])
    advance, start = body[new_state.operands[index]], _constant(around, old_state.operands[index])
    steps = [_constant(body, operand) for operand in advance.operands if advance.opcode == "add"]
    step = next(filter(None, steps), None)
    return None if step is None or start is None else max(0, math.ceil((limit - start) / step))


def _constant(computation: Mapping[str, _Instruction], name: str) -> int | None:
    while computation[name].opcode in ("copy", "bitcast", "convert"):
        name = computation[name].operands[0]
    value = re.match(r"-?\d+(?=\))", computation[name].text)
    return int(value[0]) if value and computation[name].opcode == "constant" else None


def _shape_bytes(shape: str) -> int:
    """Bytes of an HLO shape such as bf16[4,8]{1,0}, or of a tuple of them, without padding."""
    arrays = re.findall(r"[a-z]+(\d+)\w*\[([\d,]*)\]", shape.replace("pred", "u8"))
    return sum(int(bits) * math.prod(map(int, filter(None, sizes.split(",")))) for bits, sizes in arrays) // 8


@dataclasses.dataclass(frozen=True)
class Plan:
    """One compiled step. Bytes are per device; None is unknown, because the compiler gave up for lack of memory."""

    topology: str
    chip: str
    devices: int
    mesh: str  # such as "fsdp=4 tensor=2"; axes of one device left out
    argument_bytes: int
    argument_parts: dict[str, int]  # the larger ones of them, by the first two parts of their names: "model.blocks"
    output_bytes: int | None
    alias_bytes: int | None  # the part of the outputs that lies in donated arguments
    temporary_bytes: int | None
    code_bytes: int | None
    peak_bytes: int  # arguments + outputs - alias + temporaries + code: all are held while the step runs
    capacity_bytes: int
    flops: int  # over all devices, see Flops
    matmul_flops: int
    flops_per_device: float  # an even share
    collective_bytes: dict[str, int] | None  # see count_collectives
    compute_seconds: float | None  # lower bound on a step: its share of matmul_flops at the bf16 peak
    memory_seconds: float | None  # lower bound on a step that reads all of its arguments: at full memory bandwidth
    compile_seconds: float  # of the backend, without tracing
    fits: bool
    verdict: str
    notes: tuple[str, ...]  # what the numbers leave out


def compile_plan(jitted, *args, topology: Topology, mesh: jax.sharding.Mesh) -> Plan:
    """Compiles a jitted function for absent hardware and reads off what one call of it needs.

    The peak is the sum of the compiler's buffers: its own `peak_memory_in_bytes` leaves out temporaries on CPUs and
    includes on-chip memory on TPUs. Neither counts a GPU's context and communication buffers (1-2 GiB), nor arrays that
    the program holds besides the arguments. Without its GPU XLA cannot time kernels, and may choose others than there.

    Args:
      *args: trees of jax.ShapeDtypeStruct with shardings over `mesh`.
      topology: what to compile for.
      mesh: over devices of the topology; it is JAX's mesh (jax.set_mesh) while the function is traced.
    Raises:
      ValueError: if no argument is placed on the topology.
      jax.errors.JaxRuntimeError: if compilation fails for another reason than the device's memory.
    """
    leaves = [leaf for leaf in jax.tree.leaves(args) if getattr(leaf, "sharding", None) is not None]
    if not any(leaf.sharding.device_set <= set(topology.devices) for leaf in leaves):
        raise ValueError(f"compile_plan: no argument is on {topology.name}; give it shapes with shardings over `mesh`.")
    chip, capacity, notes = topology.chip, topology.chip.memory_bytes, ()
    output = alias = temporary = code = collectives = None
    with jax.set_mesh(mesh):
        traced = jitted.trace(*args)
        lowered = traced.lower()
        started = time.perf_counter()
        try:
            compiled = lowered.compile()
        except JaxRuntimeError as error:  # libtpu: "memory required ... (225.53G) exceeds available HBM (95.73G)"
            if "exceeds available HBM" not in str(error):
                raise
            seconds = time.perf_counter() - started
            amounts = re.findall(r"\(([\d.]+)([KMGT])\)", str(error))
            peak, capacity = (int(float(number) * 2 ** (10 * " KMGT".index(unit))) for number, unit in amounts[:2])
            notes = ("compilation stopped for lack of memory: outputs, temporaries and communication are unknown",)
            argument = sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)
        else:
            seconds = time.perf_counter() - started
            memory = compiled.memory_analysis()
            names = ("argument", "output", "alias", "temp", "generated_code")
            argument, output, alias, temporary, code = (getattr(memory, f"{name}_size_in_bytes") for name in names)
            peak = argument + output - alias + temporary + code
            collectives = _collectives(compiled.as_text())
            notes = ("collectives in loops of unknown length are counted once",) * bool(collectives.pop("unknown", 0))
    flops = count_flops(traced.jaxpr)
    need, have = _size(peak), _size(capacity)
    verdict = f"fits: {need} of {have}"
    if peak > capacity:
        verdict = f"does not fit, because one device needs {need} ({_size(argument)} of arguments) and has {have}"
    elif topology.devices[0].platform in ("gpu", "cuda") and peak > 0.75 * capacity:
        verdict += "; set XLA_PYTHON_CLIENT_MEM_FRACTION, because JAX takes only 0.75 of it by default"
    return Plan(
        topology=topology.name,
        chip=chip.name,
        devices=mesh.size,
        mesh=" ".join(f"{axis}={size}" for axis, size in mesh.shape.items() if size > 1) or "no split",
        argument_bytes=argument,
        argument_parts=_parts(jitted, args),
        output_bytes=output,
        alias_bytes=alias,
        temporary_bytes=temporary,
        code_bytes=code,
        peak_bytes=peak,
        capacity_bytes=capacity,
        flops=flops.total,
        matmul_flops=flops.matmul,
        flops_per_device=flops.total / mesh.size,
        collective_bytes=collectives,
        compute_seconds=flops.matmul / mesh.size / chip.peak_flops if chip.peak_flops else None,
        memory_seconds=argument / chip.bandwidth if chip.bandwidth else None,
        compile_seconds=seconds,
        fits=peak <= capacity,
        verdict=verdict,
        notes=flops.notes + notes,
    )


def _parts(jitted, args) -> dict[str, int]:
    """Bytes per device of the parts of the arguments, those under a thousandth of the whole left out."""
    parts: Counter[str] = Counter()
    for argument, tree in zip(inspect.signature(jitted).parameters, args, strict=False):
        for name, leaf, _ in named_leaves(tree):
            shape = leaf.shape if getattr(leaf, "sharding", None) is None else leaf.sharding.shard_shape(leaf.shape)
            parts[".".join((argument, *name.split(".")[:1])).rstrip(".")] += math.prod(shape) * leaf.dtype.itemsize
    return {name: size for name, size in parts.items() if 1000 * size >= parts.total()}


def format_plan(plan: Plan) -> str:
    """The plan as a table for people."""
    share = plan.matmul_flops / max(plan.flops, 1)
    rows = {
        "arguments": _size(plan.argument_bytes),
        **{f"  {name}": _size(size) for name, size in plan.argument_parts.items()},
        "outputs": f"{_size(plan.output_bytes)}, {_size(plan.alias_bytes)} of them in donated arguments",
        "temporaries, code": f"{_size(plan.temporary_bytes)}, {_size(plan.code_bytes)}",
        "peak": f"{_size(plan.peak_bytes)} of {_size(plan.capacity_bytes)}",
        "operations": f"{plan.flops_per_device:.3e} FLOP of {plan.flops:.3e}, {share:.1%} in matrix products",
    }
    rows |= {f"{kind} results": _size(size) for kind, size in (plan.collective_bytes or {}).items()}
    if plan.compute_seconds is not None and plan.memory_seconds is not None:
        rows["time for products"] = f"at least {plan.compute_seconds * 1e3:.3f} ms, at the bf16 peak"
        rows["time for arguments"] = f"at least {plan.memory_seconds * 1e3:.3f} ms, reading each once"
    head = f"{plan.topology}: {plan.devices} x {plan.chip} ({plan.mesh}), compiled in {plan.compile_seconds:.1f} s"
    table = [f"  {label:<28}{value}" for label, value in rows.items() if "unknown" not in value]
    return "\n".join([head, "one device:", *table, *(f"note: {note}" for note in plan.notes), plan.verdict])


def plan_json(plan: Plan) -> str:
    """The plan's fields as one line of JSON."""
    return json.dumps(dataclasses.asdict(plan))


def _size(count: int | None) -> str:
    if count is None:
        return "unknown"
    power = min(4, max(0, count.bit_length() - 1) // 10)
    return f"{count / 1024**power:.1f} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"


def in_child() -> bool:
    """Whether run_isolated started this process."""
    return os.environ.get("LUMEN_PLAN_CHILD") == "1"


def run_isolated(argv: Sequence[str], *, topology: str, timeout: float = 3600.0) -> tuple[int, str]:
    """Runs a Python program in a child process that is set up to compile for a topology, and shows its output.

    For a program that runs itself: `if not in_child(): sys.exit(run_isolated(sys.argv, topology=name)[0])`.
    An abort of the compiler ends the child only, and is reported with the child's last lines. The child is killed at
    the timeout, or when this process is interrupted.

    Args:
      argv: the script and its arguments, as in sys.argv.
      topology: a name; FORMS lists them.
      timeout: seconds, including those spent waiting for libtpu.
    Returns:
      The exit status as a shell has it (128 + n after signal n, 124 after a timeout), and all that was shown.
    Raises:
      ValueError: for an unknown topology.
    """
    env, started = _child_environment(topology), time.monotonic()
    lines = []
    with Popen([sys.executable, *argv], env=env, stdout=PIPE, stderr=STDOUT, text=True, errors="replace") as child:
        timer = threading.Timer(timeout, child.kill)
        timer.start()
        try:
            for line in child.stdout or ():
                lines.append(line)
                print(line, end="", flush=True)
            code = child.wait()
        finally:
            timer.cancel()
            child.kill()  # for an interruption; it does nothing to a child that has ended
    if code < 0:
        timed_out = code == -signal.SIGKILL and time.monotonic() - started >= timeout
        end = f"was stopped after {timeout:.0f} s" if timed_out else f"died of {signal.Signals(-code).name}"
        last = "".join(f"  {line}" for line in lines[-15:])
        lines.append(f"\n{topology}: the process that compiles {end}; its last lines were:\n{last}\n")
        print(lines[-1], end="", flush=True)
        code = 124 if timed_out else 128 - code
    return code, "".join(lines)


def _child_environment(topology: str) -> dict[str, str]:
    kind, sizes = _parse(topology)
    environment = {**os.environ, "LUMEN_PLAN_CHILD": "1", "JAX_PLATFORMS": "cpu"}
    # JAX stores programs for absent devices in its compilation cache, but fails to load them again, with a warning.
    environment["JAX_ENABLE_COMPILATION_CACHE"] = "false"
    if kind == "cpu":
        flags = os.environ.get("XLA_FLAGS", "")
        environment["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count={sizes[0]}"
    elif kind in _TPUS:  # what libtpu would ask the cloud for, and complain about where there is none
        environment = {"TPU_ACCELERATOR_TYPE": f"{kind}-8", "TPU_WORKER_HOSTNAMES": "localhost", **environment}
    else:  # kernels need ptxas and nvdisasm, which their wheels do not put on the path
        tools = [str(path) for root in sys.path for path in sorted(pathlib.Path(root).glob("nvidia/*/bin"))]
        environment["PATH"] = os.pathsep.join([*tools, os.environ.get("PATH", "")])
    return environment
