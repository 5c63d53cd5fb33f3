"""The `lumen` command: each subcommand is a thin call into one module.

lumen generate --model Qwen2.5-0.5B --prompt "The sea is"
lumen quantize awq --model Qwen2.5-0.5B --calibration pile-val.jsonl --out Qwen2.5-0.5B-AWQ
lumen evaluate perplexity --model Qwen2.5-0.5B-AWQ --text wikitext-2-test.txt
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status: 2 for what the user can mend, said in one line on stderr."""
    parser = argparse.ArgumentParser(
        prog="lumen", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_generate(commands)
    _add_quantize(commands)
    _add_evaluate(commands)
    _add_tune(commands)
    flags = parser.parse_args(argv)
    try:
        return flags.run(flags)
    except BrokenPipeError:  # whoever read our output has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        first, *rest = str(error).splitlines() or [type(error).__name__]
        shown = " ".join([first, *(line.strip() + ";" for line in rest[:3])])
        print(f"lumen: {shown}{f' and {len(rest) - 3} lines more' if len(rest) > 3 else ''}", file=sys.stderr)
        return 2


def _command(commands, name: str, run, description: str) -> argparse.ArgumentParser:
    """A subcommand whose help begins with the first line of its description."""
    parser = commands.add_parser(
        name,
        help=description.partition("\n")[0],
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(run=run)
    return parser


_GENERATE = """continue a text with a published Llama or Qwen2 model, 4-bit AWQ or not

The text goes to stdout as it comes, its speed to stderr.

  lumen generate --model Qwen2.5-0.5B --prompt "The sea is"
  lumen generate --model Qwen2.5-7B-AWQ --prompt "def main(" --temperature 0.8 --top-p 0.95 --seed 1
"""


def _add_generate(commands) -> None:
    parser = _command(commands, "generate", _generate, _GENERATE)
    parser.add_argument(
        "--model", required=True, metavar="DIR", help="folder with config.json and .safetensors weights"
    )
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="what to continue; - reads it from stdin")
    parser.add_argument(
        "--tokenizer", metavar="DIR", help="folder with tokenizer.json, or 'bytes'; by default that of --model"
    )
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="default 128")
    parser.add_argument(
        "--temperature", type=float, default=0.0, metavar="X", help="0, the default: always the most likely token"
    )
    parser.add_argument("--top-k", type=int, default=0, metavar="N", help="draw among the N most likely; 0: all")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P", help="draw among the likeliest, of share P")
    parser.add_argument("--repetition-penalty", type=float, default=1.0, metavar="X", help="above 1: fewer repeats")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the draws; default 0")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="to compute in; by default that of the weights, but float32 on a CPU",
    )


def _generate(flags: argparse.Namespace) -> int:
    import jax

    from lumen.language.generate import stream
    from lumen.language.pretrained import load
    from lumen.language.tokenizer import load_tokenizer, stop_tokens, stream_text
    from lumen.sampling import Sampling

    sampling = Sampling(flags.temperature, flags.top_k, flags.top_p)
    tokenizer = load_tokenizer(flags.tokenizer or flags.model)
    prompt = tokenizer.encode(sys.stdin.read() if flags.prompt == "-" else flags.prompt, bos=True)
    on_cpu = jax.default_backend() == "cpu"
    model, _ = load(flags.model, dtype=flags.dtype or ("float32" if on_cpu else None), stacked=not on_cpu)
    stop = stop_tokens(flags.model) or (() if tokenizer.eos is None else (tokenizer.eos,))
    times, counts = [time.perf_counter()], [0]

    def tokens():
        pieces = stream(
            model,
            [prompt],
            max_new_tokens=flags.max_new_tokens,
            every=4,
            sampling=sampling,
            repetition_penalty=flags.repetition_penalty,
            stop=stop,
            keys=jax.random.split(jax.random.key(flags.seed), 1),
            prefill_chunk=512 if len(prompt) > 512 else 0,
        )
        for (piece,) in pieces:
            times.append(time.perf_counter())
            counts.append(counts[-1] + len(piece))
            yield from piece

    for text in stream_text(tokenizer, tokens()):
        print(text, end="", flush=True)
    print(flush=True)
    # The first piece waits for the prompt and two compilations: the loop's speed shows after the second.
    report = f"{len(prompt)} tokens read, {counts[-1]} generated in {times[-1] - times[0]:.1f} s"
    if len(times) > 3:
        report += f", {(counts[-1] - counts[2]) / (times[-1] - times[2]):.1f} tokens/s once compiled"
    print(report, file=sys.stderr)
    return 0


