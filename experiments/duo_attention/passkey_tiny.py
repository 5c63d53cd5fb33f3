r"""DuoAttention's gates on a tiny decoder that finds passkeys, against random choices of heads (arXiv:2410.10819).

32 key/value heads in all. First the decoder, then its gates, then what they are worth with half of the heads streaming:
  python train.py --config=experiments/duo_attention/passkey_tiny_model.py --workdir=runs/passkey_model_0
  python train.py --config=experiments/duo_attention/passkey_tiny.py --workdir=runs/passkey_gates_0 \
    --config.duo_attention.start=runs/passkey_model_0/model
  python evaluate.py --config=experiments/duo_attention/passkey_tiny.py --workdir=runs/passkey_gates_0 \
    --config.duo_attention.start=runs/passkey_model_0/model
Unlike published: sizes (sink, recent, lengths, steps), λ = 0.3 for 0.05, and the student's own branch, because with the
teacher's one seed of three overlooks an early head (docs/duo_attention.md).
Two CPU cores: a minute for the gates, half a minute for the comparison. Expected: recall 0.99 to 1.00 with half of the
heads streaming, as with full attention; 0.5 to 0.7 with random heads.
"""

import ml_collections


def get_config():
    """The experiment."""
    config = ml_collections.ConfigDict()
    config.task = "duo_attention"
    config.seed = 0
    config.total_steps = 200
    config.batch_size = 8
    config.optimizer = dict(
        learning_rate=0.02, schedule="trapezoid", warmup_steps=40, final_learning_rate=0.002, beta2=0.999
    )
    config.log_every = 25
    config.save_every = 200
    config.duo_attention = dict(
        start="runs/passkey_model_0/model",
        data=dict(
            text=dict(name="python_sources", tokenizer="experiments/duo_attention/words"),
            samples=dict(passkeys=2, words=4, shortest=4, longest=128, lengths=16, text="anywhere"),
        ),
        sink=4,
        recent=16,
        branch="student",
        regularisation=0.3,
        remat=False,
        deployment=dict(sparsity=0.5, sink=4, recent=16),
        evaluation_samples=64,
        random_choices=20,
        sparsities=(0.25, 0.5, 0.625, 0.75, 0.875),
    )
    return config
