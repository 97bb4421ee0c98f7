"""The paper's solver as a PyTorch loop, as in the published code: every layer alone, the others frozen, up and down.

Started by `sharpness.py`; needs `.[bench]`. Tensors are in memory, the network in evaluation mode. Prints JSON.
"""

import json
import sys
import time

import torch
from torch_loop import prepared

RADIUS, RATE = 0.05, 0.1


def mean_loss(net, x, y, batch):
    with torch.no_grad():
        total = sum(
            torch.nn.functional.cross_entropy(net(a), b, reduction="sum") for a, b in zip(x.split(batch), y.split(batch))
        )
    return total.item() / len(y)


def search(net, weight, x, y, batch, rounds, sign, start):
    anchor = weight.detach().clone()
    reach, best = RADIUS * anchor.norm(), 0.0
    optimiser = torch.optim.SGD([weight], lr=RATE)
    for _ in range(rounds):
        order = torch.randperm(len(y))
        for at in order.split(batch):
            optimiser.zero_grad()
            (-sign * torch.nn.functional.cross_entropy(net(x[at]), y[at])).backward()
            optimiser.step()
        with torch.no_grad():
            moved = weight - anchor
            if moved.norm() > reach:
                weight.copy_(anchor + moved * (reach / moved.norm()))
        best = max(best, sign * (mean_loss(net, x, y, batch) - start))
    with torch.no_grad():
        weight.copy_(anchor)
    return best


def main(name, path, batch, rounds, layers, layout):
    net, x, y = prepared(name, path, layout)
    weights = [p for p in net.parameters() if p.ndim >= 2]
    start, found, seconds = mean_loss(net, x, y, batch), [], []
    for at in layers:
        for p in net.parameters():
            p.requires_grad_(False)
        weights[at].requires_grad_(True)
        begun = time.perf_counter()
        found.append([search(net, weights[at], x, y, batch, rounds, sign, start) for sign in (1, -1)])
        seconds.append(time.perf_counter() - begun)
    print(json.dumps({"loss": start, "found": found, "seconds": seconds}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), json.loads(sys.argv[5]), sys.argv[6])
