r"""Llama 3 8B, decoding with packed weights: what a step needs on hardware that is absent.

  python evaluate.py --config=experiments/awq/llama3_8b.py --compile_only --topology=h200:1
  python evaluate.py --config=experiments/awq/llama3_8b.py --compile_only --topology=v5p:1x1x1
  python evaluate.py --config=experiments/awq/llama3_8b.py --compile_only --topology=h200:1 \
    --config.language.serving.weights=bfloat16

One decode step at batch 1 with a cache of 4096 tokens, weights in 4 bits (group 128) or bfloat16; embedding and head
stay bfloat16. Qwen2.5 7B: --config.language.model.size=qwen25_7b. Expected: packed linears at 4.25 bits a weight.
"""

import ml_collections


def get_config():
    """The experiment."""
    config = ml_collections.ConfigDict()
    config.task = "language"
    config.total_steps = 1
    config.batch_size = 1
    config.compute_dtype = "bfloat16"
    config.language = dict(
        model=dict(size="llama3_8b"),
        length=4096,
        chunk=1024,
        remat=True,
        serving=dict(weights="int4", group=128, slots=4096),
    )
    return config
