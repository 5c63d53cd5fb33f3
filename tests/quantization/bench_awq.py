"""Time and memory of `lumen quantize awq` on this machine: python tests/quantization/bench_awq.py --sequences 16 128

Llama of 12 layers, width 768, 12 query and 4 key/value heads, hidden width 2048, vocabulary 32000 (125M parameters),
random weights, float32; calibration sequences of 512 bytes of random words. Each number of sequences has a process of
its own, so that its peak memory is its own.
"""

import argparse
import os
import pathlib
import random
import subprocess
import sys
import tempfile
import time

LENGTH, WIDTH, DEPTH = 512, 768, 12


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, nargs="+", default=[16, 128], metavar="N", help="default 16 128")
    sequences = parser.parse_args().sequences
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        # A child inherits the peak memory of the process that starts it: this one never imports jax.
        build = f"import sys; sys.path.insert(0, {str(pathlib.Path(__file__).parent)!r}); import bench_awq as bench; "
        subprocess.run([sys.executable, "-c", build + f"bench.build({str(folder / 'model')!r})"], check=True)
        words = ["".join(random.Random(i).choices("etaoinshrdlu", k=2 + i % 8)) for i in range(500)]
        (folder / "text.txt").write_text(" ".join(random.Random(0).choices(words, k=LENGTH * max(sequences))))
        print("| sequences | time | CPU time | time per block | peak memory | block inputs kept |")
        print("|---" * 6 + "|", flush=True)
        for count in sequences:
            seconds, cpu, block, peak = quantize(folder, count)
            kept = count * LENGTH * WIDTH * 4 / 2**20
            print(
                f"| {count} | {seconds:.0f} s | {cpu:.0f} s | {block:.1f} s | {peak:.0f} MiB | {kept:.0f} MiB |",
                flush=True,
            )


def build(path: str) -> None:
    """Writes the random model."""
    from flax import nnx

    from lumen.language import pretrained
    from lumen.language.decoder import Decoder, DecoderConfig

    config = DecoderConfig(width=WIDTH, depth=DEPTH, heads=12, kv_heads=4, head_dim=64, hidden=2048, vocabulary=32000)
    pretrained.save(path, Decoder(config, rngs=nnx.Rngs(0)))


def quantize(folder: pathlib.Path, sequences: int) -> tuple[float, float, float, float]:
    """Quantises the model of a folder: seconds, CPU seconds, seconds from one block to the next, peak MiB."""
    target = folder / f"quantised_{sequences}"
    command = [sys.executable, "-m", "lumen.cli", "quantize", "awq", "--model", folder / "model", "--out", target]
    command += ["--calibration", folder / "text.txt", "--tokenizer", "bytes"]
    command += ["--windows", str(sequences), "--length", str(LENGTH)]
    start, finished, done = time.perf_counter(), {}, 0
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while not done:
        time.sleep(0.1)
        for block in target.with_name(f".{target.name}.unfinished").glob("block_*"):
            finished.setdefault(block.name, time.perf_counter())
        done, status, usage = os.wait4(process.pid, os.WNOHANG)
    if status:
        raise SystemExit(f"bench_awq: quantising with {sequences} sequences failed with status {status}.")
    times = sorted(finished.values())
    return (
        time.perf_counter() - start,
        usage.ru_utime + usage.ru_stime,
        (times[-1] - times[0]) / (DEPTH - 1),
        usage.ru_maxrss / 2**10,
    )


if __name__ == "__main__":
    main()
