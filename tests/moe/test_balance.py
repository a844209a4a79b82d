"""The auxiliary losses against numbers that Megatron and transformers gave (moe_golden.json), and live."""

import torch
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from open_lm.config.moe import MoEConfig
from open_lm.moe.balance import router_z_loss, switch_loss
from open_lm.moe.routers import top_k
from open_lm.moe.routing import Context

GOLDEN_LOGITS_TE = torch.sin(1 + 4 * torch.arange(16.0)[:, None] + torch.arange(4.0))


def load_balancing_loss(logits_TE, count_E):
    return switch_loss(count_E, logits_TE.softmax(-1).sum(0), len(logits_TE))


def test_golden_values():
    count_E = torch.tensor([7, 7, 9, 9])
    balance = load_balancing_loss(GOLDEN_LOGITS_TE, count_E)
    torch.testing.assert_close(balance, torch.tensor(1.0010218620300293), atol=1e-6, rtol=0)
    torch.testing.assert_close(2 * balance, torch.tensor(2.0020437240600586), atol=1e-6, rtol=0)
    z = router_z_loss(GOLDEN_LOGITS_TE)
    torch.testing.assert_close(z, torch.tensor(2.6321308612823486), atol=1e-6, rtol=0)


def test_k_times_balance_is_transformers_loss_and_gradient():
    for T, E, k in [(64, 8, 2), (33, 5, 3), (16, 4, 1)]:
        logits_TE = (2 * torch.randn(T, E)).requires_grad_()
        count_E = top_k(logits_TE, MoEConfig(num_experts=E, top_k=k), Context()).count_E
        ours = k * load_balancing_loss(logits_TE, count_E)
        theirs = load_balancing_loss_func((logits_TE,), E, k)
        torch.testing.assert_close(ours, theirs)
        gradients = [torch.autograd.grad(loss, logits_TE)[0] for loss in (ours, theirs)]
        torch.testing.assert_close(*gradients)


def test_bounds_and_no_tokens():
    E = 4
    uniform, collapsed = torch.zeros(8, E), torch.tensor([[100.0, 0, 0, 0]]).repeat(8, 1)
    assert load_balancing_loss(uniform, torch.tensor([2, 2, 2, 2])) == 1
    assert load_balancing_loss(collapsed, torch.tensor([8, 0, 0, 0])) == E
    nothing = torch.zeros(0, E)
    assert load_balancing_loss(nothing, torch.zeros(E, dtype=torch.int64)) == 0
    assert router_z_loss(nothing) == 0
