"""What is secret goes, what looks like it stays."""

import json
import logging

import pytest

from open_lm.config import RunConfig
from open_lm.config.parse import config_text, flag_types, flag_values, parse
from open_lm.config.redact import Redacting, environment_secrets, redact, redacted

SECRET = [
    "https://me:hunter2@store.example/x", "s3://b/x?X-Amz-Signature=hunter2&a=1", "api_key=hunter2x",
    "AWS_SECRET_ACCESS_KEY: hunter2", '"token": "hunter2"', "Authorization: Bearer hunter2", "--password=hunter2",
    "AccountName=me;AccountKey=hunter2==;EndpointSuffix=core.windows.net", "--password hunter2",
    "--db-token 'hunter2'",
    "a.blob.core.windows.net/x?sv=1&sig=hunter2%3D", "github_" + "pat_11ABCDEFG0hunter2hunter2hunter2",
    "xox" + "b-123456789012-hunter2hunter2", "AI" + "zaSyhunter2hunter2hunter2hunter2hunter2",
    "passphrase: hunter2", "https://hooks.slack.com/services/T0/B0/hunter2",
    "at //me:hunter2@store.example/x",
    "{'Authorization': 'Bearer hunter2'}", "sent Bearer abc.hunter2/x to it",
    "https://u:p'hunter2@host/", 'https://u:p"hunter2@host/', "curl -u alice:hunter2 x",
    "curl --user alice:hunter2",
    "sshpass -p hunter2 ssh x", "mysql -phunter2 db", "mysqldump -h x -phunter2 db", "curl -H 'X-Auth: hunter2' x",
    "Cookie: a=1; session=hunter2", "{'Set-Cookie': 'a=hunter2'}", "-H 'My-Name: a, hunter2'",
    "ey" + "JhbGciOi.eyJzdWIi.hunter2", "https://discord.com/api/webhooks/1/hunter2",
    "https://hooks.slack.com/workflows/T0/hunter2", "https://api.telegram.org/bot1234:hunter2/sendMessage",
    "npm" + "_hunter2hunter2hunter2hunter2hunter2",
    "s3://KEY:hunt/hunter2@bucket/a", "https://me:p@hunter2@store.example/x", "https://me@x.org:hunter2@store/x",
]  # fmt: skip
PLAIN = [
    "step 5 | tokens 640 | loss 3.2", "tokens: 640", "token id: 50256", "the tokenizer: tokenizer.json",
    "s3://bucket/a{00..99}.tar", "the pipe: closed", "https://store.example/x", "{'train/tokens': 640}",
    "token 16: the model's", "moe_num_experts: 8", "http://127.0.0.1:8080/a@b.tar", "s3://bucket/a:b/c@d.tar",
    "the bearer instruments", "pass: 3",
]  # fmt: skip


@pytest.mark.parametrize("text", SECRET)
def test_secrets_go(text: str) -> None:
    assert "hunter2" not in redact(text)


@pytest.mark.parametrize("text", PLAIN)
def test_the_rest_stays(text: str) -> None:
    assert redact(text) == text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("pipe:curl -s -u alice:hunter2x file:///a/shard_0.tar", "pipe:curl … shard_0.tar ["),
        ("pipe: curl hunter2", "pipe:curl … ["),
        ("--train-data=pipe:curl \n hunter2", "--train-data=pipe:curl … ["),
        ("pipe:KEY=hunter2 B='hunter2 x' /bin/aws s3 cp s3://b/a{0..9}.tar?hunter2", "pipe:aws … a{0..9}.tar ["),
        ("pipe:A=$(echo hunter2 x) curl", "pipe:… ["), ("pipe:cat -u alice:hunter2.tar", "pipe:cat … ["),
        ("pipe:sshpass -phunter2.tar ssh x cat /a/m.jsonl | cat", "pipe:sshpass … m.jsonl ["),
        ("pipe:curl https://u:p/hunter2.tar@host/x", "pipe:curl … ["),
        ("reading pipe:curl -u a:hunter2\nand", "reading pipe:curl …\nand"),
        ("s3://b/x.tar::pipe:curl \\\n -u a:hunter2", "s3://b/x.tar::pipe:curl …"),
    ],
)  # fmt: skip
def test_no_argument_of_a_command_is_shown(text: str, shown: str) -> None:
    clean = redact(text)
    assert clean.startswith(shown)
    assert "hunter2" not in clean
    assert redact(clean) == clean
    assert redact(f"shard {clean}: sample 3") == f"shard {clean}: sample 3", "what follows its name stays"


