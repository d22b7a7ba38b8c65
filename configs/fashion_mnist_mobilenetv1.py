"""Fashion-MNIST, MobileNetV1 of width 0.25, strides for small images. About 13 minutes on two cores with other jobs running.

Test accuracy, seed 0: float 89.66, mixed at W3A3-level BitOps 88.71 %, with --joint.slices false --joint.alpha_policies 0 and
search.py --criterion learned. What the default chooses, and uniform and random policies of the same BitOps: docs/results.md.

python train.py  --config configs/fashion_mnist_mobilenetv1.py --workdir runs/fashion_mobilenetv1
python search.py --workdir runs/fashion_mobilenetv1 --budget bitops=W3A3
python train.py  --config configs/fashion_mnist_mobilenetv1.py --workdir runs/fashion_mobilenetv1 \\
    --policy runs/fashion_mobilenetv1/policy.json --finetune.compare false
"""

from mpq_jax.config import Config, Data, Finetune, Joint, Model, Pretrain

config = Config(
    data=Data(name="fashion_mnist"),
    model=Model(name="mobilenetv1", options={"width": 0.25, "small_images": True}),
    pretrain=Pretrain(steps=2000, batch_size=128, learning_rate=0.1, warmup_steps=100),
    joint=Joint(steps=300, batch_size=64),
    finetune=Finetune(steps=1000, batch_size=128, learning_rate=0.02, warmup_steps=50),
)
