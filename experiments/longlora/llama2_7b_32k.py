r"""Llama 2 7B extended from 4096 to 32768 tokens: LongLoRA's own run (arXiv:2309.12307, 1000 steps of 64 rows).

RedPajama's sample as runs/redpajama/{train,validation,test}.jsonl, the model's folder in Llama-2-7b-hf. One node of 8
GPUs; the original, on 8 A100 and with DeepSpeed ZeRO-2, took a day at 65536. Expected on PG19 validation, sliding
windows of 32768: perplexity 8.12 (full fine-tuning 8.08, LoRA without embedding and norms 11.44). Not run here; the
second line compiles its step: 15.0 GiB on each of 8 H200s.

  python train.py --config=experiments/longlora/llama2_7b_32k.py --workdir=runs/llama2_32k
  python train.py --config=experiments/longlora/llama2_7b_32k.py --compile_only --topology=h200:8 \
    --config.language.start= --config.language.model="{'size': 'llama2_7b'}"

runs/llama2_32k/adapter then holds PEFT's files, runs/llama2_32k/model the merged model. From a 4-bit folder (QLoRA) it
is --config.language.start=Llama-2-7B-AWQ.
"""

import ml_collections


def get_config():
    """The experiment."""
    config = ml_collections.ConfigDict()
    config.task = "language"
    config.seed = 0
    config.total_steps = 1000
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
    config.save_every = 100
    config.language = dict(
        start="Llama-2-7b-hf",
        context=32768,
        attention=dict(kind="shifted"),
        lora=dict(rank=8, alpha=16.0, frozen_dtype="bfloat16"),
        data=dict(name="files", path="runs/redpajama", tokenizer="Llama-2-7b-hf"),
        length=32768,
        chunk=2048,
        remat=True,
        evaluation_length=32768,
        evaluation_blocks=64,
    )
    return config