_QUANTIZE_AWQ = """4-bit weights by AWQ: scale search, clip search, rounding

Writes a folder that transformers and lumen read, with report.md and report.png in it: what every linear lost. A run
that was cut off is resumed by the same command. python_sources/train is a calibration text that is always there.

  lumen quantize awq --model Qwen2.5-0.5B --calibration pile-val.jsonl --out Qwen2.5-0.5B-AWQ
  lumen quantize awq --model runs/lm/model --calibration python_sources/train --group-size 64 --out runs/lm-awq
"""


def _add_quantize(commands) -> None:
    methods = _command(commands, "quantize", None, "make a model smaller").add_subparsers(
        metavar="METHOD", required=True
    )
    parser = _command(methods, "awq", _quantize_awq, _QUANTIZE_AWQ)
    parser.add_argument("--model", required=True, metavar="DIR", help="folder of the model in full precision")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to make; it appears whole or not at all")
    _add_calibration(parser)
    parser.add_argument(
        "--bits", type=int, choices=(4, 3), default=4, help="default 4; 3 has no packed format: --format dense"
    )
    parser.add_argument(
        "--format",
        choices=("gemm", "gemv", "gemv_fast", "llm-awq", "dense"),
        default="gemm",
        help="layout on disk, default gemm, the one that transformers reads; dense: the rounded weights in 16 bits",
    )
    parser.add_argument(
        "--method", choices=("awq", "scale", "clip", "rtn"), default="awq", help="one search only, or none (rtn)"
    )
    parser.add_argument("--gqa-output", action="store_true", help="also scale the output layer under grouped queries")


def _add_calibration(parser: argparse.ArgumentParser) -> None:
    """What every quantising command wants to know."""
    parser.add_argument("--calibration", required=True, metavar="FILE", help=".jsonl with 'text', or any text file")
    parser.add_argument("--texts", type=int, default=128, metavar="N", help="texts used for calibration; default 128")
    parser.add_argument(
        "--windows", type=int, metavar="N", help="instead: N sequences from all over the text, for long documents"
    )
    parser.add_argument("--length", type=int, default=512, metavar="N", help="tokens per sequence; default 512")
    parser.add_argument("--group-size", type=int, default=128, metavar="G", help="32, 64, 128 or -1: a whole row")
    parser.add_argument("--parity", choices=("autoawq", "llm-awq"), default="autoawq", help="which original to follow")
    parser.add_argument("--tokenizer", metavar="DIR", help="folder with tokenizer.json, or 'bytes'; default: --model's")


def _calibration_tokens(flags: argparse.Namespace, tokenizer):
    from lumen.io.text import documents, passages
    from lumen.quantization.calibrate import calibration_tokens, calibration_windows

    encode, length = tokenizer.encode, flags.length
    if flags.windows is not None:
        return calibration_windows(documents(flags.calibration), encode, windows=flags.windows, length=length)
    return calibration_tokens(passages(flags.calibration), encode, texts_used=flags.texts, length=length)


def _quantize_awq(flags: argparse.Namespace) -> int:
    from lumen.language.tokenizer import load_tokenizer
    from lumen.quantization.awq import AWQConfig
    from lumen.quantization.folder import quantize_folder

    config = AWQConfig(flags.bits, flags.group_size, flags.method, flags.parity, gqa_output=flags.gqa_output)
    tokens = _calibration_tokens(flags, load_tokenizer(flags.tokenizer or flags.model))
    print(f"calibration: {tokens.shape[0]} sequences of {tokens.shape[1]} tokens", file=sys.stderr)
    print(quantize_folder(flags.model, flags.out, tokens, config, layout=flags.format))
    return 0


