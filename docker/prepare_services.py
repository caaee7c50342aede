"""Create the databases and buckets that the servers need. Existing ones are not changed.

The connections come from environment variables: PGHOST, PGUSER, PGPASSWORD ... for PostgreSQL; AWS_ENDPOINT_URL,
AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY for the buckets.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence


def make_database(name: str) -> bool:
    """Create a database. Returns False if it already exists."""
    import psycopg2
    from psycopg2 import sql

    connection = psycopg2.connect(dbname="postgres")
    connection.autocommit = True  # a database cannot be created within a transaction
    try:
        with connection.cursor() as cursor:
            cursor.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
    except psycopg2.errors.DuplicateDatabase:
        return False
    finally:
        connection.close()
    return True


def make_bucket(name: str) -> bool:
    """Create a bucket. Returns False if it already exists and these credentials may use it.

    Raises:
        botocore.exceptions.ClientError: the bucket belongs to someone else, or the credentials do not allow this.
    """
    import boto3
    from botocore.exceptions import ClientError

    client = boto3.client("s3")
    try:
        client.head_bucket(Bucket=name)
    except ClientError as error:
        if error.response["Error"]["Code"] not in ("404", "NoSuchBucket"):
            raise
    else:
        return False
    region = client.meta.region_name
    # S3 does not accept us-east-1 as a location: it is the default.
    place = {} if region in (None, "us-east-1") else {"CreateBucketConfiguration": {"LocationConstraint": region}}
    client.create_bucket(Bucket=name, **place)
    return True


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--databases", nargs="*", default=[], metavar="NAME")
    parser.add_argument("--buckets", nargs="*", default=[], metavar="NAME")
    args = parser.parse_args(argv)
    for kind, names, make in (
        ("database", args.databases, make_database),
        ("bucket", args.buckets, make_bucket),
    ):
        for name in names:
            try:
                made = make(name)
            except Exception as error:
                print(f"error: {kind} {name}: {' '.join(str(error).split())}", file=sys.stderr)
                return 1
            print(f"{kind} {name}: {'made' if made else 'was there'}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
