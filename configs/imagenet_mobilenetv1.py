"""ImageNet, MobileNetV1.

The hyper-parameters are the paper's (Tang et al. 2022, read in its public code): all weights and step sizes by SGD,
one copy of every normalisation a bit-width, weight and activation bits of the random row drawn together, fine-tuning
from the float checkpoint. First convolution and classifier stay at 8 bits. Not run in full here.

  python train.py  --config configs/imagenet_mobilenetv1.py --workdir runs/imagenet_mobilenetv1 --model.weights mobilenetv1.safetensors
  python search.py --workdir runs/imagenet_mobilenetv1 --budget bitops=W3A4
"""

from mpq_jax.config import Config, Data, Finetune, Joint, Model, Pretrain, Quantize

BATCH = 512
STEPS_AN_EPOCH = int(1_281_167 * 0.98) // BATCH

config = Config(
    data=Data(name="imagenet2012", validation_fraction=0.02),
    model=Model(name="mobilenetv1"),
    quantize=Quantize(bit_widths=(2, 3, 4, 5, 6), ends="8,8", start="statistics"),
    pretrain=Pretrain(steps=0, epochs=90, batch_size=BATCH, learning_rate=0.2, weight_decay=1e-4, label_smoothing=0.1),
    joint=Joint(
        steps=0,
        epochs=5,
        batch_size=BATCH,
        weights="trained",
        learning_rate=0.01,
        end_learning_rate=1e-5,
        momentum=0.9,
        weight_decay=2.5e-5,
        clip=1.0,
        step_size_optimizer="sgd",
        error_weight=0.0,
        same_bits=True,
        affine_per_row=True,
        label_smoothing=0.1,
        alpha="auto",
    ),
    finetune=Finetune(
        start="float",
        steps=0,
        epochs=95,
        batch_size=BATCH,
        learning_rate=0.04,
        weight_decay=2.5e-5,
        warmup_steps=5 * STEPS_AN_EPOCH,
        label_smoothing=0.1,
    ),
    eval_batch_size=250,
    checkpoint_every=1000,
)
