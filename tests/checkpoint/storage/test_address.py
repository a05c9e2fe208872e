from __future__ import annotations

import pytest

from autoglm_resume.checkpoint.storage.address import Bucket, bucket_at


@pytest.mark.parametrize(
    ("address", "bucket"),
    [
        ("s3://bucket", Bucket("s3", "bucket", "")),
        ("s3://my.bucket//a/b/", Bucket("s3", "my.bucket", "a/b")),
        ("gs://my_bucket/a", Bucket("gs", "my_bucket", "a")),
        ("az://my-container/a", Bucket("az", "my-container", "a")),
        ("/nfs/copies", None),
        ("/nfs/s3://bucket", None),
    ],
)
def test_a_scheme_names_the_service_and_everything_else_is_a_path(
    address: str, bucket: Bucket | None
) -> None:
    assert bucket_at(address) == bucket


@pytest.mark.parametrize(
    "address", ["s3://my_bucket/a", "az://my_bucket/a", "az://a.bucket", "gs://"]
)
def test_a_name_that_the_service_does_not_allow_is_refused(address: str) -> None:
    with pytest.raises(ValueError, match=address[:5]):
        bucket_at(address)
