r"""Supervised fine-tuning of an extended Llama 2 7B on LongAlpaca-12k (arXiv:2309.12307, section 4; 5 epochs).

LongAlpaca-12k.json beside the program, and the merged model of experiments/longlora/llama2_7b_32k.py. Loss on the
answers alone; samples are packed into rows, and groups are counted from each sample's start. The original has one
record in a row, 188 batches an epoch; packed there are fewer. Expected, LongBench's average: 36.8 for LongAlpaca-7B-16k
(Llama 2 7B chat 31.0). Not run here.

  python train.py --config=experiments/longlora/longalpaca.py --workdir=runs/longalpaca
"""

import ml_collections


def get_config():
    """The experiment."""
    config = ml_collections.ConfigDict()
    config.task = "language"
    config.seed = 0
    config.total_steps = 900
    config.batch_size = 64
    config.accumulate = 8
    config.compute_dtype = "bfloat16"
    config.mesh = dict(fsdp=-1)
    config.optimizer = dict(
        name="adamw",
        learning_rate=2e-5,
        schedule="constant",
        warmup_steps=20,
        beta2=0.95,
    )
    config.log_every = 10
    config.save_every = 98
    config.language = dict(
        start="runs/llama2_32k",
        attention=dict(kind="shifted", group=8192),
        lora=dict(rank=8, alpha=16.0, frozen_dtype="bfloat16"),
        data=dict(name="files", tokenizer="Llama-2-7b-hf"),
        instructions=dict(path="LongAlpaca-12k.json", tokenizer="Llama-2-7b-hf", held_out=64),
        length=32768,
        chunk=2048,
        remat=True,
    )
    return config
