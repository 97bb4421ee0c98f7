"""The sequential PyTorch loop that `certify.py` compares with: add noise, evaluate under no_grad, take the noise away.

As in the published code, but with the tensors in memory and batches of 512. Started by `certify.py`; needs `.[bench]`.
`Noisy` is the loop of `accelerator.py`, on any device and in any precision.
"""

import json
import sys
import time

import numpy as np
import torch
from torch import nn

BATCH = 512
CHECKED = 1024  # images whose accuracy is compared with ours


class Block(nn.Module):
    def __init__(self, before, width, stride):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(before, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width),
        )  # fmt: skip
        self.skip = (
            nn.Identity()
            if before == width and stride == 1
            else nn.Sequential(nn.Conv2d(before, width, 1, stride, bias=False), nn.BatchNorm2d(width))
        )

    def forward(self, x):
        return torch.relu(self.body(x) + self.skip(x))


def mlp(inputs, hidden):
    return nn.Sequential(nn.Flatten(), nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, 10))


def cnn():
    layers, before = [], 3
    for i, width in enumerate((32, 64, 128)):
        layers += [nn.Conv2d(before, width, 3, 1 if i == 0 else 2, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        before = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, 10))


def resnet18(narrow=64):
    layers, before = [nn.Conv2d(3, narrow, 3, 1, 1, bias=False), nn.BatchNorm2d(narrow), nn.ReLU()], narrow
    for i, width in enumerate((narrow, 2 * narrow, 4 * narrow, 8 * narrow)):
        for j in range(2):
            layers.append(Block(before, width, 2 if i > 0 and j == 0 else 1))
            before = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, 10))


NETS = {"digits": lambda: mlp(64, 128), "mlp": lambda: mlp(3072, 256), "cnn": cnn, "resnet18": resnet18}


def load(net, leaves, flip):
    """Weights in the order of the layers, HWIO kernels turned to OIHW. Batch norm keeps its first statistics, 0 and 1.

    flip: turn kernels by half a turn. Flax's "SAME" pads strided convolutions on the far side, PyTorch's padding=1 on the
    near one: on turned images the two networks are the same.
    """
    leaves = iter(leaves)
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.Conv2d):
                kernel = torch.from_numpy(next(leaves)).permute(3, 2, 0, 1)
                module.weight.copy_(kernel.flip(2, 3) if flip else kernel)
            elif isinstance(module, nn.Linear):
                module.weight.copy_(torch.from_numpy(next(leaves)).T)
                module.bias.copy_(torch.from_numpy(next(leaves)))


def prepared(name, path, layout):
    """The network in evaluation mode with the weights of the file, its images and labels."""
    torch.set_num_threads(2)
    with np.load(path, allow_pickle=False) as file:
        x, y = torch.from_numpy(file["x"]), torch.from_numpy(file["y"]).long()
        leaves = [file[f"w{i}"] for i in range(len(file.files) - 2)]
    net = NETS[name]().eval()
    load(net, leaves, name == "cnn")
    if name in ("cnn", "resnet18"):
        x = x.permute(0, 3, 1, 2).contiguous()
    if name == "cnn":
        x = x.flip(2, 3)
    if layout == "channels-last":
        net, x = net.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last)
    return net, x, y


def missing(device, precision):
    """Why PyTorch cannot run the loop here; None where it can."""
    if device == "cuda" and not torch.cuda.is_available():
        return "PyTorch sees no CUDA device"
    return "PyTorch has no TF32 on CPU" if device == "cpu" and precision == "tf32" else None


class Noisy:
    """Draws on a device, in channels-last layout: noisy copies of the weights go into a network of the precision asked for."""

    def __init__(self, net, leaves, x, y, *, device, precision):
        torch.backends.cudnn.benchmark = True
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "tf32"
        load(net, leaves, False)
        kind = torch.bfloat16 if precision == "bfloat16" else torch.float32
        self.params = [p.detach().clone().to(device) for p in net.parameters()]
        self.net = net.eval().to(device, dtype=kind, memory_format=torch.channels_last)
        images = torch.tensor(x).permute(0, 3, 1, 2).to(device, dtype=kind, memory_format=torch.channels_last)
        self.batches = list(zip(images.split(BATCH), torch.tensor(y).long().to(device).split(BATCH)))

    @torch.no_grad()
    def draw(self):
        for noisy, p in zip(self.net.parameters(), self.params):
            noisy.copy_(p + torch.randn_like(p) * 0.01)
        return sum((self.net(a).argmax(1) == b).sum() for a, b in self.batches).item()


def main(name, path, draws, layout):
    net, x, y = prepared(name, path, layout)
    batches = list(zip(x.split(BATCH), y.split(BATCH)))
    params, seconds = list(net.parameters()), []
    with torch.no_grad():
        first = batches[: CHECKED // BATCH]
        clean = sum((net(a).argmax(1) == b).sum().item() for a, b in first) / CHECKED
        for _ in range(draws):
            started = time.perf_counter()
            noise = [torch.randn_like(p) * 0.01 for p in params]
            for p, e in zip(params, noise):
                p.add_(e)
            sum((net(a).argmax(1) == b).sum().item() for a, b in batches)
            for p, e in zip(params, noise):
                p.sub_(e)
            seconds.append(time.perf_counter() - started)
    print(json.dumps({"clean": clean, "seconds": float(np.median(seconds))}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4])
