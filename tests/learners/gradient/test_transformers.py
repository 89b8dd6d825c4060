"""Networks of transformers, timm and PEFT: batches of tokens, LoRA, their own outputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

import fastmeta as fm
from tests.helpers.networks import joined, relative_error
from tests.helpers.unrolled import twice_differentiable

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
peft = pytest.importorskip("peft", reason="peft is not installed")

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

EXACT = 1e-10
TASKS, LENGTH, WORDS, CLASSES = 2, 6, 40, 3
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
Batch = dict[str, Tensor]


def bert() -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=WORDS, intermediate_size=32, num_labels=CLASSES, **SMALL, **NO_DROPOUT
    )
    return transformers.BertForSequenceClassification(config)


def vit() -> nn.Module:
    config = transformers.ViTConfig(
        intermediate_size=32, image_size=8, patch_size=4, num_labels=CLASSES, **SMALL, **NO_DROPOUT
    )
    return transformers.ViTForImageClassification(config)


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=WORDS, n_positions=16, n_embd=16, n_layer=2, n_head=2, use_cache=False
    )
    config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.0
    config.bos_token_id = config.eos_token_id = None
    return transformers.GPT2LMHeadModel(config)


def text(examples: int, seed: int = 0, length: int = LENGTH) -> Batch:
    make = torch.Generator().manual_seed(seed)
    shape = TASKS, examples, length
    mask = torch.ones(shape, dtype=torch.int64)
    mask[:, 0, -2:] = 0  # each task has a shorter sentence
    return {
        "input_ids": torch.randint(1, WORDS, shape, generator=make),
        "attention_mask": mask,
        "labels": torch.randint(0, CLASSES, shape[:2], generator=make),
    }


def images(examples: int, seed: int = 0) -> Batch:
    make = torch.Generator().manual_seed(seed)
    pixels = torch.randn(TASKS, examples, 3, 8, 8, generator=make, dtype=torch.float64)
    labels = torch.randint(0, CLASSES, (TASKS, examples), generator=make)
    return {"pixel_values": pixels, "labels": labels}


def sentences(examples: int, seed: int = 0) -> Batch:
    batch = text(examples, seed)
    return batch | {"labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}


def model_loss(outputs: Any, _: Batch) -> Tensor:
    """The loss that the model computes itself, of the labels that it got."""
    loss: Tensor = outputs.loss
    return loss


def next_word_loss(outputs: Any, batch: Batch) -> Tensor:
    """The loss of GPT-2, which computes its own in float32."""
    logits, words = outputs.logits[:, :-1], batch["labels"][:, 1:]
    return F.cross_entropy(logits.flatten(0, 1), words.flatten())


class Network(NamedTuple):
    build: Callable[[], nn.Module]
    batch: Callable[..., Batch]
    targets: list[str]  # of LoRA
    loss: Callable[[Any, Batch], Tensor] = model_loss


NETWORKS = {
    "bert": Network(bert, text, ["query", "value"]),
    "vit": Network(vit, images, ["q_proj", "v_proj"]),
    "gpt2": Network(gpt2, sentences, ["c_attn"], next_word_loss),
}


def build(name: str, device: str) -> nn.Module:
    torch.manual_seed(0)
    return NETWORKS[name].build().double().to(device)


def with_lora(net: nn.Module, targets: list[str]) -> nn.Module:
    """PEFT's LoRA of rank 2 on the named layers, with random weights instead of zeros."""
    config = peft.LoraConfig(r=2, target_modules=targets, lora_dropout=0.0)
    net = peft.get_peft_model(net, config)
    generator = torch.Generator().manual_seed(1)
    for parameter_name, p in net.named_parameters():
        if "lora" in parameter_name:
            p.data = 0.1 * torch.randn(p.shape, generator=generator, dtype=p.dtype).to(p.device)
    return net


def unrolled(
    net: nn.Module, loss: Any, support: Batch, query: Batch, adapted: list[str], lr: float
) -> Tensor:
    """The meta-loss after two steps on the adapted parameters, by a loop over tasks."""
    losses = []
    with twice_differentiable():
        for t in range(TASKS):
            part = [{name: tensor[t] for name, tensor in data.items()} for data in (support, query)]
            fast = dict(net.named_parameters())
            for _ in range(2):
                value = loss(functional_call(net, fast, (), part[0]), part[0])
                before = [fast[name] for name in adapted]
                grads = torch.autograd.grad(value, before, create_graph=True)
                steps = zip(adapted, before, grads, strict=True)
                fast |= {name: p - lr * g for name, p, g in steps}
            losses.append(loss(functional_call(net, fast, (), part[1]), part[1]))
    return torch.stack(losses).mean()


def on(device: str, batch: Batch) -> Batch:
    return {name: tensor.to(device) for name, tensor in batch.items()}


