"""Fashion-MNIST, ResNet-8 (77,072 kernel weights). About 11 minutes a seed on two cores with other jobs running.

Test accuracy over seeds 0, 1, 2: float 88.55, uniform W3A3 88.58, mixed at W3A3-level BitOps 88.41, random 88.09 %, with
--joint.slices false --joint.alpha_policies 0 and search.py --criterion learned. What the default chooses: docs/results.md.

python train.py  --config configs/fashion_mnist_resnet8.py --workdir runs/fashion_resnet8
python search.py --workdir runs/fashion_resnet8 --budget bitops=W3A3
python train.py  --config configs/fashion_mnist_resnet8.py --workdir runs/fashion_resnet8 --policy runs/fashion_resnet8/policy.json
"""

from mpq_jax.config import Config, Data, Finetune, Joint, Model, Pretrain

config = Config(
    data=Data(name="fashion_mnist"),
    model=Model(name="resnet8"),
    pretrain=Pretrain(steps=1200, batch_size=128, learning_rate=0.1, warmup_steps=100),
    joint=Joint(steps=300, batch_size=64),
    finetune=Finetune(steps=500, batch_size=128, learning_rate=0.02, warmup_steps=50),
)
