r"""LongLoRA in small: a decoder trained on windows of 256 bytes is extended to 2048 (arXiv:2309.12307).

Positions are scaled by YaRN (arXiv:2309.00071). LongLoRA divides them, which a model this small does not get over.
After experiments/longlora/python_sources_base.py, four arms with the same steps, windows and learning rate:

  python train.py --config=experiments/longlora/python_sources.py --workdir=runs/longlora/shifted_lora_plus
  python train.py --config=experiments/longlora/python_sources.py --workdir=runs/longlora/shifted_lora \
    --config.language.lora.trained="()"
  python train.py --config=experiments/longlora/python_sources.py --workdir=runs/longlora/shifted \
    --config.language.lora.rank=0
  python train.py --config=experiments/longlora/python_sources.py --workdir=runs/longlora/full \
    --config.language.lora.rank=0 --config.language.attention.kind=full

Two CPU cores, shared: 4 to 9 minutes an arm. Perplexity at 2048, evaluated with full attention: full fine-tuning 3.10,
LoRA+ 3.12, LoRA 3.15, all weights with shifted attention 3.14. The paper, Llama 2 7B to 32768 on PG19: full fine-tuning
8.08, LoRA 11.44, LoRA+ 8.12. docs/longlora.md has the rest, and the command that draws it.
"""

import ml_collections


def get_config():
    """The experiment."""
    config = ml_collections.ConfigDict()
    config.task = "language"
    config.seed = 1
    config.total_steps = 200
    config.batch_size = 2
    config.optimizer = dict(
        name="adamw",
        learning_rate=1e-3,
        warmup_steps=20,
        final_learning_rate=2e-5,
        clip_norm=1.0,
    )
    config.log_every = 20
    config.save_every = 100
    config.language = dict(
        start="runs/longlora/base",
        context=2048,
        scaling="yarn",
        attention=dict(kind="shifted"),
        lora=dict(rank=8, alpha=16.0),
        data=dict(name="python_sources"),
        length=2048,
        evaluation_length=2048,
        evaluation_blocks=64,
    )
    return config
