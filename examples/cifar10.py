"""An image classifier whose last hidden layer is a mixture of experts, after DeepSpeed's CIFAR-10 demonstration.

    python examples/cifar10.py --experts 4 --top-k 1 --noise rsample
    python examples/cifar10.py --experts 2 4 --residual --data path/to/cifar

The network is PyTorch's small CNN for CIFAR-10 with one MoE layer of width 84 per number of --experts before its
last layer; an expert is an MLP there. With torchvision and CIFAR-10's files in --data it learns these, otherwise
scikit-learn's 8 x 8 digits. Prints loss and test accuracy by epoch, and each expert's share of the test images.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from open_lm.moe import MoE, MoEConfig, RouterStats

WIDTH = 84


@dataclass(frozen=True)
class Flags:
    """Train a small CNN with mixture-of-experts layers on CIFAR-10 or on digits."""

    experts: tuple[int, ...] = (4,)
    """Experts of each MoE layer; several numbers make several layers."""
    top_k: int = 1
    """Experts that an image is sent to."""
    noise: Literal["none", "rsample", "second_expert"] = "none"
    """Gumbel noise in the selection, in training; rsample is DeepSpeed's RSample."""
    residual: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """PR-MoE: mix the experts' output with that of an MLP for every image."""
    capacity_factor: float = 0.0
    """An expert takes at most int(factor * k * images / experts) of a batch, the rest see none; 0: no limit."""
    loss_weight: float = 0.1
    """Weight of the balancing loss."""
    epochs: int = 20
    batch_size: int = 32
    lr: float = 1e-3
    seed: int = 0
    data: Path = Path("data")
    """Folder with cifar-10-batches-py, as torchvision unpacks it."""


class Network(nn.Module):
    """Images (B, C, S, S) → logits (B, 10), and the statistics of each MoE layer."""

    def __init__(self, channels: int, size: int, flags: Flags):
        super().__init__()
        self.convolutions = nn.Sequential(
            nn.Conv2d(channels, 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(6, 16, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        )  # fmt: skip
        self.hidden = nn.Sequential(
            nn.Linear(16 * (size // 4) ** 2, 120), nn.ReLU(), nn.Linear(120, WIDTH), nn.ReLU()
        )
        self.experts = nn.ModuleList(
            MoE(
                MoEConfig(
                    dim=WIDTH,
                    num_experts=number,
                    top_k=flags.top_k,
                    noise=flags.noise,
                    residual=flags.residual,
                    capacity_factor=flags.capacity_factor,
                    loss_weight=flags.loss_weight,
                    ffn_type="relu",
                    hidden_dim=WIDTH,
                    expert_bias=True,
                )
            )
            for number in flags.experts
        )
        self.outputs = nn.Linear(WIDTH, 10)
        for layer in self.experts:  # the experts' own N(0, .02) is made for deep language models
            for name, parameter in layer.named_parameters():
                if name.endswith(("w1", "w2")):
                    nn.init.normal_(parameter, std=WIDTH**-0.5)

    def forward(self, images: Tensor) -> tuple[Tensor, list[RouterStats]]:
        x, stats = self.hidden(self.convolutions(images)), []
        for layer in self.experts:
            x, of_layer = layer(x)
            stats.append(of_layer)
        return self.outputs(x), stats


def load_images(folder: Path) -> tuple[str, list[Tensor]]:
    """(name, [training images, labels, test images, labels]); images are float32 in -1…1."""
    try:
        from torchvision.datasets import CIFAR10  # type: ignore

        parts = [CIFAR10(str(folder), train=train) for train in (True, False)]
    except (ImportError, RuntimeError):  # not installed; no files
        return "digits", load_digits()
    tensors = []
    for part in parts:
        tensors += [torch.from_numpy(part.data).movedim(3, 1) / 127.5 - 1, torch.tensor(part.targets)]
    return "CIFAR-10", tensors


def load_digits() -> list[Tensor]:
    """Of scikit-learn's 1,797 digits every fifth is for the test."""
    try:
        from sklearn import datasets  # type: ignore
    except ImportError:
        raise SystemExit(
            "no torchvision or no CIFAR-10 in --data, and no scikit-learn for its digits: pip install scikit-learn"
        ) from None
    digits = datasets.load_digits()
    images, labels = torch.tensor(digits.images[:, None]).float() / 8 - 1, torch.tensor(digits.target)
    test = torch.arange(len(labels)) % 5 == 0
    return [images[~test], labels[~test], images[test], labels[test]]


def train(
    network: Network, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor, batch: int
) -> float:
    """One epoch; its mean cross-entropy."""
    network.train()
    total = 0.0
    for chosen in torch.randperm(len(images)).split(batch):
        logits, stats = network(images[chosen])
        loss = F.cross_entropy(logits, labels[chosen])
        total += loss.item() * len(chosen)
        optimizer.zero_grad()
        (loss + sum(layer.loss for layer in stats)).backward()
        optimizer.step()
    return total / len(images)


@torch.no_grad()
def evaluate(
    network: Network, images: Tensor, labels: Tensor, batch: int
) -> tuple[float, list[Tensor], float]:
    """(accuracy, each layer's shares of its experts, the share of assignments that were dropped)."""
    network.eval()
    right, dropped, counts = (
        0,
        0.0,
        [torch.zeros(n) for n in (layer.config.num_experts for layer in network.experts)],
    )
    for some, theirs in zip(images.split(batch), labels.split(batch), strict=True):
        logits, stats = network(some)
        right += int((logits.argmax(dim=1) == theirs).sum())
        counts = [count + layer.count_E for count, layer in zip(counts, stats, strict=True)]
        dropped += sum(float(layer.dropped) for layer in stats)
    return right / len(images), [c / c.sum() for c in counts], dropped / sum(float(c.sum()) for c in counts)


def main(arguments: list[str] | None = None) -> None:
    flags = tyro.cli(Flags, args=arguments, description=__doc__)
    torch.manual_seed(flags.seed)
    name, (images, labels, test_images, test_labels) = load_images(flags.data)
    try:
        network = Network(images.shape[1], images.shape[2], flags)
    except ValueError as error:
        raise SystemExit(str(error)) from None
    optimizer = torch.optim.Adam(network.parameters(), lr=flags.lr)
    layers = [f"experts of layer {i}, %" for i in range(len(flags.experts))]
    table = Table(
        "epoch", "loss", "test accuracy", *layers, "dropped", title=f"{name}: {len(images):,} images"
    )
    for epoch in range(flags.epochs):
        loss = train(network, optimizer, images, labels, flags.batch_size)
        accuracy, shares, dropped = evaluate(network, test_images, test_labels, flags.batch_size)
        shown = [" ".join(f"{100 * share:.0f}" for share in layer) for layer in shares]
        table.add_row(str(epoch + 1), f"{loss:.3f}", f"{accuracy:.1%}", *shown, f"{dropped:.1%}")
    Console().print(table)


if __name__ == "__main__":
    main()
