"""Tables of mixture-of-experts models: `python moe/tables.py parameters`."""

import argparse

from open_lm.config import ModelFlags, MoEConfig
from open_lm.config.resolve import resolve_model
from open_lm.model import count_parameters

MODELS = ("41m", "87m", "160m", "410m", "830m")

# "Training Parameters" (8, 32 experts) and "Inference Parameters" (2) as printed in open_lm's MOE.md:
# https://github.com/mlfoundations/open_lm/blob/main/MOE.md
PUBLISHED = {
    8: ("68.9M", "165.4M", "360.6M", "1.1B", "2.4B"),
    32: ("164.5M", "439.9M", "1.0B", "3.5B", "7.9B"),
    2: ("45.0M", "96.8M", "190.7M", "509.2M", "1.1B"),
}


def parameters_of(model: str, experts: int) -> int:
    """All parameters of open_lm_<model> with that many experts in every second layer, and gain-only norms."""
    flags = ModelFlags(model=f"open_lm_{model}", model_norm="gain_only_layer_norm")
    return count_parameters(resolve_model(flags, MoEConfig(freq=2, num_experts=experts), given=())).total


def shorten(number: int) -> str:
    """68884704 → "68.9M", 2420092416 → "2.4B"."""
    return f"{number / 1e9:.1f}B" if number >= 1e9 else f"{number / 1e6:.1f}M"


def print_parameters() -> bool:
    """Exact counts from the meta device beside the published cells; False if one differs from its cell."""
    print(f"{'experts':>7}  {'model':<6}{'parameters':>14}{'rounded':>10}{'published':>11}  match")
    agree = True
    for experts, cells in PUBLISHED.items():
        for model, published in zip(MODELS, cells, strict=True):
            exact = parameters_of(model, experts)
            match = shorten(exact) == published
            agree = agree and match
            verdict = "yes" if match else "NO"
            print(f"{experts:>7}  {model:<6}{exact:>14,}{shorten(exact):>10}{published:>11}  {verdict}")
    print('\nTop-2, every second layer an MoE, gain-only norms; 2 experts is the row "Inference Parameters".')
    return agree


TABLES = {"parameters": print_parameters}


def main() -> int:
    """Prints one table; exit code 1 if it disagrees with what was published."""
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="table", required=True, metavar="TABLE")
    for name, print_table in TABLES.items():
        commands.add_parser(name, help=print_table.__doc__)
    return 0 if TABLES[parser.parse_args().table]() else 1


if __name__ == "__main__":
    raise SystemExit(main())
