r"""VQ tokenizer for handwritten digits: 32 x 32 pixels to 8 x 8 codes. First half of the main job, see digits.py.

Two CPU cores: about a minute. Expected: classifier accuracy on reconstructed test digits >= 0.97.
Run: python train.py --config=experiments/lpd/digits_tokenizer.py --workdir=runs/digits_tokenizer
"""

import ml_collections


def get_config():
    """The experiment."""
    config = ml_collections.ConfigDict()
    config.task = "vq"
    config.seed = 0
    config.total_steps = 600
    config.batch_size = 8
    config.optimizer = dict(
        name="adam", learning_rate=8e-3, warmup_steps=30, final_learning_rate=2e-4, beta2=0.95, clip_norm=1.0
    )
    config.log_every = 100
    config.save_every = 200
    config.vq = dict(
        model=dict(
            size="vq16",
            channels=8,
            channel_multipliers=(1, 2, 2),
            encoder_blocks=1,
            decoder_blocks=1,
            latent_channels=32,
            codebook_size=128,
            groups=4,
        ),
        data=dict(name="digits", size=32),
        revive_every=20,
    )
    return config
