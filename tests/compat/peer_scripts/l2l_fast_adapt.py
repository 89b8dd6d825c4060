"""Few-shot images as in learn2learn's examples/vision: support and query in one batch.

The networks of images have batch norm, whose running statistics the last evaluation uses.
"""

import learn2learn as l2l
import numpy as np
import torch
from torch import nn, optim

from tests.helpers.deterministic import digest, filled, wave


def accuracy(predictions, targets):
    predictions = predictions.argmax(dim=1).view(targets.shape)
    return (predictions == targets).sum().float() / targets.size(0)


def fast_adapt(batch, learner, loss, adaptation_steps, shots, ways, device):
    data, labels = batch
    data, labels = data.to(device), labels.to(device)

    adaptation_indices = np.zeros(data.size(0), dtype=bool)
    adaptation_indices[np.arange(shots * ways) * 2] = True
    evaluation_indices = torch.from_numpy(~adaptation_indices)
    adaptation_indices = torch.from_numpy(adaptation_indices)
    adaptation_data, adaptation_labels = data[adaptation_indices], labels[adaptation_indices]
    evaluation_data, evaluation_labels = data[evaluation_indices], labels[evaluation_indices]

    for _ in range(adaptation_steps):
        train_error = loss(learner(adaptation_data), adaptation_labels)
        learner.adapt(train_error)

    predictions = learner(evaluation_data)
    valid_error = loss(predictions, evaluation_labels)
    valid_accuracy = accuracy(predictions, evaluation_labels)
    return valid_error, valid_accuracy


ways, shots, meta_batch_size, adaptation_steps = 3, 2, 2, 3
device = torch.device("cpu")
model = filled(
    nn.Sequential(
        *(nn.Conv2d(1, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(16, ways)),
    )
)
maml = l2l.algorithms.MAML(model, lr=0.1, first_order=False)
opt = optim.Adam(maml.parameters(), 0.003)
loss = nn.CrossEntropyLoss(reduction="mean")
RESULT = []


def task(index):
    labels = torch.arange(2 * shots * ways) // (2 * shots)
    return wave(len(labels), 1, 8, 8, start=index) + 0.2 * labels.view(-1, 1, 1, 1), labels


for iteration in range(3):
    opt.zero_grad()
    meta_train_error = 0.0
    meta_train_accuracy = 0.0
    for t in range(meta_batch_size):
        learner = maml.clone()
        batch = task(10 * iteration + t)
        evaluation_error, evaluation_accuracy = fast_adapt(
            batch, learner, loss, adaptation_steps, shots, ways, device
        )
        evaluation_error.backward()
        meta_train_error += evaluation_error.item()
        meta_train_accuracy += evaluation_accuracy.item()
    for p in maml.parameters():
        p.grad.data.mul_(1.0 / meta_batch_size)
    opt.step()
    RESULT += [meta_train_error / meta_batch_size, meta_train_accuracy / meta_batch_size]

maml.eval()
with torch.no_grad():
    RESULT += digest(maml(task(99)[0]))
