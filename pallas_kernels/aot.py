"""Device-free compilation: registers, spills, shared memory and machine instructions of every Mosaic GPU kernel.

    [report] = compile_report(my_kernel, jax.ShapeDtypeStruct((512, 512), jnp.bfloat16))
    assert report.spill_bytes == 0 and report.count("HGMMA") > 0

No GPU is needed: JAX compiles for a chip described by a text proto (`targets/<name>.textproto`), and Mosaic's own dump
switches give the assembler's resource report and the listing. A child process does the work, because an error in LLVM
or in the assembler aborts the process that it happens in. Needs `pip install 'lumen[aot]'`.
"""

import collections
import dataclasses
import importlib.util
import multiprocessing
import os
import pathlib
import pickle
import re
import signal
import tempfile
from collections.abc import Callable, Sequence
from unittest import mock

TARGETS = pathlib.Path(__file__).parent / "targets"
TENSOR = ("HGMMA", "IGMMA", "QGMMA", "HMMA", "IMMA")  # wgmma is HGMMA (16-bit), IGMMA (int8) or QGMMA (fp8)
# What a reader asks first: tensor cores, asynchronous copies, shared-memory traffic, spills, conversions, shuffles.
# fmt: off
SHOWN = (*TENSOR, "UTMALDG", "UTMASTG", "LDGSTS", "LDG", "STG", "LDS", "STS", "LDSM", "STSM", "LDL", "STL", "SHFL",
         "PRMT", "LOP3", "SHF", "IMAD", "I2F", "F2F", "HFMA2", "HMUL2", "HADD2", "FFMA")
# fmt: on


@dataclasses.dataclass(frozen=True)
class KernelReport:
    """One compiled kernel. Instruction names are base opcodes of the machine code."""

    name: str
    registers: int  # per thread at launch, before any setmaxnreg
    spill_bytes: int  # spill stores + spill loads
    stack_bytes: int
    shared_bytes: int  # scratch and barriers of one thread block
    serialised_wgmma: bool  # the assembler put a wait after every wgmma (its warning C7510)
    instructions: dict[str, int]  # static count over the whole kernel
    hot_loop: dict[str, int]  # static count inside the innermost loop that holds most tensor-core instructions

    def count(self, opcode: str) -> int:
        """How often an opcode occurs in the kernel."""
        return self.instructions.get(opcode, 0)

    def __str__(self):
        def line(name, counts):
            shown = " ".join(f"{opcode}:{counts[opcode]}" for opcode in SHOWN if opcode in counts)
            return f"  {name} ({sum(counts.values())}): {shown}"

        head = (
            f"{self.name}: {self.registers} registers, {self.spill_bytes} B spilled, {self.stack_bytes} B stack, "
            f"{self.shared_bytes} B shared{', WGMMA SERIALISED' if self.serialised_wgmma else ''}"
        )
        return "\n".join([head, line("all ", self.instructions), line("loop", self.hot_loop)])


class CompileError(RuntimeError):
    """The compiler raised, aborted or took too long; the message names the function and ends with the log's end."""


def compile_report(fn: Callable, *args, target: str = "h200", timeout: float = 540.0) -> list[KernelReport]:
    """Reports every Mosaic GPU kernel in one function; see compile_reports."""
    return compile_reports([(fn, args)], target=target, timeout=timeout)[0]


def compile_reports(
    cases: Sequence[tuple[Callable, tuple]], *, target: str = "h200", timeout: float = 540.0
) -> list[list[KernelReport]]:
    """Compiles `jax.jit(fn)` for an absent GPU, for every case in turn in one child process.

    Args:
      cases: (fn, args) each. fn is a module-level function of an importable file, or a functools.partial of one: it
        is pickled by reference, and a script that calls this needs `if __name__ == "__main__":`. args are pytrees of
        arrays or jax.ShapeDtypeStruct; only shapes and dtypes are used.
      target: name of a file in `targets`: "h200", "h100" or "a100".
      timeout: seconds for all cases together.
    Returns:
      For every case, one report per kernel in the order in which they were compiled.
    Raises:
      CompileError: at the first case that fails.
      ValueError: for an unknown target.
    """
    import jax  # here, so that the child can set its environment first

    known = sorted(path.stem for path in TARGETS.glob("*.textproto"))
    if target not in known:
        raise ValueError(f"compile_reports: target={target!r} is unknown; use one of {', '.join(known)}.")
    cases = [(fn, jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), args)) for fn, args in cases]
    tools = importlib.util.find_spec("nvidia")
    roots = tools.submodule_search_locations if tools else ()
    path = [str(path) for root in roots or () for path in sorted(pathlib.Path(root).glob("*/bin"))]
    with tempfile.TemporaryDirectory() as folder:
        environment = {
            "JAX_PLATFORMS": "cpu",
            "JAX_ENABLE_COMPILATION_CACHE": "false",  # what is found there leaves no listing
            "MOSAIC_GPU_DUMP_TO": folder,
            "PATH": os.pathsep.join([*path, os.environ.get("PATH", "")]),
        }
        log, reports = pathlib.Path(folder, "log.txt"), pathlib.Path(folder, "reports.pickle")
        child = multiprocessing.get_context("spawn").Process(target=_compile, args=(cases, target, folder))
        with mock.patch.dict(os.environ, environment):
            child.start()
        child.join(timeout)
        if child.is_alive():
            child.kill()
            child.join()
            how = f"stopped after {timeout:.0f} s"
        elif child.exitcode:
            how = signal.Signals(-child.exitcode).name if child.exitcode < 0 else f"exit code {child.exitcode}"
        else:
            return pickle.loads(reports.read_bytes())
        text = log.read_text(errors="replace") if log.exists() else ""
        raise CompileError(f"compiling for {target}: {how}\n{text[-4000:]}")


