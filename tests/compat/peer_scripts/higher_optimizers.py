"""Learned settings of every optimizer, parameter groups, callbacks and evaluation with higher."""

import higher
import torch
from torch import nn

from tests.helpers.deterministic import digest, filled, wave

RESULT = []
net = filled(nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)))
x, y = wave(7, 3), wave(7, 2, start=3)
groups = [{"params": net[2].parameters(), "lr": 0.05}, {"params": net[0].parameters()}]
optimizers = [
    torch.optim.SGD(net.parameters(), 0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    torch.optim.SGD(groups, 0.1, momentum=0.8, dampening=0.1),
    torch.optim.Adam(net.parameters(), 0.05, weight_decay=0.01),
    torch.optim.Adam(groups, 0.05, betas=(0.8, 0.9), amsgrad=True),
    torch.optim.RMSprop(net.parameters(), 0.05, momentum=0.5, weight_decay=0.01),
    torch.optim.RMSprop(groups, 0.05, centered=True),
]
for opt in optimizers:
    rates = [torch.tensor(group["lr"], requires_grad=True) for group in opt.param_groups]
    for track in (True, False):
        with higher.innerloop_ctx(
            net, opt, None, False, override={"lr": rates}, track_higher_grads=track
        ) as (fnet, diffopt):
            for _ in range(3):
                diffopt.step(
                    nn.functional.mse_loss(fnet(x), y),
                    grad_callback=lambda grads: [g.clamp(-0.5, 0.5) for g in grads],
                )
            outer = nn.functional.mse_loss(fnet(x, params=fnet.parameters(time=-1)), y)
        RESULT.append(outer.item())
        if track:
            wanted = [*rates, *net.parameters()]
            RESULT += digest(*torch.autograd.grad(outer, wanted), *fnet.parameters(time=1))
            RESULT += digest(*fnet.init_fast_params, *fnet.fast_params)

for _ in range(2):  # state of an optimizer that has stepped already
    optimizers[2].zero_grad()
    nn.functional.mse_loss(net(x), y).backward()
    optimizers[2].step()
with higher.innerloop_ctx(net, optimizers[2], copy_initial_weights=True) as (fnet, diffopt):
    diffopt.step(nn.functional.mse_loss(fnet(x), y))
    RESULT += digest(*fnet.parameters())
