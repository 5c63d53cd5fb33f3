r"""CenterPoint on nuScenes with voxels of 0.075 m, after OpenPCDet's recipe (arXiv:2006.11275).

Source: tools/cfgs/nuscenes_models/cbgs_voxel0075_res3d_centerpoint.yaml of open-mmlab/OpenPCDet, whose result on the
validation scenes is mAP 59.2, NDS 66.5: 20 epochs of the class-balanced scans (about 123 580, drawn from 28 130), ten
sweeps each, objects of rare classes pasted in, one cycle of the learning rate. There 8 GPUs have 4 scans each and the
peak rate is 1e-3; the settings below are for one GPU and its share of the rate. There biases and norms decay too.
$NUSCENES has samples/, sweeps/ and v1.0-trainval/ as published. The first run cuts the objects to paste out of the
training scans into $WORKDIR/objects, about 0.1 s of a core per scan; give --config.detection.data.objects=FOLDER to
share them between runs. evaluate.py gives the official metric, with eval/nuscenes.md as a table and
eval/nuscenes_results.json for the evaluation server; with --config.detection.data.version=v1.0-test only the latter.
Run: python train.py --config=experiments/torchsparse/centerpoint_nuscenes.py --workdir=$WORKDIR \
  --config.detection.data.path=$NUSCENES
With 8 GPUs: --config.batch_size=32 --config.total_steps=77240 --config.optimizer.warmup_steps=30896 \
  --config.optimizer.learning_rate=1e-3 --config.optimizer.initial_learning_rate=1e-4 \
  --config.optimizer.final_learning_rate=1e-8
Try-out: --config.detection.data.version=v1.0-mini --config.total_steps=2000 --config.optimizer.warmup_steps=800
Plan: python train.py --config=experiments/torchsparse/centerpoint_nuscenes.py --compile_only --topology=h200:1
"""

import ml_collections

EPOCH = 123_580 // 4


def get_config():
    """The experiment."""
    config = ml_collections.ConfigDict()
    config.task = "detection"
    config.seed = 0
    config.total_steps = 20 * EPOCH
    config.batch_size = 4
    config.compute_dtype = "bfloat16"
    config.optimizer = dict(
        name="adamw",
        schedule="one_cycle",
        warmup_steps=8 * EPOCH,
        initial_learning_rate=1.25e-5,
        learning_rate=1.25e-4,
        final_learning_rate=1.25e-9,
        beta1=0.95,
        beta1_at_peak=0.85,
        beta2=0.99,
        weight_decay=0.01,
        clip_norm=10.0,
    )
    config.log_every = 50
    config.monitor_every = EPOCH
    config.save_every = 1000
    config.detection = dict(
        detector="centerpoint",
        model=dict(size="nuscenes"),
        data=dict(
            name="nuscenes",
            path="",
            version="v1.0-trainval",
            sweeps=10,
            balanced=True,
            pasted=dict(
                car=2,
                truck=3,
                construction_vehicle=7,
                bus=4,
                trailer=6,
                barrier=2,
                motorcycle=6,
                bicycle=6,
                pedestrian=2,
                traffic_cone=2,
            ),
            workers=8,
        ),
        scans_per_group=4,
    )
    return config
