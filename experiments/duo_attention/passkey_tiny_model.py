r"""A decoder of 0.5M parameters that finds passkeys, for DuoAttention's gates to be trained on.

4 layers of 8 query and 8 key/value heads. Words as tokens, a vocabulary of 256 (experiments/duo_attention/words): that
of the samples and the most frequent words of Python's sources, which surround two passkeys of 4 words.
Two CPU cores: 3 minutes. Expected: recall 1.0 on the test text.
Run: python train.py --config=experiments/duo_attention/passkey_tiny_model.py --workdir=runs/passkey_model_0
"""

import ml_collections


def get_config():
    """The experiment."""
    config = ml_collections.ConfigDict()
    config.task = "passkey"
    config.seed = 0
    config.total_steps = 600
    config.batch_size = 16
    config.optimizer = dict(
        learning_rate=3e-3,
        warmup_steps=50,
        decay_start=300,
        final_learning_rate=1e-4,
        beta2=0.98,
        weight_decay=0.1,
        clip_norm=1.0,
    )
    config.log_every = 50
    config.save_every = 300
    config.monitor_every = 200
    config.passkey = dict(
        model=dict(size="debug", width=96, depth=4, heads=8, kv_heads=8, head_dim=16, hidden=256),
        data=dict(
            text=dict(name="python_sources", tokenizer="experiments/duo_attention/words"),
            samples=dict(passkeys=2, words=4, shortest=4, longest=128, lengths=16, text="anywhere", labels="passkeys"),
        ),
        text_weight=0.02,
        evaluation_samples=64,
    )
    return config
