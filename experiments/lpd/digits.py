r"""LPD on handwritten digits: the main job (`make train`), 64 codes an image, parallel decoding in 5 steps.

Needs the tokenizer of digits_tokenizer.py. Two CPU cores: under 10 minutes with evaluation.
Expected: classifier accuracy >= 0.90 in 5 steps, at most 2 points under one code a step, and token decoding of one
image at least 4 times faster. Width 512 is for that: 25 MB of weights, which each pass has to read, as the published
models do; with width 128 they stay in the CPU's cache and fewer passes save little.
Run: python train.py --config=experiments/lpd/digits.py --workdir=runs/digits
Then: python evaluate.py --config=experiments/lpd/digits.py --workdir=runs/digits
"""

import ml_collections


def get_config():
    """The experiment."""
    config = ml_collections.ConfigDict()
    config.task = "lpd"
    config.seed = 0
    config.total_steps = 450
    config.batch_size = 32
    config.average_decay = 0.98
    config.optimizer = dict(
        name="adamw",
        learning_rate=1e-3,
        warmup_steps=50,
        final_learning_rate=1e-5,
        weight_decay=0.02,
        clip_norm=3.0,
    )
    config.log_every = 50
    config.save_every = 150
    config.lpd = dict(
        model=dict(size="debug", width=512, depth=2, heads=8, classes=10, dropout=0.0),
        image_size=32,
        tokenizer=dict(path="runs/digits_tokenizer"),
        data=dict(name="digits", size=32),
        codes="workdir",
        shifts=1,
        evaluation=dict(protocol="digits", steps=5, repulsion_threshold=1, samples=2000, batch_size=64, runs=10),
    )
    return config
