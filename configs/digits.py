"""digits: the demo. ResNet-8 on scikit-learn's scans of handwritten digits, 8x8 pixels.

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
