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


if __name__ == "__main__":
    sys.exit(main())
