r"""MinkUNet on SemanticKITTI, SPVNAS's recipe (arXiv:2007.16100, mit-han-lab/spvnas).

8 GPUs, 2 scans each, 15 epochs of 19 130 scans: about 18 000 updates. Expected mean IoU on sequence 08: 59.3 (width
0.5), 60.0 (0.64), 61.9 (1.0), the original's own repetition of its results, which counts absent classes as 1.
Deviation: the learning rate of the original is for SGD with loss scaling; here gradients are bfloat16 and unscaled.
Run: python train.py --config=experiments/torchsparse/minkunet_semantic_kitti.py --workdir=$WORKDIR \
  --config.lidar_segmentation.data.path=$SEMANTIC_KITTI/dataset
Plan: python train.py --config=experiments/torchsparse/minkunet_semantic_kitti.py --compile_only --topology=h200:8
"""

import ml_collections


def get_config():
    """The experiment."""
    config = ml_collections.ConfigDict()
    config.task = "lidar_segmentation"
    config.seed = 0
    config.total_steps = 15 * 19_130 // 16
    config.batch_size = 16
    config.compute_dtype = "bfloat16"
    config.optimizer = dict(name="sgd", learning_rate=0.24, beta1=0.9, weight_decay=1e-4, warmup_steps=125)
    config.save_every = 1000
    config.monitor_every = 1000
    config.lidar_segmentation = dict(
        ratio=1.0,
        level_fractions=(0.8, 0.5, 0.3, 0.15),
        data=dict(name="semantic_kitti", path=""),
        scans=dict(voxel_size=0.05, scans_per_group=2, max_voxels=80_000),
    )
    return config
