r"""MinkUNet on made-up streets: LiDAR segmentation from nothing, in minutes.

Ray-cast scans of ground, cars, poles and buildings; voxels of 0.2 m, as a tiny machine can afford. Two CPU cores: under
10 minutes with compilation and evaluation. Expected: mean IoU of at least 0.80 on held-out streets.
Run: python train.py --config=experiments/torchsparse/minkunet_lidar_scenes.py --workdir=runs/lidar_scenes
Then: python evaluate.py --config=experiments/torchsparse/minkunet_lidar_scenes.py --workdir=runs/lidar_scenes
"""

import ml_collections


def get_config():
    """The experiment."""
    config = ml_collections.ConfigDict()
    config.task = "lidar_segmentation"
    config.seed = 0
    config.total_steps = 900
    config.batch_size = 1
    config.optimizer = dict(
        name="adamw", learning_rate=4e-3, warmup_steps=30, weight_decay=1e-2, final_learning_rate=1e-5, clip_norm=10.0
    )
    config.log_every = 50
    config.save_every = 300
    config.lidar_segmentation = dict(
        ratio=0.25,
        level_fractions=(0.75, 0.5, 0.3, 0.2),
        data=dict(name="street_scans", scans=512, beams=32, azimuths=1024),
        evaluation_scans=32,
        scans=dict(voxel_size=0.2, spatial_shape=(1024, 1024, 128), max_voxels=12_000),
    )
    return config
