r"""DuoAttention's gates of Llama 3 8B with the published settings (arXiv:2410.10819, section 3.1).

  python train.py --config=experiments/duo_attention/llama3_8b.py --workdir=runs/llama3_gates \
    --config.duo_attention.start=Llama-3-8B-Instruct-Gradient-1048k --config.duo_attention.model={} \
    --config.duo_attention.data.text.tokenizer=Llama-3-8B-Instruct-Gradient-1048k \
    --config.duo_attention.data.text.name=files --config.duo_attention.data.text.path=booksum
  python train.py --config=experiments/duo_attention/llama3_8b.py --compile_only --topology=h200:1
  python evaluate.py --config=experiments/duo_attention/llama3_8b.py --compile_only --topology=h200:1

2000 steps of one sample of up to 32,000 tokens; start may also be a folder of AWQ weights. The original takes about 4
hours on 8 A100s for a 7B model (mit-han-lab/duo-attention, issue 2); not run here. Without weights the last two lines
say what a step of training, and one of decoding with half of the heads streaming, need on hardware that is absent.
"""

import ml_collections


def get_config():
    """The experiment."""
    config = ml_collections.ConfigDict()
    config.task = "duo_attention"
    config.seed = 42
    config.total_steps = 2000
    config.batch_size = 1
    config.compute_dtype = "bfloat16"
    config.optimizer = dict(
        learning_rate=0.02, schedule="trapezoid", warmup_steps=400, final_learning_rate=0.002, beta2=0.999
    )
    config.save_every = 500
    config.keep = 1
    config.duo_attention = dict(
        model=dict(size="llama3_8b"),
        data=dict(samples=dict(passkeys=10, words=32, shortest=1000, longest=32_000, lengths=50)),
        sink=128,
        recent=256,
        regularisation=0.05,
        deployment=dict(sparsity=0.5, sink=64, recent=256, slots=131_072),
        evaluation_samples=8,
        random_choices=0,
        sparsities=(0.5,),
    )
    return config