def _compile(cases, target: str, folder: str) -> None:
    """Runs in the child. Everything it prints, C++ included, goes to the log."""
    descriptor = os.open(os.path.join(folder, "log.txt"), os.O_WRONLY | os.O_CREAT)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    import jax
    from jax.experimental import topologies

    text = (TARGETS / f"{target}.textproto").read_text()
    topology = topologies.get_topology_desc("aot", "cuda", target_config=text, topology="1x1x1")
    sharding = jax.sharding.SingleDeviceSharding(topology.devices[0])
    reports, dumps = [], pathlib.Path(folder)
    for number, (fn, args) in enumerate(cases):
        os.write(2, f"\ncase {number}: {fn} of {args}\n".encode())
        args = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), args)
        jax.jit(fn).lower(*args).compile()
        # The files of one kernel do not always carry the same number; each kind comes in the order of the kernels.
        kinds = ("*.ptxas", "*.resources.txt", "*.sass_ctrl")
        made = [sorted(dumps.glob(kind), key=lambda path: path.stat().st_mtime_ns) for kind in kinds]
        if made[0] and not made[2]:
            raise CompileError("no machine code was listed: pip install nvidia-cuda-nvdisasm")
        reports.append([_read(*files) for files in zip(*made, strict=True)])
        for path in dumps.iterdir():  # 20 MB for every kernel
            if path.name != "log.txt":
                path.unlink()
    (dumps / "reports.pickle").write_bytes(pickle.dumps(reports))


def _read(ptxas_file: pathlib.Path, resources_file: pathlib.Path, listing: pathlib.Path) -> KernelReport:
    ptxas, resources = ptxas_file.read_text(), resources_file.read_text()

    def numbers(pattern, text):
        found = re.search(pattern, text)
        if found is None:
            raise CompileError(f"{ptxas_file.name}: no {pattern!r} in\n{text}")
        return [int(number) for number in found.groups()]

    stack, stores, loads = numbers(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", ptxas)
    barriers = sum(int(n) * int(times) for n, times in re.findall(r"num_barriers=(\d+)[^)]*\): (\d+)", resources))
    instructions, hot_loop = count_instructions(listing.read_text())
    return KernelReport(
        name=ptxas_file.stem,
        registers=numbers(r"Used (\d+) registers", ptxas)[0],
        spill_bytes=stores + loads,
        stack_bytes=stack,
        shared_bytes=numbers(r"smem_scratch_bytes=(\d+)", resources)[0] + 8 * barriers,
        serialised_wgmma="C7510" in ptxas or "serialized" in ptxas,
        instructions=instructions,
        hot_loop=hot_loop,
    )


def count_instructions(listing: str) -> tuple[dict[str, int], dict[str, int]]:
    """Base opcodes in nvdisasm's listing, and in its innermost loop with most tensor-core instructions."""
    opcodes, labels, jumps = [], {}, []
    for line in listing.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(opcodes)
        elif found := re.search(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)", line):
            # The back edge of a loop is predicated; a plain BRA backwards only returns from an out-of-line wait.
            if found[1] == "BRA" and "@" in line and (to := re.search(r"`\((\.L_x_\d+)\)", line)):
                jumps.append((len(opcodes), to[1]))
            opcodes.append(found[1])
    loops = [(labels[to], at + 1) for at, to in jumps if labels.get(to, at + 1) <= at]

    def tensor(span):
        return sum(opcode in TENSOR for opcode in opcodes[slice(*span)])

    def inside(a, b):
        return b[0] <= a[0] and a[1] <= b[1] and a != b

    innermost = [span for span in loops if not any(inside(other, span) and tensor(other) for other in loops)]
    hot = max(innermost, key=lambda span: (tensor(span), span[1] - span[0]), default=(0, 0))
    return dict(collections.Counter(opcodes)), dict(collections.Counter(opcodes[slice(*hot)]))
