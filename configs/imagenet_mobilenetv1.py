"""ImageNet, MobileNetV1.

The paper's hyper-parameters (mpq_jax.config.PAPER_JOINT and PAPER_FINETUNE); first convolution and classifier stay at
8 bits. Not run in full here: two steps on made images, by benchmarks/imagenet_steps.py.

  python train.py  --config configs/imagenet_mobilenetv1.py --workdir runs/imagenet_mobilenetv1 \\
      --model.weights mobilenetv1.safetensors
  python search.py --workdir runs/imagenet_mobilenetv1 --budget bitops=W3A4
"""

from dataclasses import replace

from mpq_jax.config import PAPER_FINETUNE, PAPER_JOINT, Config, Data, Model, Pretrain, Quantize

BATCH = 512
STEPS_AN_EPOCH = int(1_281_167 * 0.98) // BATCH

config = Config(
    data=Data(name="imagenet2012", validation_fraction=0.02),
    model=Model(name="mobilenetv1"),
    quantize=Quantize(bit_widths=(2, 3, 4, 5, 6), ends="8,8", start="statistics"),
    pretrain=Pretrain(steps=0, epochs=90, batch_size=BATCH, learning_rate=0.2, weight_decay=1e-4, label_smoothing=0.1),
    joint=replace(PAPER_JOINT, epochs=5, batch_size=BATCH),
    finetune=replace(PAPER_FINETUNE, batch_size=BATCH, warmup_steps=5 * STEPS_AN_EPOCH),
    eval_batch_size=250,
    checkpoint_every=1000,
)
