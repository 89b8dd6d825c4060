"""MAML as higher's documentation writes it."""

import higher
import torch
from torch import nn

from tests.helpers.deterministic import digest, filled, wave

net = filled(
    nn.Sequential(
        *(nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4, momentum=1, affine=True), nn.ReLU()),
        *(nn.MaxPool2d(2, 2), nn.Flatten(), nn.Linear(36, 3)),
    )
)
meta_opt = torch.optim.Adam(net.parameters(), lr=1e-3)
RESULT = []

for iteration in range(3):
    x_spt = wave(2, 6, 1, 8, 8, start=iteration)
    x_qry = wave(2, 6, 1, 8, 8, start=iteration + 0.5)
    y_spt = y_qry = (torch.arange(12) % 3).view(2, 6)
    n_inner_iter = 3
    inner_opt = torch.optim.SGD(net.parameters(), lr=1e-1)
    qry_losses = []
    meta_opt.zero_grad()
    for i in range(2):
        with higher.innerloop_ctx(net, inner_opt, copy_initial_weights=False) as (fnet, diffopt):
            for _ in range(n_inner_iter):
                spt_logits = fnet(x_spt[i])
                spt_loss = nn.functional.cross_entropy(spt_logits, y_spt[i])
                diffopt.step(spt_loss)
            qry_logits = fnet(x_qry[i])
            qry_loss = nn.functional.cross_entropy(qry_logits, y_qry[i])
            qry_losses.append(qry_loss.detach())
            qry_loss.backward()
    meta_opt.step()
    RESULT.append(sum(qry_losses).item())

RESULT += digest(*net.parameters())