def test_commands_are_told_apart() -> None:
    assert redact("pipe:cat a.tar") == redact("pipe:cat a.tar") != redact("pipe:cat  a.tar")


def test_short_values_of_passwords(monkeypatch) -> None:
    assert environment_secrets({"DB_PASSWORD": "hunt3r"})
    for name, value in (
        ("DB_PASSWORD", "h3x"),
        ("DB_PASSWORD", "tokens"),
        ("MY_KEY", "hunt3r"),
        ("DB_PWD", "123456"),
    ):
        assert environment_secrets({name: value}) == [], "a word that other text may hold"


def test_values_of_the_environment(monkeypatch) -> None:
    monkeypatch.setenv("SOME_API_KEY", "q9w8e7r6t5")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    monkeypatch.setenv("SSH_KEY_PATH", "/home/me/key")
    assert redact("it said q9w8e7r6t5, false, /home/me/key") == "it said …, false, /home/me/key"
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "/wJa+rX/K7MDENGbPxRfi")
    assert redact("see /wJa+rX/K7MDENGbPxRfi and %2FwJa%2BrX%2FK7MDENGbPxRfi") == "see … and …"
    assert redact("see %2fwJa%2brX%2fK7MDENGbPxRfi") == "see …"


def test_values_of_the_environment_as_they_are_written(monkeypatch) -> None:
    value = "q9\"w8'e7\nr6\\t5"
    monkeypatch.setenv("DB_PASS", value)
    for text in (value, json.dumps({"a": value}), repr({"a": value}), repr(value)):
        assert "w8" not in redact(f"it said {text}"), text


def test_a_password_of_digits_goes() -> None:
    assert "31337000" not in redact("password=31337000, db_pwd: 31337000, --secret 31337000")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("AWS_SECRET_ACCESS_KEY", "/wJalrXUtnFEMI/K7MDENG"), ("SOME_PASSWORD", "~hunter2hunter2"),
        ("MY_KEY", "q9w8e7r6t5"), ("GPG_KEY", "A035C8C19219BA821ECEA86B64E628F8"),
        ("DB_PASSPHRASE", "correct horse"),
        ("AZURE_STORAGE_KEY", "Zm9vYmFy0123=="), ("MYSQL_PWD", "checkpoints"), ("HF_TOKEN", "hf_AbCdEf123"),
        ("TOKEN_2", "q9w8e7r6t5"), ("GHTOKEN", "q9w8e7r6t5"),
        ("AZURE_STORAGE_CONNECTION_STRING", "a=b;AccountKey=c"),
        ("DB_PASSWORD", "1234567890"), ("SOME_AUTH", "alice:hunter22x"), ("MYAUTH", "q9w8e7r6t5"),
        ("WANDB_KEY_PART", "q9w8e7r6t5"), ("SSH_PRIVKEY", "q9w8e7r6t5"), ("VAULT_TOKENS", "q9w8e7r6t5"),
        ("COOKIE", "session=1"), ("SMTP_AUTH_VALUE", "q9w8e7r6t5"),
    ],
)  # fmt: skip
def test_secret_variables(name: str, value: str) -> None:
    assert value in environment_secrets({name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("RUN_TOKEN_ID", "checkpoints"), ("NUM_TOKENS", "1000000000"), ("TOKENIZED", "manifest.jsonl"),
        ("EOS_TOKEN_ID", "a1b2c3d4e5"), ("RUN_TOKEN", "checkpoints"), ("SORT_KEY", "manifest.jsonl"),
        ("MAX_TOKEN", "1000000000"), ("MONKEY", "a1b2c3d4e5"), ("TOKENIZERS_PARALLELISM", "falsefalse"),
        ("GOOGLE_APPLICATION_CREDENTIALS", "/home/me/key.json"), ("PWD", "/a1B2/c3D4e5"),
        ("KEY_FILE", "a1b2c3d4.pem"), ("GIT_AUTHOR", "a1b2c3d4e5"), ("SSH_AUTH_SOCK", "a1b2c3d4/agent.1"),
        ("SORT_KEY_NAME", "a1b2c3d4e5"), ("MONKEYS", "a1b2c3d4e5"), ("USE_AUTH", "required"),
    ],
)  # fmt: skip
def test_harmless_variables(name: str, value: str) -> None:
    assert environment_secrets({name: value}) == []


def test_no_flag_of_ours_is_hidden() -> None:
    for name in flag_types():
        flag = "--" + name.replace("_", "-")
        for text in (f"{flag} value1", f"{flag}=value1", f"{name}: value1"):
            assert redact(text) == text


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