_PERPLEXITY = """perplexity of a model on a text, by the protocol of GPTQ and AWQ

The text is tokenised as a whole and cut into blocks; for WikiText-2 give the raw test text and --length 2048.

  lumen evaluate perplexity --model Qwen2.5-0.5B --text wikitext-2-test.txt
"""

_COMPARE = """what quantisation costs: perplexity of rounded and of AWQ weights beside full precision

Several models, such as seeds of one training, give a mean and a deviation.

  lumen evaluate quantization --model runs/a/model runs/b/model --calibration python_sources/train \\
    --text python_sources/test --group-size 64 --bits 4 3
"""


_NEEDLE = """needle in a haystack: is one sentence found in a long text, wherever it stands?

Writes results.json and needle.png, a map of context length and depth, to --out. The same command goes on after an
interruption. The default haystack is always there; Paul Graham's essays are the usual one.

  lumen evaluate needle --model Llama-3.1-8B-Instruct --text essays.txt --out runs/needle --to 128000
  lumen evaluate needle --model Llama-3-8B-Instruct-Gradient-1048k --pattern attn_patterns/Llama-3-8B-... \\
    --to 1048000 --out runs/needle-duo
"""

_PASSKEY = """passkey retrieval: is a number found in a long idle text?

The format of landmark attention. Writes results.json and passkey.png to --out; the same command goes on after an
interruption.

  lumen evaluate passkey --model runs/llama-2-7b-32k --out runs/passkey --to 32000
"""

_MEMORY = """what a long context needs, by arithmetic: memory, operations, the longest that fits

  lumen evaluate memory --model llama3_8b --context 1048576 --sparsity 0.5 --cache bf16 int8 int4 --chip h200
  lumen evaluate memory --model Qwen2.5-7B-Instruct --weights w4a16 --context 131072 --chip v5e
"""


_CONTEXT_LENGTH = """perplexity by context length and loss by position, of one model or several

Writes context_length.json and context_length.png to --out.

  lumen evaluate context-length --model runs/longlora/base/model runs/longlora/full/model --lengths 256 1024 2048 \\
    --windows 64 --out runs/longlora/curves
"""


