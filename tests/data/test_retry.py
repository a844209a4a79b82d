import errno
import threading

import pytest

from open_lm.config.redact import redact
from open_lm.data.retry import Patience, Stopped, describe, is_passing, retry

QUICK = Patience(3, first_wait_seconds=0.001)


class Answer(Exception):
    def __init__(self, status: int, code: str = "") -> None:
        self.response = {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


PASSING = [
    ConnectionResetError(), TimeoutError(), EOFError(), OSError(errno.EIO, "x"), Answer(500), Answer(503),
    Answer(429), Answer(400, "RequestTimeout"), caused(FileNotFoundError(), Answer(503)),
]  # fmt: skip
LASTING = [
    FileNotFoundError(), PermissionError(), ImportError(), ValueError(), OSError(errno.ENOSPC, "x"), Answer(403),
    Answer(404), Answer(400, "InvalidArgument"), caused(OSError(), Answer(403)), RuntimeError(), Answer(501),
]  # fmt: skip


@pytest.mark.parametrize("error", [*PASSING, *LASTING], ids=repr)
def test_what_may_pass_is_tried_again(error, caplog):
    calls = []

    def operation() -> str:
        calls.append(1)
        if len(calls) < 3:
            raise error
        return "done"

    assert is_passing(error) == any(error is passing for passing in PASSING)
    if is_passing(error):
        assert retry("s3://b/a", "reading it", operation, QUICK) == "done"
        assert len(calls) == 3
        assert [record.levelname for record in caplog.records] == ["WARNING"] * 2
        assert "s3://b/a: reading it failed, attempt 2 of 4" in caplog.text
    else:
        with pytest.raises((OSError, ImportError), match=r"s3://b/a: "):
            retry("s3://b/a", "reading it", operation, QUICK)
        assert len(calls) == 1


def test_the_last_error_names_all(caplog):
    def operation() -> None:
        raise ConnectionResetError("gone https://me:mine@host/a?sig=xyz")

    with pytest.raises(
        OSError,
        match=r"^https://host/a\?…: reading it failed 4 times in 0\.\d s \(--data-retries 3, --data-timeout 30\), "
        r"at last with ConnectionResetError: gone https://host/a\?…$",
    ) as error:
        retry("https://me:mine@host/a?sig=xyz", "reading it", operation, QUICK)
    assert error.value.__suppress_context__
    assert "mine" not in caplog.text + describe(error.value)
    assert "xyz" not in caplog.text


def test_waits_double_up_to_a_limit():
    patience = Patience(first_wait_seconds=1, longest_wait_seconds=10)
    for n, most in enumerate((1, 2, 4, 8, 10, 10), start=1):
        waits = [patience.wait_seconds(n) for _ in range(50)]
        assert most / 2 <= min(waits) <= max(waits) <= most
        assert len(set(waits)) > 1


def test_nobody_waits_for_what_is_no_longer_wanted():
    stop, calls = threading.Event(), []

    def operation() -> None:
        calls.append(1)
        stop.set()
        raise TimeoutError

    with pytest.raises(Stopped):
        retry("s3://b/a", "reading it", operation, Patience(first_wait_seconds=600, stop=stop))
    assert len(calls) == 1


@pytest.mark.parametrize(
    "text",
    [
        "https://user:hunter2@host/path",
        "https://host/a.tar?X-Amz-Signature=hunter2&X-Amz-Credential=hunter2",
        "pipe:AWS_SECRET_ACCESS_KEY=hunter2 aws s3 cp s3://b/a -",
        "pipe:curl -H 'Authorization: Bearer hunter2' https://host/a",
        'pipe:curl --header "x-api-key: hunter2" https://host/a',
        "{'access_key': 'hunter2'}",
        "--password=hunter2",
        "AKIA" + "HUNTER2" * 2 + "XX is not allowed",
    ],
)
def test_no_secret_is_shown(text):
    assert "hunter2" not in redact(text).lower()
    assert len(redact(text)) > 5


def test_what_is_no_secret_stays():
    for text in ("s3://bucket/folder/shard_00000001.tar", "/data/a.tar"):
        assert redact(text) == text
