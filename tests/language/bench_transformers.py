"""Speed of lumen's decoder next to transformers' on this machine: python tests/language/bench_transformers.py

Llama of 12 layers, width 768, 12 query and 4 key/value heads, vocabulary 32000, random weights, float32: 64 greedy
tokens after a prompt of 128, and the prefill of 2048 tokens. Both are run in turn; medians. Needs torch, transformers.
"""

import os
import pathlib
import statistics
import tempfile
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np
import torch
import transformers
from flax import nnx

from lumen.language.decoder import Decoder, DecoderConfig
from lumen.language.generate import generate
from lumen.language.pretrained import save
from lumen.layers import unstack

RUNS = 5
CONFIG = DecoderConfig(width=768, depth=12, heads=12, kv_heads=4, head_dim=64, hidden=2048, vocabulary=32000)


def main() -> None:
    """Prints a table."""
    model = Decoder(CONFIG, rngs=nnx.Rngs(jax.random.key(0, impl="rbg")))
    with tempfile.TemporaryDirectory() as folder:
        save(pathlib.Path(folder) / "model", model)
        theirs = transformers.AutoModelForCausalLM.from_pretrained(f"{folder}/model", dtype=torch.float32).eval()
    model = unstack(model)
    prompt = np.random.default_rng(0).integers(0, 32000, (1, 128))
    long = np.random.default_rng(1).integers(0, 32000, (1, 2048)).astype(np.int32)
    prefill = jax.jit(lambda model, tokens, cache: model(tokens, cache=cache), donate_argnums=2)

    def decode_ours():
        return generate(model, prompt.tolist(), max_new_tokens=64)[0]

    def decode_theirs():
        with torch.no_grad():
            options = {"max_new_tokens": 64, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
            tokens = torch.tensor(prompt)
            return theirs.generate(tokens, attention_mask=torch.ones_like(tokens), **options)[:, 128:].numpy()

    def prefill_ours():
        hidden, cache = prefill(model, long, model.empty_cache(1, 2048))
        return jax.block_until_ready((model.logits(hidden[:, -1:]), cache))

    def prefill_theirs():
        with torch.no_grad():
            return theirs(torch.tensor(long, dtype=torch.int64), use_cache=True, logits_to_keep=1).logits.numpy()

    same = np.array_equal(decode_ours(), decode_theirs())
    gap = np.abs(np.asarray(prefill_ours()[0]) - prefill_theirs()).max()
    times = {run: [] for run in (decode_ours, decode_theirs, prefill_ours, prefill_theirs)}
    for _ in range(RUNS):
        for run, seconds in times.items():
            start = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - start)
    median = {run.__name__: statistics.median(seconds) for run, seconds in times.items()}
    print(
        f"torch {torch.__version__} ({torch.get_num_threads()} threads), transformers {transformers.__version__}, ",
        end="",
    )
    print(f"jax {jax.__version__}; greedy text equal: {same}; prefill logits differ by {gap:.1e} at most")
    for name, unit in (("decode", "128 + 64 tokens"), ("prefill", "2048 tokens")):
        ours, other = median[f"{name}_ours"], median[f"{name}_theirs"]
        print(f"{name:<8}{unit:<18}lumen {ours:.2f} s, transformers {other:.2f} s, {other / ours:.2f} times as fast")


if __name__ == "__main__":
    main()