def _add_evaluate(commands) -> None:
    kinds = _command(commands, "evaluate", None, "measure a model").add_subparsers(metavar="MEASURE", required=True)
    parser = _command(kinds, "perplexity", _perplexity, _PERPLEXITY)
    parser.add_argument("--model", required=True, metavar="DIR", help="folder of the model, quantised or not")
    _add_text(parser)
    parser.add_argument("--tokenizer", metavar="DIR", help="folder with tokenizer.json, or 'bytes'; default: --model's")
    parser = _command(kinds, "quantization", _compare, _COMPARE)
    parser.add_argument("--model", required=True, nargs="+", metavar="DIR", help="folders in full precision")
    _add_calibration(parser)
    _add_text(parser)
    parser.add_argument("--bits", type=int, nargs="+", choices=(4, 3), default=[4, 3], help="default 4 3")
    parser = _command(kinds, "context-length", _context_length, _CONTEXT_LENGTH)
    parser.add_argument("--model", required=True, nargs="+", metavar="DIR", help="folders of models")
    parser.add_argument(
        "--text", default="python_sources/test", metavar="FILE", help=".jsonl with 'text', or any text file"
    )
    parser.add_argument("--lengths", type=int, nargs="+", required=True, metavar="N", help="tokens of context")
    parser.add_argument("--stride", type=int, default=256, metavar="N", help="from window to window; default 256")
    parser.add_argument("--windows", type=int, default=0, metavar="N", help="so many, evenly spread; 0: all")
    parser.add_argument("--tokenizer", metavar="DIR", help="folder with tokenizer.json, or 'bytes'; default: --model's")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write into")
    parser = _command(kinds, "needle", _needle, _NEEDLE)
    _add_retrieval(parser, lengths=13)
    parser.add_argument("--depths", type=int, default=10, metavar="N", help="how many, from 0 to 100 %%; default 10")
    parser.add_argument(
        "--text", default="python_sources/test", metavar="FILE", help=".jsonl or any text: the haystack"
    )
    parser.add_argument("--needle", metavar="TEXT", help="the sentence to hide; with --question and --answer")
    parser.add_argument("--question", metavar="TEXT", help="what stands behind the text; the model goes on from there")
    parser.add_argument("--answer", metavar="TEXT", help="what a right reply says")
    parser.add_argument("--opening", metavar="TEXT", help="what stands before the text")
    parser.add_argument("--closing", metavar="TEXT", help="what stands between text and question")
    parser.add_argument(
        "--score", choices=("rouge", "exact"), default="rouge", help="words in common with the answer, or all tokens"
    )
    parser.add_argument("--max-new-tokens", type=int, default=50, metavar="N", help="default 50")
    parser = _command(kinds, "passkey", _passkey, _PASSKEY)
    _add_retrieval(parser, lengths=10)
    parser.add_argument("--trials", type=int, default=10, metavar="N", help="numbers and places a length; default 10")
    parser.add_argument(
        "--measure", choices=("characters", "tokens"), default="characters", help="of lengths: 3.75 a token, or tokens"
    )
    _add_scan(_command(kinds, "dataflows", _dataflows, _DATAFLOWS))
    parser = _command(kinds, "memory", _memory, _MEMORY)
    parser.add_argument("--model", required=True, metavar="NAME", help="llama3_8b, qwen25_7b, or a model's folder")
    parser.add_argument("--context", type=int, required=True, metavar="N", help="tokens per sequence")
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="sequences; default 1")
    parser.add_argument("--weights", choices=("bf16", "w4a16"), default="bf16", help="of the blocks; default bf16")
    parser.add_argument("--group-size", type=int, default=128, metavar="G", help="of 4-bit weights; default 128")
    parser.add_argument(
        "--cache", nargs="+", choices=tuple(_CACHES), default=["bf16"], help="one or several, to compare; default bf16"
    )
    parser.add_argument("--chip", default="h200", metavar="NAME", help="h200, h100, a100, v5p, v5e, v6e; default h200")
    _add_streaming(parser)


_CACHES = {"bf16": 16, "int8": 8, "int4": 4}


def _add_retrieval(parser: argparse.ArgumentParser, lengths: int) -> None:
    """What the tests of retrieval share."""
    parser.add_argument("--model", required=True, metavar="DIR", help="folder of the model, quantised or not")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for what is found")
    parser.add_argument("--from", type=int, default=1000, metavar="N", dest="shortest", help="tokens; default 1000")
    parser.add_argument("--to", type=int, metavar="N", dest="longest", help="tokens; default: what config.json says")
    parser.add_argument("--lengths", type=int, default=lengths, metavar="N", help=f"how many; default {lengths}")
    parser.add_argument("--tokenizer", metavar="DIR", help="folder with tokenizer.json, or 'bytes'; default: --model's")
    parser.add_argument("--cache", choices=("int8", "int4"), help="bits of keys and values; default: as the weights")
    _add_streaming(parser)


def _add_streaming(parser: argparse.ArgumentParser) -> None:
    """Which heads stream, and how much is read at a time."""
    parser.add_argument("--pattern", metavar="DIR", help="DuoAttention's gates; default: all heads see everything")
    parser.add_argument("--sparsity", type=float, metavar="X", help="share of streaming heads; 0.5 with --pattern")
    parser.add_argument("--sink", type=int, default=64, metavar="N", help="first tokens they keep; default 64")
    parser.add_argument("--recent", type=int, default=256, metavar="N", help="latest tokens they keep; default 256")
    parser.add_argument(
        "--prefill",
        choices=("token", "chunk"),
        default="token",
        help="what they see of a chunk being read: as one by one, or all of it as the original does; default token",
    )
    parser.add_argument("--prefill-chunk", type=int, default=32_000, metavar="N", help="tokens; default 32000; 0: all")


