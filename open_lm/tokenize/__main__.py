"""python -m open_lm.tokenize --inputs 'books/*.jsonl' wiki/ --tokenizer tokenizer.json --output s3://BUCKET/tokens"""

import sys
import time

from open_lm.tokenize.pipeline import tokenize
from open_lm.tokenize.settings import TokenizeConfig


def main() -> None:
    import tyro

    config = tyro.cli(TokenizeConfig, prog="open_lm.tokenize")
    started = time.monotonic()
    try:
        parts = tokenize(config)
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"open_lm.tokenize: error: {error}")
    except KeyboardInterrupt:
        sys.exit("open_lm.tokenize: stopped; started again with the same flags, it goes on from here")
    print(describe(parts, time.monotonic() - started))


def describe(parts: dict[str, dict], seconds: float) -> str:
    """The counts in a few lines."""
    lines = []
    for part, info in parts.items():
        lines.append(
            f"{part}: {info['documents']:,} documents, {info['tokens']:,} tokens, {info['sequences']:,} sequences "
            f"of {info['seq_len'] + 1:,} ids ({info['tokens_of_padding']:,} of padding, "
            f"{info['tokens_dropped']:,} dropped)"
        )
    read = parts["train"]["sources"]
    size = sum(source["bytes_read"] for source in read) / 1e6
    bad, empty = (sum(source[f"documents_{k}"] for source in read) for k in ("bad", "empty"))
    lines.append(f"read {size:,.1f} MB of text in {seconds:,.1f} s; {empty:,} documents empty, {bad:,} bad")
    return "\n".join(lines) + (": see bad.jsonl" if bad else "")


if __name__ == "__main__":
    main()
