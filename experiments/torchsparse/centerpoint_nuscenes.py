r"""CenterPoint on nuScenes with voxels of 0.075 m, after OpenPCDet's recipe (arXiv:2006.11275).

The recipe is 8 GPUs with 4 scans of ten sweeps each, 20 epochs of 28 130 scans; the settings below are for one GPU and
its share of the learning rate. OpenPCDet's result is mAP 59.2, NDS 66.5, with objects pasted in from other scans and
scans of rare classes repeated, which is not done here: expect less. Its learning rate has one cycle up and down.
The scans of $SCENES/train and $SCENES/val are .npz files, see `lumen.training.detection.scene_folder`.
Run: python train.py --config=experiments/torchsparse/centerpoint_nuscenes.py --workdir=$WORKDIR \
  --config.detection.data.path=$SCENES
With 8 GPUs: --config.batch_size=32 --config.total_steps=17580 --config.optimizer.learning_rate=1e-3
Plan: python train.py --config=experiments/torchsparse/centerpoint_nuscenes.py --compile_only --topology=h200:1
"""

import ml_collections

EPOCH = 28_130 // 4


def get_config():
    """The experiment."""
    config = ml_collections.ConfigDict()
    config.task = "detection"
    config.seed = 0
    config.total_steps = 20 * EPOCH
    config.batch_size = 4
    config.compute_dtype = "bfloat16"
    config.optimizer = dict(
        name="adamw", learning_rate=1.25e-4, schedule="cosine", warmup_steps=EPOCH, weight_decay=0.01, clip_norm=10.0
    )
    config.log_every = 50
    config.monitor_every = 5 * EPOCH
    config.save_every = 1000
    config.detection = dict(
        detector="centerpoint",
        model=dict(size="nuscenes"),
        data=dict(name="scene_folder", path="", workers=8),
        scans_per_group=4,
    )
    return config
