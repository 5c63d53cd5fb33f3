"""A tokenizer run of seconds for the tests of the training stack; its pictures come from --config.vq.data.path."""

import ml_collections


def get_config():
    """The experiment."""
    config = ml_collections.ConfigDict()
    config.task = "vq"
    config.total_steps = 40
    config.batch_size = 8
    config.average_decay = 0.9
    config.optimizer = dict(learning_rate=2e-3, schedule="constant", warmup_steps=4, weight_decay=0.01, clip_norm=1.0)
    config.log_every = 2
    config.save_every = 8
    config.vq = dict(
        model=dict(size="debug", channels=4, channel_multipliers=(1,), groups=2, latent_channels=4, codebook_size=16),
        data=dict(name="image_folder", size=8),
    )
    return config
