"""ImageNet, ResNet-50; alpha 2 as in the public code, for the learned step sizes (search.py --criterion learned).

The paper's hyper-parameters (mpq_jax.config.PAPER_JOINT and PAPER_FINETUNE); first convolution and classifier stay at
8 bits. Not run in full here: benchmarks/imagenet_steps.py compiles its joint step.

  python train.py  --config configs/imagenet_resnet50.py --workdir runs/imagenet_resnet50 \\
      --model.weights resnet50.safetensors
  python search.py --workdir runs/imagenet_resnet50 --budget bitops=W3A4
"""

from dataclasses import replace

from mpq_jax.config import PAPER_FINETUNE, PAPER_JOINT, Config, Data, Model, Pretrain, Quantize

BATCH = 512
STEPS_AN_EPOCH = int(1_281_167 * 0.98) // BATCH

config = Config(
    data=Data(name="imagenet2012", validation_fraction=0.02),
    model=Model(name="resnet50"),
    quantize=Quantize(bit_widths=(2, 3, 4, 5, 6), ends="8,8", start="statistics"),
    pretrain=Pretrain(steps=0, epochs=90, batch_size=BATCH, learning_rate=0.2, weight_decay=1e-4, label_smoothing=0.1),
    joint=replace(PAPER_JOINT, epochs=3, batch_size=BATCH, alpha="2"),
    finetune=replace(PAPER_FINETUNE, batch_size=BATCH, warmup_steps=5 * STEPS_AN_EPOCH),
    eval_batch_size=250,
    checkpoint_every=1000,
)
