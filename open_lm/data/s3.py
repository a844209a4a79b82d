"""S3 objects read by botocore, in the thread that asks, a large piece at a time.

s3fs moves every 64 kB through its event loop, which takes several times the CPU. What s3fs can be told, and this
cannot be told the same way for certain, is read by s3fs, and so is all that lists and writes.
"""

import os
import re
import threading
from typing import Any, NamedTuple

CONNECTIONS = 64  # of a process: rows of a batch and parts of files at the same time
# A bucket and a key: no access point, version, or chain of file systems.
OBJECT = re.compile(r"s3a?://([a-z0-9][a-z0-9.-]*)/((?!.*(?:::|\?versionId=)).*[^/])", re.DOTALL)
# Options of s3fs that are known to mean the same here.
OPTIONS = {
    "anon", "endpoint_url", "key", "secret", "token", "use_ssl", "client_kwargs", "config_kwargs", "requester_pays",
    "profile",
}  # fmt: skip
MISSING = {"404", "NoSuchKey", "NoSuchBucket"}


class Objects(NamedTuple):
    """As much of an fsspec file system as reading needs. Paths are BUCKET/KEY; errors are FileNotFoundError and
    botocore's."""

    client: Any
    arguments: dict[str, str]  # of every request

    def info(self, path: str) -> dict[str, Any]:
        """What identifies the object's version, with the names and values of s3fs; `size` in bytes."""
        answer = self.ask(self.client.head_object, path)
        return {
            "ETag": answer.get("ETag", ""),
            "LastModified": answer.get("LastModified", ""),
            "size": answer["ContentLength"],
        }

    def cat_file(self, path: str, start: int | None = None, end: int | None = None) -> bytes:
        """The content, or its bytes from `start` to before `end`."""
        part = {} if start is None or end is None else {"Range": f"bytes={start}-{end - 1}"}
        body = self.ask(self.client.get_object, path, **part)["Body"]
        try:
            return body.read()
        finally:
            body.close()

    def ask(self, method: Any, path: str, **arguments: str) -> dict[str, Any]:
        """The answer to a request for the object."""
        from botocore.exceptions import ClientError

        bucket, _, key = path.partition("/")
        try:
            return method(Bucket=bucket, Key=key, **self.arguments, **arguments)
        except ClientError as error:
            if error.response.get("Error", {}).get("Code") in MISSING:
                raise FileNotFoundError(path) from error
            raise


made: dict[str, Objects | None] = {}  # of this process, by settings
making = threading.Lock()  # one client, not one of each thread


def forget() -> None:
    """Makes clients anew: AWS's variables may have changed, or connections are another process's."""
    global making
    made.clear()
    making = threading.Lock()


os.register_at_fork(after_in_child=forget)


def find_objects(url: str, seconds: float) -> tuple[Objects, str] | None:
    """What reads the s3:// URL, and its path, set up as s3fs would be: AWS's variables and files, and fsspec's
    configuration. None if that is for s3fs alone. `seconds` may pass without a byte. Errors: botocore's, of
    settings."""
    import fsspec.config

    found = OBJECT.fullmatch(url)
    if found is None:
        return None
    options = fsspec.config.conf.get("s3", {}) | fsspec.config.conf.get("s3a", {})  # in the order of s3fs
    name = repr((seconds, options))
    with making:
        if name not in made:
            made[name] = make_objects(options, seconds)
        objects = made[name]
    return None if objects is None else (objects, f"{found[1]}/{found[2]}")


def make_objects(options: dict[str, Any], seconds: float) -> Objects | None:
    """A client for these options of s3fs; None if they may mean something else to s3fs, or botocore is missing."""
    try:
        from botocore import UNSIGNED
        from botocore.config import Config
        from botocore.session import Session
    except ImportError:
        return None
    limits = {
        "connect_timeout": seconds, "read_timeout": seconds, "retries": {"total_max_attempts": 1},
        "max_pool_connections": CONNECTIONS,
    }  # fmt: skip
    signature = {"signature_version": UNSIGNED} if options.get("anon") else {}
    named = {
        "endpoint_url": options.get("endpoint_url"), "use_ssl": options.get("use_ssl", True),
        "aws_access_key_id": options.get("key"), "aws_secret_access_key": options.get("secret"),
        "aws_session_token": options.get("token"),
    }  # fmt: skip
    named = {name: value for name, value in named.items() if value is not None}
    others = options.get("client_kwargs") or {}
    if options.keys() - OPTIONS or others.keys() & (named.keys() | {"config"}):
        return None
    try:
        config = Config(**((options.get("config_kwargs") or {}) | limits | signature))
    except TypeError:  # an option of aiobotocore's
        return None
    client = Session(profile=options.get("profile")).create_client("s3", config=config, **named, **others)
    return Objects(client, {"RequestPayer": "requester"} if options.get("requester_pays") else {})
