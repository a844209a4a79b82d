"""S3 is read with the settings that s3fs has, compared with s3fs; what only s3fs knows is left to it."""

import os
import re
import sys

import fsspec.config
import pytest
import s3fs

from open_lm.data import s3
from open_lm.data.remote import Patience, find_reader, find_remote, read_bytes

PATIENCE = Patience(0, 5)
FOR_S3FS = {"default_block_size": 2**20}  # an option that s3fs alone knows
AWS_CONFIG = """
[default]
region = eu-north-1
[profile other]
region = ap-south-1
aws_access_key_id = of-the-profile
aws_secret_access_key = secret-of-the-profile
endpoint_url = http://profile.example:9
[profile styled]
region = eu-west-3
s3 =
  addressing_style = virtual
"""
KEYS = {"AWS_ACCESS_KEY_ID": "of-the-environment", "AWS_SECRET_ACCESS_KEY": "secret"}
SETTINGS = [
    (KEYS, {}),
    (KEYS | {"AWS_SESSION_TOKEN": "token", "AWS_DEFAULT_REGION": "us-west-2"}, {}),
    (KEYS | {"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}, {}),
    (KEYS | {"AWS_ENDPOINT_URL": "http://127.0.0.1:9", "AWS_ENDPOINT_URL_S3": "https://[::1]:8"}, {}),
    (KEYS | {"AWS_ENDPOINT_URL": "http://127.0.0.1:9", "AWS_IGNORE_CONFIGURED_ENDPOINT_URLS": "true"}, {}),
    ({"AWS_PROFILE": "other"}, {}),
    (KEYS | {"AWS_PROFILE": "styled"}, {}),
    ({}, {"profile": "other"}),
    (KEYS, {"key": "given", "secret": "given-secret", "token": "given-token"}),
    ({}, {"anon": True}),
    (KEYS, {"anon": False, "endpoint_url": "http://minio.example:9000"}),
    (KEYS, {"use_ssl": False}),
    (KEYS, {"client_kwargs": {"region_name": "ca-central-1", "endpoint_url": "http://ceph.example"}}),
    (KEYS, {"config_kwargs": {"s3": {"addressing_style": "path"}, "signature_version": "s3"}}),
]


@pytest.fixture
def aws(tmp_path, monkeypatch):
    """No settings but those of AWS_CONFIG; `aws(environment, options)` adds some."""
    for name in list(os.environ):
        if name.startswith("AWS_"):
            monkeypatch.delenv(name)
    (tmp_path / "config").write_text(AWS_CONFIG)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")

    def configure(environment: dict, options: dict) -> None:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setitem(fsspec.config.conf, "s3", options)
        s3fs.S3FileSystem.clear_instance_cache()
        s3.forget()

    yield configure
    s3fs.S3FileSystem.clear_instance_cache()
    s3.forget()


@pytest.mark.parametrize(("environment", "options"), SETTINGS)
def test_requests_are_those_of_s3fs(aws, environment, options):
    """Host, path style, keys, token, region and signature, as signed URLs show them."""
    aws(environment, options)
    found = s3.find_objects("s3://a-bucket/folder/a+b c.tar", 5)
    assert found is not None
    (client, _), path = found
    bucket, _, key = path.partition("/")
    ours = client.generate_presigned_url("get_object", {"Bucket": bucket, "Key": key}, ExpiresIn=100)
    theirs = s3fs.S3FileSystem().sign("s3://a-bucket/folder/a+b c.tar", expiration=100)
    changing = r"(Date|Signature|Expires)=[^&]*"
    assert re.sub(changing, "", ours) == re.sub(changing, "", theirs)


def test_requesters_pay_where_they_say_so(aws):
    aws(KEYS, {"requester_pays": True})
    found = s3.find_objects("s3://a-bucket/a.tar", 5)
    assert found is not None
    assert found[0].arguments == s3fs.S3FileSystem().req_kw == {"RequestPayer": "requester"}


@pytest.mark.parametrize(
    "options",
    [
        FOR_S3FS,
        {"cache_regions": True},
        {"username": "a", "password": "b"},
        {"config_kwargs": {"connector_args": {"keepalive_timeout": 1}}},  # aiobotocore's
        {"key": "a", "secret": "b", "client_kwargs": {"aws_access_key_id": "c"}},
    ],
)
def test_options_of_s3fs_alone_are_left_to_it(aws, options):
    aws(KEYS, options)
    assert s3.find_objects("s3://a-bucket/a.tar", 5) is None


@pytest.mark.parametrize(
    "url",
    [
        "s3://arn:aws:s3:us-west-2:123456789012:accesspoint/name/a.tar",
        "s3://bucket/a.tar?versionId=abc",
        "simplecache::s3://bucket/a.tar",
        "zip://a.tar::s3://bucket/a.zip",
        "s3://bucket/a.zip::file",
        "s3://bucket",
        "s3://bucket/",
        "s3://bucket/folder/",
        "https://bucket/a.tar",
    ],
)
def test_other_urls_are_left_to_fsspec(url):
    assert s3.find_objects(url, 5) is None


def test_without_botocore_s3fs_is_asked(aws, monkeypatch):
    aws(KEYS, {})
    monkeypatch.setitem(sys.modules, "botocore", None)
    assert s3.find_objects("s3://bucket/a.tar", 5) is None


def test_objects_and_errors_are_those_of_s3fs(bucket, tmp_path, monkeypatch):
    names = ["a.tar", "a b+c%41é#1.tar", "folder//deep.tar", "empty.tar"]
    for number, name in enumerate(names[:2]):
        (tmp_path / name).write_bytes(bytes(range(100 + number)))
    (tmp_path / names[3]).write_bytes(b"")
    bucket(tmp_path)
    s3fs.S3FileSystem().pipe_file(f"bucket/{names[2]}", b"deep")

    def look(options: dict) -> list:
        monkeypatch.setitem(fsspec.config.conf, "s3", options)
        seen = []
        for url in [f"s3://bucket/{name}" for name in names] + ["s3a://bucket/a.tar"]:
            found = find_remote(url, PATIENCE)
            seen += [found.size, found.version, found.has_parts, read_bytes(url, PATIENCE)]
            if found.size:
                seen.append(found.file_system.cat_file(found.path, start=1, end=3))
        for url in ("s3://bucket/b.tar", "s3://no-such-bucket/a.tar"):
            for action in (find_remote, read_bytes):
                with pytest.raises(FileNotFoundError) as error:
                    action(url, PATIENCE)
                seen.append(str(error.value))
        return seen

    assert isinstance(find_reader("s3://bucket/a.tar", PATIENCE)[0], s3.Objects)
    ours, theirs = look({}), look(FOR_S3FS)
    assert ours == theirs
    assert ours[3] == bytes(range(100))
    assert not isinstance(find_reader("s3://bucket/a.tar", PATIENCE)[0], s3.Objects)


@pytest.mark.parametrize("options", [{}, FOR_S3FS], ids=["botocore", "s3fs"])
@pytest.mark.parametrize(
    ("environment", "text"),
    [
        ({}, "cannot be read: NoCredentialsError: .*set AWS_PROFILE or AWS_ACCESS_KEY_ID"),
        ({"AWS_PROFILE": "missing"}, r"cannot be read: ProfileNotFound: .*\(missing\)"),
        ({"AWS_ACCESS_KEY_ID": "only"}, "cannot be read: PartialCredentialsError: "),
    ],
)
def test_settings_that_do_not_do_are_named(aws, environment, options, text):
    aws(environment, options)
    with pytest.raises(OSError, match=f"^s3://bucket/a.tar: {text}"):
        find_remote("s3://bucket/a.tar", PATIENCE)
