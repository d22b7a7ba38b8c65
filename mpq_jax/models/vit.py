"""A small Vision Transformer (Dosovitskiy et al. 2020, arXiv 2010.11929): pre-norm, class token, learned positions.

The layout is timm's: LayerNorm with epsilon 1e-6, exact GELU, biases everywhere.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype

_init = nn.initializers.truncated_normal(0.02)


class Mlp(nn.Module):
    """Two dense layers with a GELU between: [B, N, D] -> [B, N, D]."""

    hidden: int
    dropout: float
    train: bool
    dtype: Dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        dim = x.shape[-1]
        x = nn.Dense(self.hidden, dtype=self.dtype, kernel_init=_init, name="fc1")(x)
        x = nn.gelu(x, approximate=False)
        x = nn.Dropout(self.dropout, deterministic=not self.train)(x)
        x = nn.Dense(dim, dtype=self.dtype, kernel_init=_init, name="fc2")(x)
        return nn.Dropout(self.dropout, deterministic=not self.train)(x)


class Block(nn.Module):
    """Attention and MLP, each normalised before and added to its input: [B, N, D] -> [B, N, D].

    `train` is a field, not an argument: nn.remat and nn.scan then see arrays only.
    """

    heads: int
    mlp_ratio: float
    dropout: float
    train: bool
    dtype: Dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = nn.LayerNorm(epsilon=1e-6, dtype=self.dtype, name="norm1")(x)
        y = nn.MultiHeadDotProductAttention(
            self.heads, dtype=self.dtype, kernel_init=_init, force_fp32_for_softmax=True, name="attn"
        )(y)
        x = x + nn.Dropout(self.dropout, deterministic=not self.train)(y)
        y = nn.LayerNorm(epsilon=1e-6, dtype=self.dtype, name="norm2")(x)
        return x + Mlp(int(x.shape[-1] * self.mlp_ratio), self.dropout, self.train, self.dtype, name="mlp")(y)


class ViT(nn.Module):
    """Vision Transformer: [B, H, W, C] -> float32 logits [B, num_classes]; H and W are multiples of `patch_size`.

    dim, depth, heads: width of a token, number of blocks, attention heads (`dim` is a multiple of `heads`).
    mlp_ratio: hidden width of the MLP over `dim`. dropout: rate after positions, attention and both MLP layers.
    scan: one block of stacked parameters, run by nn.scan: parameters are at blocks/… with a leading axis of `depth`;
        without it they are at block1/…, block2/….
    remat: recompute each block in the backward pass in place of keeping its activations.
    dtype: of the computation; parameters are float32, and so is the softmax.
    Raises ValueError where `patch_size` does not divide the image or `heads` does not divide `dim`.
    """

    num_classes: int
    patch_size: int = 4
    dim: int = 64
    depth: int = 4
    heads: int = 4
    mlp_ratio: float = 4.0
    dropout: float = 0.0
    scan: bool = False
    remat: bool = False
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        x = self._tokens(x)
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        x = self._blocks(x, train)
        x = nn.LayerNorm(epsilon=1e-6, dtype=self.dtype, name="norm")(x)[:, 0]
        head = nn.Dense(self.num_classes, dtype=self.dtype, kernel_init=_init, name="head")
        return head(x).astype(jnp.float32)

    def _tokens(self, x: jax.Array) -> jax.Array:
        """[B, H, W, C] -> [B, 1 + H/p * W/p, D]: class token and patches, positions added."""
        batch, height, width, _ = x.shape
        p = self.patch_size
        if height % p or width % p:
            raise ValueError(f"the image is {height}x{width}; patch_size {p} must divide both sides")
        if self.dim % self.heads:
            raise ValueError(f"dim is {self.dim}; heads {self.heads} must divide it")
        x = nn.Conv(self.dim, (p, p), strides=(p, p), padding="VALID", dtype=self.dtype, name="patch_embed")(x)
        x = x.reshape(batch, -1, self.dim)
        token = self.param("cls_token", nn.initializers.normal(1e-6), (1, 1, self.dim))
        positions = self.param("pos_embed", _init, (1, 1 + x.shape[1], self.dim))
        x = jnp.concatenate([jnp.broadcast_to(token, (batch, 1, self.dim)).astype(x.dtype), x], axis=1)
        return x + positions.astype(x.dtype)

    def _blocks(self, x: jax.Array, train: bool) -> jax.Array:
        cls: Any = nn.remat(Block, prevent_cse=not self.scan) if self.remat else Block
        fields = (self.heads, self.mlp_ratio, self.dropout, train, self.dtype)
        if not self.scan:
            for i in range(self.depth):
                x = cls(*fields, name=f"block{i + 1}")(x)
            return x
        run = nn.scan(
            lambda block, x, _: (block(x), None),
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            length=self.depth,
        )
        return run(cls(*fields, name="blocks"), x, None)[0]