def _add_text(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--text", required=True, metavar="FILE", help=".jsonl with 'text', or any text file")
    parser.add_argument("--block", type=int, default=2048, metavar="N", help="tokens per block; default 2048")
    parser.add_argument("--blocks", type=int, default=0, metavar="N", help="only the first N blocks; 0: all")


def _stream(flags: argparse.Namespace, tokenizer):
    """The tokens of --text, as one text."""
    import numpy as np

    from lumen.io.text import documents

    stream = np.asarray(tokenizer.encode("\n\n".join(documents(flags.text)), bos=True), np.int32)
    return stream[: flags.blocks * flags.block] if flags.blocks else stream


def _perplexity(flags: argparse.Namespace) -> int:
    import jax

    from lumen.evaluation.perplexity import perplexity
    from lumen.language.pretrained import load
    from lumen.language.tokenizer import load_tokenizer

    on_cpu = jax.default_backend() == "cpu"
    model, _ = load(flags.model, dtype="float32" if on_cpu else None, stacked=not on_cpu)
    stream = _stream(flags, load_tokenizer(flags.tokenizer or flags.model))
    print(json.dumps(perplexity(model, stream, length=flags.block)))
    return 0


def _context_length(flags: argparse.Namespace) -> int:
    from pathlib import Path

    import numpy as np

    from lumen.evaluation.context_length import context_curves, draw
    from lumen.io.text import documents
    from lumen.language.pretrained import load
    from lumen.language.tokenizer import load_tokenizer

    found = {}
    for folder in flags.model:
        tokenizer = load_tokenizer(flags.tokenizer or folder)
        stream = np.asarray(tokenizer.encode("\n\n".join(documents(flags.text)), bos=True), np.int32)
        sizes = {"lengths": flags.lengths, "stride": flags.stride, "windows": flags.windows}
        found[folder] = context_curves(load(folder, dtype="float32")[0], stream, **sizes)
    Path(flags.out).mkdir(parents=True, exist_ok=True)
    Path(flags.out, "context_length.json").write_text(json.dumps(found, indent=2) + "\n")
    Path(flags.out, "context_length.png").write_bytes(draw(found))
    print(json.dumps({folder: curves["perplexity"] for folder, curves in found.items()}))
    return 0


def _compare(flags: argparse.Namespace) -> int:
    from lumen.evaluation.quantization import compare, comparison_table
    from lumen.language.pretrained import load
    from lumen.language.tokenizer import load_tokenizer
    from lumen.quantization.awq import AWQConfig

    results = {}
    for folder in flags.model:
        tokenizer = load_tokenizer(flags.tokenizer or folder)
        model, _ = load(folder, dtype="float32")
        results[folder] = compare(
            model,
            _calibration_tokens(flags, tokenizer),
            _stream(flags, tokenizer),
            bits=flags.bits,
            config=AWQConfig(group=flags.group_size, parity=flags.parity),
            length=flags.block,
        )
    print(comparison_table(results), end="")
    return 0


def _retrieval(flags: argparse.Namespace, config):
    """[L, K] bool, which key/value heads see everything, or None."""
    import numpy as np

    from lumen.io.head_patterns import read_pattern
    from lumen.long_context.duo_attention import retrieval_heads

    if flags.pattern is None and flags.sparsity is None:
        return None
    shape = config.depth, config.kv_heads
    gates = np.ones(shape) if flags.pattern is None else read_pattern(flags.pattern, shape)[0]
    return retrieval_heads(gates, 0.5 if flags.sparsity is None else flags.sparsity)


def _streaming(flags: argparse.Namespace, retrieval, config):
    """The sizes of a decoder whose heads stream where `retrieval` says no."""
    import dataclasses

    from lumen.kv_cache import StreamingHeads

    dense = tuple(int(count) for count in retrieval.sum(axis=1))
    return dataclasses.replace(config, streaming=StreamingHeads(dense, flags.sink, flags.recent, flags.prefill))


def _reader(flags: argparse.Namespace):
    """(the model as a function from prompt to answer, its tokenizer, the lengths asked for, what tells it apart)."""
    import jax

    from lumen.evaluation.needle import greedy, spaced
    from lumen.language.pretrained import load, read_config
    from lumen.language.tokenizer import load_tokenizer, stop_tokens
    from lumen.long_context.duo_attention import deploy

    if flags.sparsity is not None and flags.pattern is None:
        raise ValueError("--sparsity says how many heads stream; give --pattern, which says which.")
    lengths = spaced(flags.shortest, flags.longest or read_config(flags.model).max_positions, flags.lengths)
    tokenizer = load_tokenizer(flags.tokenizer or flags.model)
    stop = stop_tokens(flags.model) or (() if tokenizer.eos is None else (tokenizer.eos,))
    on_cpu = jax.default_backend() == "cpu"
    listed = on_cpu or flags.pattern is not None
    model, _ = load(flags.model, dtype="float32" if on_cpu else None, stacked=not listed)
    if (retrieval := _retrieval(flags, model.config)) is not None:
        model = deploy(model, retrieval, sink=flags.sink, recent=flags.recent, prefill=flags.prefill)
    names = ("model", "pattern", "sparsity", "sink", "recent", "prefill", "prefill_chunk", "cache")
    answer = greedy(model, stop=stop, prefill_chunk=flags.prefill_chunk, cache_dtype=flags.cache)
    return answer, tokenizer, lengths, {name: getattr(flags, name) for name in names}


def _show(results, out: str, name: str) -> int:
    """Writes the picture and prints the figures."""
    from PIL import Image

    from lumen.evaluation.needle import heat_map

    picture = os.path.join(out, f"{name}.png")
    Image.fromarray(heat_map(results)).save(picture)
    print(f"{name}: {picture}", file=sys.stderr)
    print(json.dumps({key: results[key] for key in ("mean", "lengths", "by_length")}))
    return 0


_DATAFLOWS = """work that each dataflow of MinkUNet's sparse convolutions executes per multiply-add needed

A table by level, on a SemanticKITTI scan or a generated one.

  lumen evaluate dataflows
  lumen evaluate dataflows --scan dataset/sequences/08/velodyne/000000.bin
"""

_TUNE = """find the fastest dataflow of every kernel map of MinkUNet, on this machine

Times whole programs, maps included, with one map's dataflow changed at a time, and writes the best of each as JSON with
all trials; `train.py --config.lidar_segmentation.tuning=FILE` uses it. With --device a cost model decides, for hardware
that is not here.

  lumen tune --ratio 1.0 --out minkunet.json
  lumen tune --ratio 1.0 --training --binding backward --device h200 --dtype bfloat16 --out minkunet_h200.json
"""


def _add_tune(commands) -> None:
    parser = _command(commands, "tune", _tune, _TUNE)
    _add_scan(parser)
    parser.add_argument("--out", required=True, metavar="FILE", help="JSON to write")
    parser.add_argument("--training", action="store_true", help="time loss and gradients instead of the forward pass")
    parser.add_argument(
        "--binding",
        choices=("all", "backward", "none"),
        default="all",
        help="products that share a dataflow: all three, both gradients, or none; default all",
    )
    parser.add_argument("--tiles", type=int, nargs="+", default=[128], metavar="N", help="tile sizes; default 128")
    parser.add_argument("--device", choices=("h200", "h100", "v5p", "cpu"), help="ask the cost model for this chip")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of features and weights"
    )
    parser.add_argument("--runs", type=int, default=5, metavar="N", help="timed runs of a program; default 5")


