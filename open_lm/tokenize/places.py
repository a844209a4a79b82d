"""Whether two paths or URLs mean the same place, or one is in the other."""

import os
import posixpath


def normalize(url: str) -> str:
    """One name for one place: local paths without links and dots, from the root; URLs without a last slash."""
    if "://" in url and not url.startswith("file://"):
        scheme, _, path = url.partition("://")
        return f"{'s3' if scheme == 's3a' else scheme}://{posixpath.normpath('/' + path).strip('/')}"
    return os.path.realpath(url.removeprefix("file://"))


def is_inside(url: str, folder: str) -> bool:
    """Whether a file or folder is in a folder, or the folder itself."""
    url, folder = normalize(url), normalize(folder)
    return url == folder or url.startswith(folder.rstrip("/") + "/")
