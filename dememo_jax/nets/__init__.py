"""Reference networks as Linen modules; `models.from_linen` makes a Model of each."""

from dememo_jax.nets.densenet import DenseNet, densenet121
from dememo_jax.nets.language import Decoder, decoder_cuts
from dememo_jax.nets.plain import CNN, MLP, cnn, mlp
from dememo_jax.nets.resnet import BasicBlock, Bottleneck, ResNet, SqueezeBlock, resnet18, resnet50, senet18
from dememo_jax.nets.vit import ViT, vit_tiny

__all__ = [
    "CNN",
    "MLP",
    "BasicBlock",
    "Bottleneck",
    "Decoder",
    "DenseNet",
    "ResNet",
    "SqueezeBlock",
    "ViT",
    "cnn",
    "decoder_cuts",
    "densenet121",
    "mlp",
    "resnet18",
    "resnet50",
    "senet18",
    "vit_tiny",
]