@pytest.mark.parametrize("base", ["frozen", "shared"])
@pytest.mark.parametrize("name", NETWORKS)
def test_lora_is_adapted(name, base, device):
    _, make, targets, task_loss = NETWORKS[name]
    net = with_lora(build(name, device), targets)
    if base == "shared":
        net.requires_grad_(True)
    support, query = on(device, make(3)), on(device, make(4, seed=1))
    maml = fm.MAML(net, 0.3, 2, loss=task_loss, adapt="*lora*")
    loss, outputs = maml.meta_loss(support, query)
    loss.backward()
    adapted = [n for n, p in net.named_parameters() if "lora" in n]
    assert maml.adapt_tasks(support).params.shape[1] == sum(
        net.get_parameter(n).numel() for n in adapted
    )
    learned = [n for n, p in net.named_parameters() if p.requires_grad]
    assert (len(learned) == len(adapted)) is (base == "frozen")
    expected = unrolled(net, task_loss, support, query, adapted, 0.3)
    exact = torch.autograd.grad(
        expected, [net.get_parameter(n) for n in learned], allow_unused=True, materialize_grads=True
    )
    found = [net.get_parameter(n).grad for n in learned]
    assert relative_error(loss, expected) < EXACT
    assert relative_error(joined(found), joined(exact)) < EXACT
    assert outputs.logits.shape[:2] == (TASKS, 4)
    assert outputs.loss.shape == (TASKS,)


def test_tasks_run_together(recwarn, device):
    """Masks of transformers branch on whether they mask anything; here all tasks agree."""
    net = with_lora(build("bert", device), ["query"])
    maml = fm.MAML(net, 0.3, 1, loss=model_loss, adapt="*lora*")
    maml.meta_loss(on(device, text(3)), on(device, text(4)))
    assert not [w for w in recwarn if "one task at a time" in str(w.message)]


def test_padded_sentences_equal_the_shorter_ones(device):
    net = with_lora(build("bert", device), ["query", "value"])
    maml = fm.MAML(net, 0.3, 2, loss=model_loss, adapt="*lora*")
    short = [on(device, text(n, seed)) for n, seed in ((3, 0), (4, 1))]
    padded = []
    for batch in short:
        ids, mask = (F.pad(batch[n], (0, 3)) for n in ("input_ids", "attention_mask"))
        ids[..., LENGTH:] = 7  # any word: it is masked
        padded.append(batch | {"input_ids": ids, "attention_mask": mask})
    result, expected = maml.meta_gradient(*padded), maml.meta_gradient(*short)
    assert relative_error(result.loss, expected.loss) < EXACT
    assert relative_error(result.grads, expected.grads) < EXACT


def test_weights_leave_sentences_out(device):
    def loss(outputs: Any, batch: Batch) -> Tensor:
        return F.cross_entropy(outputs.logits, batch["labels"])

    class Logits(nn.Module):
        """Without the loss of a whole batch, which has no parts to weigh."""

        def __init__(self) -> None:
            super().__init__()
            self.net = build("bert", device)

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
            return self.net(input_ids=input_ids, attention_mask=attention_mask)

    maml = fm.MAML(Logits(), 0.1, 2, loss=loss, adapt="*classifier*")
    support, query = on(device, text(4)), on(device, text(4, seed=1))
    weight = torch.ones(TASKS, 4, dtype=torch.float64, device=device)
    weight[:, 2:] = 0
    result = maml.meta_gradient(support, query, support_weight=weight)
    first = {name: tensor[:, :2] for name, tensor in support.items()}
    assert relative_error(result.grads, maml.meta_gradient(first, query).grads) < EXACT


def test_networks_of_timm(device):
    timm = pytest.importorskip("timm", reason="timm is not installed", exc_type=ImportError)
    torch.manual_seed(0)
    net = timm.create_model(
        "vit_tiny_patch16_224",
        img_size=8,
        patch_size=4,
        embed_dim=16,
        depth=2,
        num_heads=2,
        num_classes=CLASSES,
    )
    net = net.double().to(device)
    support, query = images(3), images(4, seed=1)
    data = [d[n].to(device) for d in (support, query) for n in ("pixel_values", "labels")]
    maml = fm.MAML(net, 0.1, 2, adapt="blocks.*.attn.*")
    maml.meta_loss(*data)[0].backward()
    adapted = list(maml.layout.names)

    losses = []
    with twice_differentiable():
        for t in range(TASKS):
            fast = dict(net.named_parameters())
            for _ in range(2):
                value = F.cross_entropy(functional_call(net, fast, (data[0][t],)), data[1][t])
                before = [fast[n] for n in adapted]
                grads = torch.autograd.grad(value, before, create_graph=True)
                fast |= {n: p - 0.1 * g for n, p, g in zip(adapted, before, grads, strict=True)}
            outputs = functional_call(net, fast, (data[2][t],))
            losses.append(F.cross_entropy(outputs, data[3][t]))
    exact = torch.autograd.grad(torch.stack(losses).mean(), list(net.parameters()))
    found = [p.grad for p in net.parameters()]
    assert relative_error(joined(found), joined(exact)) < EXACT
