r"""Speed of LPD-L at 256 pixels with random weights: 20 steps and one token a step, batch 1 and 64.

The paper's protocol (arXiv:2507.01957, A100, bfloat16): batch 1 0.28 s, batch 64 139 images/s in 20 steps.
Run: python evaluate.py --config=experiments/lpd/latency_l.py --workdir=runs/latency_l --random_weights
"""

import ml_collections


def get_config():
    """The experiment."""
    config = ml_collections.ConfigDict()
    config.task = "lpd"
    config.total_steps = 1
    config.batch_size = 1
    config.lpd = dict(
        model=dict(size="l"),
        image_size=256,
        codes="workdir",
        evaluation=dict(protocol="latency", steps=20, guidance=4.8, batches=(1,), runs=3, warmup=0),
    )
    return config
