r"""A small language model on the source text of Python's standard library, to be quantised: AWQ against rounding.

Bytes as tokens, 1.7M parameters. Two CPU cores: about 3 minutes. Expected: test perplexity 5.3 to 5.6 per byte.
Run: python train.py --config=experiments/awq/python_sources.py --workdir=runs/python_sources_0
Then: lumen evaluate quantization --model runs/python_sources_0/model --calibration python_sources/train --windows 64 \
        --length 256 --parity llm-awq --group-size -1 --text python_sources/test --block 256 (docs/awq.md has the table)
"""

import ml_collections


def get_config():
    """The experiment."""
    config = ml_collections.ConfigDict()
    config.task = "language"
    config.seed = 0
    config.total_steps = 600
    config.batch_size = 8
    config.optimizer = dict(
        name="adamw",
        learning_rate=3e-3,
        warmup_steps=50,
        final_learning_rate=3e-5,
        beta2=0.99,
        weight_decay=0.1,
        clip_norm=1.0,
    )
    config.log_every = 50
    config.save_every = 300
    config.language = dict(
        model=dict(size="debug", width=192, depth=4, heads=6, kv_heads=3, head_dim=32, hidden=512),
        data=dict(name="python_sources"),
        length=256,
        evaluation_length=256,
        evaluation_blocks=400,
    )
    return config
