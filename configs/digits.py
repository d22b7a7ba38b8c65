"""digits: the demo. ResNet-8 on scikit-learn's scans of handwritten digits, 8x8 pixels. About 77 seconds on two cores.

Test accuracy, seed 0 (355 images: differences of a point are chance): float 99.72, uniform W3A3 99.72, mixed at its BitOps
99.15, random 98.78 %.

make demo
"""

from mpq_jax.config import Config, Data, Finetune, Joint, Model, Pretrain

config = Config(
    data=Data(name="digits", augment=False),
    model=Model(name="resnet8"),
    pretrain=Pretrain(steps=300, batch_size=128, learning_rate=0.1, warmup_steps=30),
    joint=Joint(steps=200, batch_size=128),
    finetune=Finetune(steps=200, batch_size=128, learning_rate=0.02, random_policies=3),
    statistics_batches=20,
    checkpoint_every=100,
)
