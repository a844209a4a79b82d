"""What is secret goes, what looks like it stays."""

import logging

import pytest

from open_lm.config import RunConfig
from open_lm.config.parse import config_text, flag_values, parse
from open_lm.config.redact import Redacting, redact, redacted

SECRET = [
    "https://me:hunter2@store.example/x", "s3://b/x?X-Amz-Signature=hunter2&a=1", "api_key=hunter2x",
    "AWS_SECRET_ACCESS_KEY: hunter2", '"token": "hunter2"', "Authorization: Bearer hunter2", "--password=hunter2",
]  # fmt: skip
PLAIN = [
    "step 5 | tokens 640 | loss 3.2", "tokens: 640", "token id: 50256", "the tokenizer: tokenizer.json",
    "s3://bucket/a{00..99}.tar", "pipe:aws s3 cp s3://b/x -", "https://store.example/x", "{'train/tokens': 640}",
    "token 16: the model's", "moe_num_experts: 8",
]  # fmt: skip


@pytest.mark.parametrize("text", SECRET)
def test_secrets_go(text: str) -> None:
    assert "hunter2" not in redact(text)


@pytest.mark.parametrize("text", PLAIN)
def test_the_rest_stays(text: str) -> None:
    assert redact(text) == text


def test_values_of_the_environment(monkeypatch) -> None:
    monkeypatch.setenv("SOME_API_KEY", "q9w8e7r6t5")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    monkeypatch.setenv("SSH_KEY_PATH", "/home/me/key")
    assert redact("it said q9w8e7r6t5, false, /home/me/key") == "it said …, false, /home/me/key"


def test_what_is_written_of_the_flags_but_not_what_the_run_uses() -> None:
    url = "https://me:hunter2@store.example/m.jsonl?sig=hunter2"
    run, given = parse(["--dataset-manifest", url, "s3://b/m.jsonl", "--train-num-samples", "640"])
    assert run.data.dataset_manifest == (url, "s3://b/m.jsonl")
    values = flag_values(run)
    assert values["dataset_manifest"] == ["https://store.example/m.jsonl?…", "s3://b/m.jsonl"]
    assert values["train_num_samples"] == 640
    assert "hunter2" not in config_text(run, given)
    assert redacted({"a": [url], "b": 1}) == {"a": ["https://store.example/m.jsonl?…"], "b": 1}
    plain = flag_values(RunConfig())
    assert redacted(plain) == plain


def test_a_handler_hides_messages_and_tracebacks(caplog) -> None:
    caplog.handler.addFilter(Redacting())
    logger = logging.getLogger("of a test")
    try:
        raise OSError("https://me:hunter2@store.example is gone")
    except OSError:
        logger.exception("reading %s", "https://me:hunter2@store.example/x")
    assert "https://store.example/x" in caplog.text
    assert "hunter2" not in caplog.text
