"""Tells which cloud this machine is of by the firmware's words, without any network delay."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

_AZURE_CHASSIS = "7783-7084-3265-9085-8269-3286-77"
"""The asset tag of every Azure chassis, as cloud-init's Azure data source knows it."""

_VARIABLES = {
    "AWS_EC2_METADATA_SERVICE_ENDPOINT": "ec2", "GCE_METADATA_HOST": "gce",
    "AZURE_POD_IDENTITY_AUTHORITY_HOST": "azure",
}  # fmt: skip


def find_platform(environ: Mapping[str, str], dmi: Path = Path("/sys/class/dmi/id")) -> str | None:
    """ "ec2", "gce", "azure", "alibaba", "tencent" or None: the platform of `tell_platform`."""
    return tell_platform(environ, dmi)[0]


def tell_platform(
    environ: Mapping[str, str], dmi: Path = Path("/sys/class/dmi/id")
) -> tuple[str | None, str]:
    """(platform, what tells it).

    A metadata endpoint in the environment decides before the firmware does;
    AWS_EC2_METADATA_DISABLED is obeyed.
    """
    is_ec2_off = environ.get("AWS_EC2_METADATA_DISABLED", "").lower() == "true"
    for variable, platform in _VARIABLES.items():
        if environ.get(variable) and not (platform == "ec2" and is_ec2_off):
            return platform, variable
    found = _from_firmware(dmi)
    if found == "ec2" and is_ec2_off:
        return None, "AWS_EC2_METADATA_DISABLED"
    return found, "the firmware" if found else "neither environment nor firmware names one"


def _from_firmware(dmi: Path) -> str | None:
    vendor = _read(dmi / "sys_vendor")
    if vendor == "Amazon EC2" or "amazon" in _read(dmi / "bios_version"):
        return "ec2"
    if _read(dmi / "product_name") == "Google Compute Engine":
        return "gce"
    if _read(dmi / "chassis_asset_tag") == _AZURE_CHASSIS:
        return "azure"
    return {"Alibaba Cloud": "alibaba", "Tencent Cloud": "tencent"}.get(vendor)


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""
