r"""VQ-16 tokenizer on ImageNet at 256 pixels, LlamaGen's recipe (arXiv:2406.06525, tokenizer/tokenizer_image).

40 epochs at batch 128; L2, LPIPS, commitment 0.25, hinge PatchGAN from step 20000 with weight 0.5.
Expected rFID on ImageNet validation: 2.19. Hardware and hours: not stated by the source.

Run: python train.py --config=experiments/lpd/imagenet_tokenizer.py --workdir=$WORKDIR --config.vq.data.path=$IMAGENET \
       '--config.vq.perceptual=("vgg16.pth", "lpips_vgg.pth")'
"""

import ml_collections


def get_config():
    """The experiment."""
    config = ml_collections.ConfigDict()
    config.task = "vq"
    config.seed = 0
    config.batch_size = 128
    config.total_steps = 40 * (1_281_167 // config.batch_size)
    config.optimizer = dict(
        name="adamw", learning_rate=1e-4, schedule="constant", beta1=0.9, beta2=0.95, weight_decay=5e-2, clip_norm=1.0
    )
    config.log_every = 100
    config.monitor_every = 5_000
    config.save_every = 5_000
    config.vq = dict(
        model=dict(size="vq16"),
        data=dict(name="image_folder", size=256, flip=True, workers=8),
        discriminator=True,
    )
    return config
