"""Faults of numbers: what is not finite, jumps, crowds, or depends on where it is computed."""

import json
import math
from pathlib import Path

import torch

from tests.faults.runs import (
    ANYWHERE,
    MOE,
    SYNTHETIC,
    Ranks,
    fault,
    hash_of,
    lines,
    newest_epoch,
    resumed_step,
    run,
    source,
    steps,
)


def states(folder: Path, rank: int) -> list[str]:
    return [json.loads(line) for line in (folder / f"state_{rank}.jsonl").read_text().splitlines()]


@fault(
    14,
    "NaN in one rank's loss at step 4; and from step 4 on",
    "no weight, no moment changes, it is counted; after N in a row all end, not 0, with a state to debug",
)
def not_finite(folder: Path, quick: bool) -> str:
    place = folder / "once"
    run(place, f"{SYNTHETIC} {MOE} {steps(4, 8)} --fsdp", ranks=2, faults="nan:4:5:1;record_state")
    for rank in (0, 1):
        after = states(place, rank)
        assert len(after) == 8
        assert after[4] == after[3], "the skipped step changed something"
        assert len(set(after)) == 7, "another step changed nothing"
    assert [e["train/skipped_updates"] for e in lines(place)] == [0] * 4 + [1] * 4
    place = folder / "on"
    flags = f"{SYNTHETIC} {MOE} {steps(50, 100)} --max-skipped-updates 5"
    ranks = Ranks(place, flags, ranks=2, faults="nan:4:999:1;record_state")
    codes = ranks.wait()
    assert all(codes), codes
    assert "not finite 5 times in a row" in ranks.text(), ranks.text()[-2000:]
    debug = place / "run/debug"
    state = json.loads((debug / "state.json").read_text())
    from safetensors.torch import load_file

    batches = [load_file(debug / f"batch_rank_{rank}.safetensors") for rank in (0, 1)]
    assert state["loss"] == "nan"
    assert state["not_finite"]
    assert batches[0]["tokens"].shape == (4, 16)
    weights = load_file(debug / "weights.safetensors")
    assert all(w.isfinite().all() for w in weights.values())
    return (
        f"one NaN: hashes of weights and moments equal before and after on both ranks, 1 counted, 8 steps; 5 in a "
        f"row: exit statuses {codes}, debug/ with {', '.join(sorted(p.name for p in debug.iterdir()))}"
    )


@fault(
    15,
    "spikes of the loss (3 times) before and after a resume",
    "--skip-loss-spikes decides as in the whole run",
)
def spikes(folder: Path, quick: bool) -> str:
    flags = f"{source(folder)} --workers 0 {MOE} {steps(6, 30)} --skip-loss-spikes 8 --loss-spike-window 10"
    injected = "spike:14:20"
    run(folder / "whole", flags, faults=injected)
    place = folder / "parts"
    run(place, f"{flags} --max-steps 13", faults=injected)
    again = run(place, f"{flags} --resume latest", faults=injected)
    assert resumed_step(again) == 13
    seen = [
        {e["step"]: e["train/skipped_spikes"] for e in lines(folder / name)} for name in ("whole", "parts")
    ]
    assert seen[0] == seen[1], seen
    assert seen[0][30] == 2, seen[0]
    hashes = [hash_of(newest_epoch(folder / name)) for name in ("whole", "parts")]
    assert hashes[0] == hashes[1]
    return (
        f"2 updates skipped in both (steps 15 and 21; resumed at 13, window 10), weights {hashes[0]} in both"
    )


@fault(
    23,
    "every token to one expert, and none to others",
    "finite gradients equal to the reference's; no hang of 2 ranks (expert parallelism is not built yet)",
)
def crowded_expert(folder: Path, quick: bool) -> str:
    from open_lm.config import ModelFlags, MoEConfig
    from open_lm.config.resolve import resolve_model
    from open_lm.model import build

    gradients, rows = {}, []
    for backend in ("reference", "grouped_mm"):
        moe = MoEConfig(freq=1, num_experts=8, top_k=1, backend=backend)
        model = build(resolve_model(ModelFlags(model="open_lm_test_tiny"), moe, ()), "cpu", seed=0)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "router" in name:
                    parameter.zero_()  # ties: the first expert takes all
        tokens = torch.arange(64).view(4, 16) % 16
        output = model(tokens, tokens.roll(-1, 1))
        output.loss.objective_sum.backward()
        rows = [sorted(layer.count_E.tolist()) for layer in output.router_stats]
        gradients[backend] = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert all(counts[-1] == 64 and not any(counts[:-1]) for counts in rows), rows
    worst = 0.0
    for name, expected in gradients["reference"].items():
        got = gradients["grouped_mm"][name]
        assert got.isfinite().all()
        assert expected.isfinite().all()
        worst = max(worst, ((got - expected).norm() / expected.norm().clamp_min(1e-6)).item())
    assert worst < 1e-5, worst
    flags = (
        f"{SYNTHETIC} --moe-freq 1 --moe-num-experts 8 --moe-top-k 1 --moe-loss-weight 0 {steps(3, 3)} --lr 1"
    )
    place = folder / "broken"  # so large a step breaks every router
    run(place, f"{flags} --fsdp", ranks=2, faults="record_state")
    done = lines(place)
    assert [line["step"] for line in done] == [1, 2, 3]
    assert all(math.isfinite(line["train/loss"]) for line in done), done
    for rank in (0, 1):
        assert len(set(states(place, rank))) == 3, "a step changed nothing"
    weights = torch.load(newest_epoch(place), weights_only=True)["state_dict"]
    assert all(weight.isfinite().all() for weight in weights.values())
    # every token is in the sums, and few experts have nearly all of them
    shares = [layer["share"] for layer in done[-1]["router"]]
    assert all(abs(sum(share) - 1) < 1e-3 for share in shares), shares
    assert max(max(share) for share in shares) > 0.5, shares
    return (
        f"64 of 64 rows at one expert; greatest relative difference to the reference {worst:.0e}; 2 ranks, "
        f"--lr 1: up to {max(map(max, shares)):.0%} of the choices at one expert, losses and weights finite"
    )


@fault(
    26,
    "1, 2, 4 ranks of DDP and FSDP (no expert parallelism yet)",
    "loss, gradient norm and routing are the same",
)
def placements(folder: Path, quick: bool) -> str:
    flags = f"{source(folder)} --workers 0 {ANYWHERE} {steps(6, 6)}"
    layouts = [(1, ""), (2, ""), (2, "--fsdp"), (4, "--fsdp")] + ([] if quick else [(4, ""), (1, "--fsdp")])
    found = {}
    for ranks, layout in layouts:
        place = folder / f"{ranks}{layout}"
        run(place, f"{flags} {layout}", ranks=ranks)
        found[ranks, layout] = lines(place)
    expected = found[1, ""]
    worst = 0.0
    for each in found.values():
        for a, b in zip(expected, each, strict=True):
            for name in ("train/loss", "train/grad_norm"):
                worst = max(worst, abs(a[name] / b[name] - 1))
            for x, y in zip(a["router"], b["router"], strict=True):
                assert x["layer"] == y["layer"]
                worst = max(worst, *(abs(p - q) for p, q in zip(x["share"], y["share"], strict=True)))
    assert worst < 1e-5, worst
    return (
        f"{len(found)} layouts, 6 steps: greatest difference {worst:.1e} (relative; routing shares absolute)"
    )
