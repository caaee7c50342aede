"""Make what the servers expect to find, if it is not there.

Databases by PostgreSQL's own variables (PGHOST, PGUSER, PGPASSWORD ...), buckets by those of AWS (AWS_ENDPOINT_URL,
AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY). Nothing that exists is changed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence


def make_database(name: str) -> bool:
    """Create a database; False where it exists."""
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
    """Create a bucket; False where it exists and is ours.

    Raises:
        botocore.exceptions.ClientError: it is another's, or the credentials do not allow it.
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
    # The oldest region is named by saying nothing.
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