def _add_scan(parser: argparse.ArgumentParser) -> None:
    """A network and a scan for it."""
    parser.add_argument("--ratio", type=float, default=1.0, metavar="X", help="width of MinkUNet; default 1.0")
    parser.add_argument(
        "--scan", metavar="FILE", help="float32 [n, 4] as SemanticKITTI has it; default: a generated one"
    )
    parser.add_argument("--voxel-size", type=float, default=0.05, metavar="M", help="metres; default 0.05")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the generated scan; default 0")


def _scan(flags: argparse.Namespace):
    """float32 [n, 4]."""
    from lumen.training.lidar import read_scan, street_scans

    return read_scan(flags.scan) if flags.scan else street_scans("train", scans=1, seed=flags.seed)[0]["points"]


def _dataflows(flags: argparse.Namespace) -> int:
    from lumen.evaluation.dataflows import redundancy, redundancy_table, scan_tensor
    from lumen.sparse.minkunet import MinkUNetConfig

    rows = redundancy(scan_tensor(_scan(flags), flags.voxel_size), MinkUNetConfig.scaled(flags.ratio))
    print(redundancy_table(rows))
    return 0


def _tune(flags: argparse.Namespace) -> int:
    from lumen.evaluation.dataflows import tune_minkunet
    from lumen.sparse.minkunet import MinkUNetConfig

    names = ("voxel_size", "training", "binding", "tiles", "device", "dtype", "runs", "seed")
    options = {name: getattr(flags, name) for name in names}
    tuning = tune_minkunet(MinkUNetConfig.scaled(flags.ratio), _scan(flags), **options)
    tuning.save(flags.out)
    if tuning.objective == "cost model":
        print(f"tune: nothing was timed; a cost model of {flags.device} decided.", file=sys.stderr)
    seconds = {"default_seconds": tuning.default_seconds, "tuned_seconds": tuning.tuned_seconds}
    print(json.dumps({"objective": tuning.objective, **seconds, "out": flags.out}))
    return 0


