"""What Google Cloud says of the VM that a command runs on."""

from __future__ import annotations

import os
import pathlib
import urllib.error
import urllib.request

VENDOR = pathlib.Path("/sys/class/dmi/id/product_name")
HOST = "metadata.google.internal"  # another one: GCE_METADATA_HOST, as Google's libraries have it


class Unknown(Exception):
    """The server is there, and knows no such thing."""


def is_here() -> bool:
    """Return whether this is a VM of Google Cloud."""
    if os.environ.get("GCE_METADATA_HOST"):
        return True
    try:
        return VENDOR.read_text().startswith("Google")
    except OSError:
        return False


def metadata(path: str, timeout: float) -> str:
    """Return what the VM's metadata say, e.g. of `instance/preempted`.

    Raises:
      Unknown: nothing of that name.
      OSError: no such server, or it does not answer.
    """
    host = os.environ.get("GCE_METADATA_HOST") or HOST
    question = urllib.request.Request(
        f"http://{host}/computeMetadata/v1/{path}", headers={"Metadata-Flavor": "Google"}
    )
    # The metadata are never behind a proxy.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(question, timeout=timeout) as answer:
            return answer.read().decode(errors="replace").strip()
    except urllib.error.HTTPError as error:
        if error.code == 404:
            raise Unknown(path) from None
        raise


def tpu_environment(timeout: float = 5.0) -> dict[str, str]:
    """Return what a TPU VM's metadata say of its slice, such as MEGASCALE_NUM_SLICES.

    Empty: it is no TPU VM, or does not say.
    """
    try:
        text = metadata("instance/attributes/tpu-env", timeout)
    except (Unknown, OSError):
        return {}
    lines = (line.partition(":") for line in text.splitlines())
    return {name.strip(): value.strip().strip("'\"") for name, _, value in lines if name.strip()}
