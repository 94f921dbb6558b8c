"""Which places a data set may be at."""

from __future__ import annotations

import re

from autodo_dist.errors import AutodoError

PACKAGES = {"s3": "s3fs", "http": "aiohttp", "https": "aiohttp"}


def is_remote(root: str) -> bool:
    """Whether `root` is a URL. AutodoError for a URL that cannot be a data set's."""
    scheme, mark, rest = root.partition("://")
    if not mark:
        if re.match(r"(s3|https?):/", root):
            raise AutodoError(f"data.root = {root}: write {root.split(':')[0]}:// with two slashes")
        return False
    if scheme not in PACKAGES:
        raise AutodoError(f"data.root = {root}: unknown scheme {scheme}://; give a folder, s3://, http:// or https://")
    if "@" in rest.split("/")[0]:
        raise AutodoError(f"data.root = {scheme}://…: a password would be written into the run folder; use ~/.netrc")
    if not rest.strip("/") or re.search(r"[?#]", rest):
        raise AutodoError(f"data.root = {root}: give {scheme}://HOST/FOLDER (s3://BUCKET/FOLDER), without ? and #")
    return True
