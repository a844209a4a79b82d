"""`sees_later_tokens` says what a layer does: change later tokens and look at the outputs of earlier ones."""

import itertools
from typing import get_args

import pytest
import torch

from open_lm.config.moe import DropName, MoEConfig, RouterName
from open_lm.config.moe_check import check_moe, sees_later_tokens
from open_lm.moe.layer import MoE, Tokens

B, S, D, E = 2, 12, 8, 4
ROUTERS = get_args(RouterName)


def leaks(layer: MoE) -> bool:
    """Whether an output at positions before the middle depends on what the same sequence has behind it.

    Random draws are the same each time, and so are the other sequences: to see them is no leak.
    """
    for trial in range(12):
        generator = torch.Generator().manual_seed(trial)
        embedding_VD = torch.randn(50, D, generator=generator)
        ids_BS = torch.randint(50, (B, S), generator=generator)
        changed_BS = ids_BS.clone()
        changed_BS[1, S // 2 :] = torch.randint(50, (S - S // 2,), generator=generator)
        outputs = []
        for ids in (ids_BS, changed_BS):
            torch.manual_seed(trial)
            outputs.append(layer(embedding_VD[ids], Tokens(ids))[0][1, : S // 2])
        if not torch.allclose(*outputs, atol=1e-5):
            return True
    return False


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("router", ROUTERS)
@torch.no_grad()
def test_what_is_said_is_what_happens(router: str) -> None:
    for policy, k, factor, per in itertools.product(
        get_args(DropName), (1, 2), (0.0, 0.5), ("batch", "sequence")
    ):
        config = MoEConfig(
            dim=D, hidden_dim=5, num_experts=E, router=router, top_k=k, drop_policy=policy, capacity_factor=factor,
            capacity_per=per, backend="reference",
        )  # type: ignore[arg-type]  # fmt: skip
        try:
            check_moe(config)
        except ValueError:
            continue
        torch.manual_seed(1)
        layer = MoE(config)
        for parameter in layer.parameters():
            parameter.normal_()
        said = " ".join(sees_later_tokens(config))
        wanted = {"training": bool(said), "evaluation": "in training and evaluation" in said}
        found = {"training": leaks(layer.train()), "evaluation": leaks(layer.eval())}
        assert found == wanted, f"{policy}, k={k}, factor {factor} per {per}: {said or 'nothing is said'}"
