"""Errors of a backend's output and gradients beside the loop over experts in float64, on the same rounded numbers.

    python moe/parity.py 160m olmoe --plans table save+in_place

‖error‖ / ‖reference‖ per tensor, with random routing (idle experts and skew by --routing zipf); exits with 1 where
one is above --most.
"""

import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from bench import DTYPES, PLANS, SHAPES, Shape, planned  # type: ignore
from open_lm.config.moe import MoEConfig
from open_lm.moe.backends import BACKENDS, reference, select
from open_lm.moe.experts import ExpertMLP
from open_lm.moe.routing import Routing, sort_by_expert


def inputs_of(shape: Shape, dtype: torch.dtype, device: str, zipf: bool) -> tuple[ExpertMLP, Tensor, Routing]:
    """Experts, tokens and a routing, drawn."""
    torch.manual_seed(0)
    config = MoEConfig(
        dim=shape.dim,
        num_experts=shape.experts,
        hidden_dim=shape.width,
        ffn_type=shape.ffn_type,  # type: ignore[arg-type]
    )
    mlp = ExpertMLP(config).to(device, dtype)
    for weight in mlp.parameters():
        weight.data.normal_(std=shape.dim**-0.5)
    score_TE = torch.randn(shape.tokens, shape.experts, device=device)
    if zipf:
        score_TE -= 3 * torch.arange(1, shape.experts + 1, device=device).log()
    chosen = score_TE.softmax(dim=1).topk(shape.top_k)
    routing = sort_by_expert(chosen.indices, chosen.values, score_TE)
    return mlp, torch.randn(shape.tokens, shape.dim, device=device, dtype=dtype), routing


def results(compute, mlp: ExpertMLP, x_TD: Tensor, routing: Routing) -> dict[str, Tensor]:
    """Output and gradients, that of the output being drawn."""
    x_TD = x_TD.detach().requires_grad_()
    weight_R = routing.weight_R.detach().requires_grad_()
    named = dict(mlp.named_parameters())
    y_TD = compute(x_TD, routing._replace(weight_R=weight_R), mlp)
    generator = torch.Generator(x_TD.device).manual_seed(1)
    g_TD = torch.randn(x_TD.shape, generator=generator, device=x_TD.device).to(DTYPES["bf16"][0])
    leaves = [x_TD, weight_R, *named.values()]
    gradients = torch.autograd.grad(y_TD, leaves, g_TD.to(y_TD.dtype))
    return {"y": y_TD.detach()} | dict(
        zip(["dx", "dweight", *(f"d{n}" for n in named)], gradients, strict=True)
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("shapes", nargs="+", choices=SHAPES)
    parser.add_argument("--backend", choices=list(BACKENDS), default="triton")
    parser.add_argument("--plans", nargs="+", choices=PLANS, default=["table"])
    parser.add_argument("--routing", nargs="+", choices=["random", "zipf"], default=["random", "zipf"])
    parser.add_argument("--dtype", choices=["bf16", "fp16", "fp32"], default="bf16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--most", type=float, default=1e-2)
    chosen = parser.parse_args(arguments)
    compute, worst = select(chosen.backend), 0.0
    for name in chosen.shapes:
        shape = SHAPES[name]._replace(tokens=chosen.tokens)
        for routing_name in chosen.routing:
            mlp, x_TD, routing = inputs_of(
                shape, DTYPES[chosen.dtype][0], chosen.device, routing_name == "zipf"
            )
            double = routing._replace(weight_R=routing.weight_R.double())
            wanted = results(reference, mlp.double(), x_TD.double(), double)
            mlp.to(x_TD.dtype)
            for plan in chosen.plans:
                torch.compiler.reset()
                with planned(plan):
                    ours = results(
                        torch.compile(compute, fullgraph=True) if chosen.compile else compute,
                        mlp,
                        x_TD,
                        routing,
                    )
                errors = {
                    key: ((ours[key].double() - wanted[key]).norm() / wanted[key].norm()).item()
                    for key in wanted
                }
                bad = max(float("inf") if e != e else e for e in errors.values())
                worst = max(worst, bad)
                print(f"{name:<10} {routing_name:<7} {plan:<19} {'ok ' if bad <= chosen.most else 'BAD'} "
                      + " ".join(f"{key} {error:.1e}" for key, error in errors.items()), flush=True)  # fmt: skip
    sys.exit(worst > chosen.most)


if __name__ == "__main__":
    main(sys.argv[1:])
