r"""The decoder that experiments/longlora/python_sources.py extends: trained on windows of 256 bytes of Python source.

Bytes as tokens, 0.8M parameters. Two CPU cores, shared: 29 minutes. Expected: a loss of 0.95 to 1.1 at the end, and a
perplexity of 2.97 in windows of 256 of the test text.
Run: python train.py --config=experiments/longlora/python_sources_base.py --workdir=runs/longlora/base
"""

import ml_collections


def get_config():
    """The experiment."""
    config = ml_collections.ConfigDict()
    config.task = "language"
    config.seed = 0
    config.total_steps = 3000
    config.batch_size = 16
    config.optimizer = dict(
        name="adamw",
        learning_rate=3e-3,
        warmup_steps=50,
        final_learning_rate=2e-5,
        beta2=0.99,
        weight_decay=0.1,
        clip_norm=1.0,
    )
    config.log_every = 25
    config.save_every = 250
    config.language = dict(
        model=dict(size="debug", width=128, depth=4, heads=4, kv_heads=2, head_dim=32, hidden=352, max_positions=256),
        data=dict(name="python_sources"),
        length=256,
        evaluation_length=256,
        evaluation_blocks=400,
    )
    return config
