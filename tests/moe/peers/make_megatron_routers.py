"""Writes megatron_routers.json: what Megatron-LM's pure functions give for the logits of tests/moe/peers/inputs.py.

    pip install --no-deps megatron-core==0.16.1
    python tests/moe/peers/make_megatron_routers.py MEGATRON_LM

MEGATRON_LM is a checkout of NVIDIA/Megatron-LM at d98e8a64ddf34856e74b24714e3bedb2f5a39553 (August 2026):
quantile balancing is in no release up to 0.16.1.
"""

import ast
import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
from inputs import megatron_logits


def function_of(path: Path, name: str):
    """One function of a file, without importing what the file imports."""
    found = [n for n in ast.parse(path.read_text()).body if isinstance(n, ast.FunctionDef) and n.name == name]
    names = {"torch": torch, "Tuple": tuple}
    exec(compile(ast.Module(found, []), str(path), "exec"), names)
    return names[name]


def main(checkout: Path) -> None:
    from megatron.core.transformer.moe.moe_utils import sinkhorn

    step = function_of(checkout / "megatron/core/transformer/moe/moe_utils.py", "qb_dual_update")
    results = {}
    for tokens, experts, k in [(16, 4, 2), (48, 6, 1), (64, 8, 3)]:
        logits = megatron_logits(tokens, experts)
        price = torch.zeros(experts)
        for _ in range(4):
            _, price = step(logits, k, price)
        chosen, _ = step(logits, k, price, update_beta=False)
        results[f"{tokens} {experts} {k}"] = {
            "sinkhorn": sinkhorn(logits).tolist(),
            "quantile_price": price.tolist(),
            "quantile_experts": chosen.sort(dim=1).values.tolist(),
        }
    lines = ",\n".join(f" {json.dumps(name)}: {json.dumps(result)}" for name, result in results.items())
    Path(__file__).with_name("megatron_routers.json").write_text("{\n" + lines + "\n}\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