def _needle(flags: argparse.Namespace) -> int:
    from lumen.evaluation.needle import Needle, needle, spaced
    from lumen.io.text import documents

    parts = {"sentence": flags.needle, "question": flags.question, "answer": flags.answer}
    given = {name: text for name, text in parts.items() if text is not None}
    if given and len(given) < len(parts):
        raise ValueError("--needle, --question and --answer belong together; give all three or none.")
    around = {"opening": flags.opening, "closing": flags.closing}
    given |= {name: text for name, text in around.items() if text is not None}
    answer, tokenizer, lengths, settings = _reader(flags)
    results = needle(
        answer,
        tokenizer,
        documents(flags.text),
        hidden=Needle(**given),
        lengths=lengths,
        depths=spaced(0, 100, flags.depths),
        score=flags.score,
        max_new_tokens=flags.max_new_tokens,
        out=flags.out,
        settings=settings,
    )
    return _show(results, flags.out, "needle")


def _passkey(flags: argparse.Namespace) -> int:
    from lumen.evaluation.needle import passkey

    answer, tokenizer, lengths, settings = _reader(flags)
    options = {"lengths": lengths, "trials": flags.trials, "measure": flags.measure}
    return _show(passkey(answer, tokenizer, **options, out=flags.out, settings=settings), flags.out, "passkey")


def _memory(flags: argparse.Namespace) -> int:
    import dataclasses

    from lumen.evaluation.memory import Deployment, memory_report, memory_table, model_config
    from lumen.plan import CHIPS

    if flags.chip not in CHIPS:
        raise ValueError(f"--chip: {flags.chip!r} is unknown; use {', '.join(CHIPS)}.")
    config = model_config(flags.model)
    kinds = {"all heads full": config}
    if (retrieval := _retrieval(flags, config)) is not None:
        kinds["streaming heads"] = _streaming(flags, retrieval, config)
    reports = []
    for kind, sizes in kinds.items():
        for cache in flags.cache:
            deployment = Deployment(
                sizes, flags.weights, flags.group_size, _CACHES[cache], flags.batch, flags.prefill_chunk
            )
            reports.append(memory_report(f"{kind}, {cache}", deployment, flags.context, CHIPS[flags.chip]))
    print(memory_table(reports))
    print(json.dumps([dataclasses.asdict(report) for report in reports]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
