"""Batches and outputs that are trees: several inputs, several outputs, losses of both."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

import fastmeta as fm
from tests.helpers.networks import classification, joined, regressor, relative_error

EXACT = 1e-10
TASKS = 3


class Scores(NamedTuple):
    logits: Tensor
    hidden: Tensor


@dataclass
class Named:
    x: Tensor
    z: Tensor
    y: Tensor


class TwoInputs(nn.Module):
    """Two inputs, one of them of other shape; outputs in the structure that is asked for."""

    def __init__(self, outputs: type = dict) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(3, 4), nn.Linear(2, 4), nn.Linear(4, 3)
        self.outputs = outputs

    def forward(self, x: Tensor, z: Tensor, scale: float = 0.5) -> Any:
        hidden = torch.tanh(self.first(x) + scale * self.second(z))
        logits = self.last(hidden)
        if self.outputs is Tensor:
            return logits
        if self.outputs is tuple:
            return logits, hidden
        return Scores(logits, hidden) if self.outputs is Scores else {"logits": logits, "h": hidden}


def network(device: str, outputs: type = dict) -> TwoInputs:
    torch.manual_seed(0)
    return TwoInputs(outputs).double().to(device)


def logits_of(outputs: Any) -> Tensor:
    if isinstance(outputs, Tensor):
        return outputs
    return outputs["logits"] if isinstance(outputs, dict) else outputs[0]


def label_loss(outputs: Any, y: Tensor) -> Tensor:
    return F.cross_entropy(logits_of(outputs), y)


def batch_loss(outputs: Any, batch: Any) -> Tensor:
    return label_loss(outputs, batch["y"] if isinstance(batch, dict) else batch.y)


def batch(device: str, examples: int, seed: int = 0) -> dict[str, Tensor]:
    make = torch.Generator().manual_seed(seed)
    shape = TASKS, examples
    tensors = {
        "x": torch.randn(*shape, 3, generator=make).double(),
        "z": torch.randn(*shape, 2, generator=make).double(),
        "y": torch.randint(0, 3, shape, generator=make),
    }
    return {name: tensor.to(device) for name, tensor in tensors.items()}


def unrolled(
    net: TwoInputs, support: dict[str, Tensor], query: dict[str, Tensor], steps: int, first: bool
) -> Tensor:
    """The meta-loss by a loop over tasks and steps, with its graph."""
    losses = []
    for t in range(TASKS):
        fast = dict(net.named_parameters())

        def loss(fast: dict[str, Tensor], data: dict[str, Tensor], t: int = t) -> Tensor:
            outputs = functional_call(net, fast, (data["x"][t], data["z"][t]))
            return label_loss(outputs, data["y"][t])

        for _ in range(steps):
            grads = torch.autograd.grad(
                loss(fast, support), list(fast.values()), create_graph=not first
            )
            fast = {n: p - 0.3 * g for (n, p), g in zip(fast.items(), grads, strict=True)}
        losses.append(loss(fast, query))
    return torch.stack(losses).mean()


def in_form(data: dict[str, Tensor], form: str) -> tuple[Any, ...]:
    """One set of examples as arguments of a learner: a batch, or inputs and targets."""
    if form == "dict":
        return (data,)
    if form == "dataclass":
        return (Named(**data),)
    if form == "pair":
        return (((data["x"], data["z"]), data["y"]),)
    inputs = (data["x"], data["z"]) if form == "tuple" else {"z": data["z"], "x": data["x"]}
    return inputs, data["y"]


FORMS = ("dict", "dataclass", "pair", "tuple", "inputs")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("first_order", [False, True])
def test_the_meta_gradient_is_the_unrolled_one(form, first_order, device):
    net, support, query = network(device), batch(device, 5), batch(device, 7, seed=1)
    query["z"].requires_grad_()
    support["x"].requires_grad_()
    loss = batch_loss if form in ("dict", "dataclass") else label_loss
    maml = fm.MAML(net, 0.3, 3, first_order=first_order, loss=loss)
    value, outputs = maml.meta_loss(*in_form(support, form), *in_form(query, form))
    sources = [*net.parameters(), query["z"], *([] if first_order else [support["x"]])]
    grads = torch.autograd.grad(value, sources)
    expected = unrolled(net, support, query, 3, first_order)
    assert relative_error(value, expected) < EXACT
    for grad, exact in zip(grads, torch.autograd.grad(expected, sources), strict=True):
        assert relative_error(grad, exact) < EXACT
    assert outputs["logits"].shape == (TASKS, 7, 3)
    assert outputs["h"].shape == (TASKS, 7, 4)


@pytest.mark.parametrize("steps", [1, 2, 4, 5])
@pytest.mark.parametrize("chunk", [None, 1, 2])
@pytest.mark.parametrize("outputs", [dict, tuple, Scores])
def test_outputs_come_in_the_structure_of_the_module(outputs, chunk, steps, device):
    net, support, query = network(device, outputs), batch(device, 2), batch(device, 40, seed=1)
    maml = fm.MAML(net, 0.3, steps, loss=batch_loss, task_chunk=chunk)
    result = maml.meta_gradient(support, query)
    assert type(result.outputs) is outputs
    assert not logits_of(result.outputs).requires_grad
    expected = unrolled(net, support, query, steps, first=False)
    exact = joined(torch.autograd.grad(expected, list(net.parameters())))
    assert relative_error(result.grads, exact) < EXACT
    adapted = maml.adapt_tasks(support)
    again = adapted(query)
    assert type(again) is outputs
    assert relative_error(logits_of(again), logits_of(result.outputs)) < EXACT
    label_loss_of_all = torch.stack(
        [F.cross_entropy(logits_of(again)[t], query["y"][t]) for t in range(TASKS)]
    ).mean()
    by_graph = torch.autograd.grad(label_loss_of_all, list(net.parameters()))
    assert relative_error(joined(by_graph), exact) < EXACT


def test_task_gradients_and_losses_of_each_task(device):
    net, support, query = network(device), batch(device, 5), batch(device, 7, seed=1)
    maml = fm.MAML(net, 0.3, 2, loss=batch_loss)
    result = maml.meta_gradient(support, query)
    assert relative_error(maml.task_gradients(support, query).mean(0), result.grads) < EXACT
    losses, outputs = maml.meta_loss(support, query, reduction="none", differentiable_outputs=True)
    assert relative_error(losses.mean(), result.loss) < EXACT
    assert outputs["logits"].requires_grad
    grads = torch.autograd.grad(losses.mean(), list(net.parameters()))
    assert relative_error(joined(grads), result.grads) < EXACT


@pytest.mark.parametrize("product", ["hvp", "ggnvp"])
def test_products_take_a_batch(product, device):
    net, data = network(device, Tensor), batch(device, 5)
    maml = fm.MAML(net, loss=batch_loss)
    plain = fm.MAML(net, loss=label_loss)
    params = joined(net.parameters()).detach()
    vector = torch.randn(TASKS, len(params), dtype=torch.float64, device=device)
    with torch.no_grad():
        found = getattr(maml, product)(params, data, vector)
        pair = (data["x"], data["z"]), data["y"]
        assert relative_error(found, getattr(plain, product)(params, pair, vector)) < EXACT
    if product == "hvp":
        leaves = [p.detach().requires_grad_() for p in net.parameters()]
        fast = dict(zip(dict(net.named_parameters()), leaves, strict=True))
        outputs = functional_call(net, fast, (data["x"][1], data["z"][1]))
        grads = torch.autograd.grad(label_loss(outputs, data["y"][1]), leaves, create_graph=True)
        along = torch.autograd.grad((joined(grads) * vector[1]).sum(), leaves)
        assert relative_error(found[1], joined(along)) < EXACT


LEARNERS = {
    "fomaml": fm.FOMAML,
    "metasgd": fm.MetaSGD,
    "maml++": fm.MAMLPlusPlus,
    "reptile": fm.Reptile,
    "imaml": fm.IMAML,
}


@pytest.mark.parametrize("name", LEARNERS)
def test_every_learner_takes_trees(name, device):
    """A constant second input makes the network one of a tensor."""

    class OneInput(TwoInputs):
        def forward(self, x: Tensor) -> Any:  # type: ignore[override]
            return super().forward(x, x.new_ones(*x.shape[:-1], 2))

    def meta_gradient(kind: type[TwoInputs], loss: Any, *data: Any) -> Tensor:
        torch.manual_seed(0)
        net = kind(Tensor).double().to(device)
        learner = LEARNERS[name](net, loss=loss, steps=2)
        torch.manual_seed(1)
        return learner.meta_gradient(*data).grads

    support, query = batch(device, 5), batch(device, 7, seed=1)
    for data in (support, query):
        data["z"] = torch.ones_like(data["z"])
    found = meta_gradient(TwoInputs, batch_loss, support, query)
    plain = support["x"], support["y"], query["x"], query["y"]
    assert relative_error(found, meta_gradient(OneInput, label_loss, *plain)) < EXACT


def test_weights_of_examples_in_trees(device):
    net, support, query = network(device), batch(device, 5), batch(device, 7, seed=1)
    maml = fm.MAML(net, 0.3, 2, loss=batch_loss)
    weight = torch.ones(TASKS, 5, dtype=torch.float64, device=device)
    weight[:, 3:] = 0
    found = maml.meta_gradient(support, query, support_weight=weight)
    first = {name: tensor[:, :3] for name, tensor in support.items()}
    assert relative_error(found.grads, maml.meta_gradient(first, query).grads) < EXACT

    class Summed(TwoInputs):
        def forward(self, x: Tensor, z: Tensor, scale: float = 0.5) -> Any:
            return {"total": super().forward(x, z, scale)["logits"].sum()}

    summed = fm.MAML(Summed().double().to(device), loss=lambda outputs, _: outputs["total"])
    with pytest.raises(ValueError, match=r"weight: expected outputs .* a row an example"):
        summed.meta_gradient(support, query, support_weight=weight)


@pytest.mark.parametrize("wrap", [lambda x: (x,), lambda x: [x], lambda x: {"input": x}])
def test_one_tensor_in_a_container_has_a_task_program(wrap, device):
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = regressor(device)

        def forward(self, input: Tensor) -> Tensor:
            return self.net(input)

    x = torch.randn(TASKS, 5, 1, dtype=torch.float64, device=device)
    maml = fm.MAML(Named(), 0.1, 2, loss=F.mse_loss)
    assert maml.explain(wrap(x), x).startswith(maml.explain(x, x)[:40])
    assert torch.equal(
        maml.meta_gradient(wrap(x), x, wrap(x), x).grads, maml.meta_gradient(x, x, x, x).grads
    )


def test_compiled_training_steps_take_trees(device):
    net, support, query = network(device), batch(device, 5), batch(device, 7, seed=1)
    maml = fm.MAML(net, 0.3, 2, loss=batch_loss)
    expected = maml.meta_gradient(support, query)

    @torch.compile(backend="eager")
    def step(support: dict[str, Tensor], query: dict[str, Tensor]) -> Tensor:
        return 2 * maml.meta_loss(support, query)[0]

    loss = step(support, query)
    loss.backward()
    assert relative_error(loss, 2 * expected.loss) < EXACT
    grads = joined(p.grad for p in net.parameters())
    assert relative_error(grads, 2 * expected.grads) < EXACT


class Branching(nn.Linear):
    """A forward that branches on its data, as masks that mask nothing are left out."""

    def forward(self, input: Tensor) -> Tensor:
        scale = 2.0 if input[:, 0].min() > 0 else 1.0
        return scale * super().forward(input[: int((input[:, 0] > -9).sum())])


@pytest.mark.parametrize("same", [True, False])
def test_a_branch_that_all_tasks_take(same, device):
    torch.manual_seed(0)
    x = torch.randn(TASKS, 5, 3, dtype=torch.float64, device=device)
    x[..., 0] = 1.0
    if not same:
        x[1, 2, 0] = -1.0
    net = Branching(3, 2).double().to(device)
    y = torch.randint(0, 2, (TASKS, 5), device=device)
    maml = fm.MAML(net, 0.3, 2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = maml.meta_gradient(x, y, x, y)
    # Tasks that take different branches cannot be vmapped.
    assert any("one task at a time" in str(w.message) for w in caught) is not same
    alone = [maml.meta_gradient(*(d[t : t + 1] for d in (x, y, x, y))) for t in range(TASKS)]
    assert relative_error(result.grads, torch.stack([a.grads for a in alone]).mean(0)) < EXACT


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": "no"}, TypeError, r"support_x: TwoInputs fails on \['z'\] torch.float64"),
        ({"x": object()}, TypeError, r"support_x\['x'\]: expected a tensor, got object"),
        ({"z": torch.ones(4, 5, 2).double()}, ValueError, r"support_x\['z'\]: expected shape \[3,"),
        ({"z": torch.ones(3, 5, 2)}, TypeError, r"support_x\['z'\]: expected dtype torch.float64"),
        ({"y": torch.zeros(())}, ValueError, r"support_y\['y'\]: expected shape \[T, ...\]"),
    ],
)
def test_bad_entries_are_named(change, error, message):
    support, query = batch("cpu", 5), batch("cpu", 7)
    maml = fm.MAML(network("cpu"), loss=batch_loss)
    with pytest.raises(error, match=message):
        maml.meta_loss({**support, **change}, query)


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        (({"q": torch.ones(1)},), ValueError, "support: expected an entry .* x, z, scale, got q"),
        (((1, 2, 3),), ValueError, r"support: expected a pair \(x, y\), got 3 entries"),
        ((torch.ones(3, 5),), TypeError, "support: expected inputs and targets, .* got Tensor"),
    ],
)
def test_bad_batches_are_named(data, error, message):
    maml = fm.MAML(network("cpu"), loss=batch_loss)
    with pytest.raises(error, match=message):
        maml.meta_loss(*data, batch("cpu", 7))


def test_a_loss_of_a_tensor_refuses_a_tree():
    support, query = batch("cpu", 5), batch("cpu", 7)
    maml = fm.MAML(network("cpu"))
    with pytest.raises(TypeError, match="support_y: expected a tensor, which cross_entropy takes"):
        maml.meta_loss(support, query)
    pairs = [((data["x"], data["z"]), data["y"]) for data in (support, query)]
    with pytest.raises(TypeError, match="cross_entropy takes one tensor, and the module gives a d"):
        maml.meta_loss(*pairs)


def test_queries_of_adapted_tasks_are_checked():
    adapted = fm.MAML(network("cpu"), loss=batch_loss).adapt_tasks(batch("cpu", 5))
    with pytest.raises(ValueError, match=r"query_x\['x'\]: expected shape \[3, ...\], got \[2"):
        adapted({name: tensor[:2] for name, tensor in batch("cpu", 5).items()})
    with pytest.raises(TypeError, match="query_x: expected a tensor, got NoneType"):
        adapted(None)


def test_the_program_says_why_it_takes_no_tree():
    maml = fm.MAML(network("cpu"), loss=batch_loss)
    assert "No task program: support_x is a structure of tensors" in maml.explain(batch("cpu", 5))
    program = fm.MAML(network("cpu"), loss=batch_loss, engine="program")
    with pytest.raises(ValueError, match="there is no task program: support_x is a structure"):
        program.meta_loss(batch("cpu", 5), batch("cpu", 7))


def test_classification_still_takes_four_tensors(device):
    tasks = classification("mlp", device)
    with pytest.raises(TypeError, match="query: expected inputs and targets"):
        fm.MAML(nn.Linear(3, 4).double().to(device)).meta_loss(*tasks[:3])


def test_a_module_is_called_with_trees_and_parameters_of_each_task(device):
    net, data = network(device), batch(device, 5)
    params = joined(net.parameters()).detach() + torch.arange(TASKS, device=device)[:, None]
    outputs = fm.task_call(net, params, data)
    grads, losses, again = fm.task_gradient(net, batch_loss, params, data, data)
    layout = fm.MAML(net, loss=batch_loss).layout
    for t in range(TASKS):
        fast = {n: p.requires_grad_() for n, p in layout.views(params[t]).items()}
        expected = functional_call(net, fast, (data["x"][t], data["z"][t]))
        loss = label_loss(expected, data["y"][t])
        exact = torch.autograd.grad(loss, list(fast.values()))
        assert relative_error(outputs["logits"][t], expected["logits"]) < EXACT
        assert relative_error(again["h"][t], expected["h"]) < EXACT
        assert relative_error(losses[t], loss) < EXACT
        assert relative_error(grads[t], joined(exact)) < EXACT
    with pytest.raises(ValueError, match=r"x\['z'\]: expected shape \[3, ...\], got \[2, 5, 2\]"):
        fm.task_call(net, params, data | {"z": data["z"][:2]})


@pytest.mark.parametrize("form", ["per_step", "indices"])
def test_each_step_sees_a_batch_of_a_tree(form, device):
    net, query = network(device), batch(device, 7, seed=1)
    steps = [batch(device, 4, seed) for seed in (2, 3)]
    maml = fm.MAML(net, 0.3, 2, loss=batch_loss)
    if form == "per_step":
        support = {name: torch.stack([s[name] for s in steps], 1) for name in query}
        result = maml.meta_gradient(support, query, inner_batches="per_step")
    else:
        support = {name: torch.cat([s[name] for s in steps], 1) for name in query}
        indices = torch.arange(8, device=device).view(2, 4)
        result = maml.meta_gradient(support, query, inner_batches=indices)
    losses = []
    for t in range(TASKS):
        fast = dict(net.named_parameters())
        for data in (*steps, query):
            outputs = functional_call(net, fast, (data["x"][t], data["z"][t]))
            loss = label_loss(outputs, data["y"][t])
            if data is not query:
                grads = torch.autograd.grad(loss, list(fast.values()), create_graph=True)
                fast = {n: p - 0.3 * g for (n, p), g in zip(fast.items(), grads, strict=True)}
        losses.append(loss)
    exact = torch.autograd.grad(torch.stack(losses).mean(), list(net.parameters()))
    assert relative_error(result.grads, joined(exact)) < EXACT


def test_reptile_joins_rows_of_examples_only():
    class Scaled(TwoInputs):
        def forward(self, x: Tensor, z: Tensor, scale: Tensor) -> Any:  # type: ignore[override]
            return super().forward(x, z, 1.0)["logits"] * scale

    support, query = batch("cpu", 5), batch("cpu", 7)
    for data in (support, query):
        data["scale"] = torch.ones(TASKS, dtype=torch.float64)  # one number a task
    fm.MAML(Scaled().double(), loss=batch_loss).meta_loss(support, query)
    reptile = fm.Reptile(Scaled().double(), loss=batch_loss)
    with pytest.raises(ValueError, match=r"support_x\['scale'\]: expected shape \[3, 5, ...\]"):
        reptile.meta_loss(support, query)
