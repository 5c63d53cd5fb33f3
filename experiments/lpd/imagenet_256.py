r"""LPD on ImageNet at 256 pixels, the published recipe (arXiv:2507.01957; mit-han-lab/lpd scripts/train).

--config.lpd.model.size=l, xl (default) or xxl. Codes of LlamaGen's VQ-16 (vq_ds16_c2i.pt), image and mirror image, are
computed once. 450 epochs; the learning rate is 1e-4 per 256 images.
Hardware: 32 A100 in the paper. Expected FID-50K in 20 steps: L 2.40, XL 2.10, XXL 2.00; XL in 32 steps 1.92.

Run: python train.py --config=experiments/lpd/imagenet_256.py --workdir=$WORKDIR --config.lpd.data.path=$IMAGENET \
       --config.lpd.tokenizer.path=vq_ds16_c2i.pt
Evaluate: python evaluate.py with the same flags and --config.lpd.evaluation.inception=... \
       --config.lpd.evaluation.reference=VIRTUAL_imagenet256_labeled.npz
"""

import ml_collections

EPOCH = 1_281_167 // 1024


def get_config():
    """The experiment."""
    config = ml_collections.ConfigDict()
    config.task = "lpd"
    config.seed = 1
    config.batch_size = 1024
    config.total_steps = 450 * EPOCH
    config.compute_dtype = "bfloat16"
    config.mesh = dict(fsdp=-1)
    config.optimizer = dict(
        name="adamw",
        learning_rate=1e-4 * config.batch_size / 256,
        schedule="cosine",
        warmup_steps=50 * EPOCH,
        decay_start=400 * EPOCH,
        final_learning_rate=1e-5,
        beta1=0.9,
        beta2=0.95,
        weight_decay=0.02,
        clip_norm=3.0,
    )
    config.log_every = 100
    config.monitor_every = 10_000
    config.save_every = 5_000
    config.lpd = dict(
        model=dict(size="xl"),
        image_size=256,
        data=dict(name="image_folder", size=256, flip=True, workers=8),
        codes="workdir",
        remat=True,
        # Published guidance at 20 steps: L 4.8, XL 4.9, XXL 5.9 (with repulsion_threshold=3); 32 steps: L 5.4, XL 5.0.
        evaluation=dict(protocol="adm", steps=20, guidance=4.9, samples=50_000, batch_size=256),
    )
    return config
