"""CIFAR-10, ResNet-20. Not run in full here: its data set was not at hand.

python train.py  --config configs/cifar10_resnet20.py --workdir runs/cifar10_resnet20
python search.py --workdir runs/cifar10_resnet20 --budget bitops=W3A3
"""

from mpq_jax.config import Config, Data, Finetune, Joint, Model, Pretrain

config = Config(
    data=Data(name="cifar10"),
    model=Model(name="resnet20"),
    pretrain=Pretrain(steps=0, epochs=160, batch_size=128, learning_rate=0.1, warmup_steps=400),
    joint=Joint(steps=600, batch_size=128),
    finetune=Finetune(steps=0, epochs=60, batch_size=128, learning_rate=0.04, warmup_steps=400),
)
