"""A real nginx in front of a gateway, for tests; Debian's package."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from stack import Process, start

from tests.ports import free_port
from tests.processes.gateways import wait_for_port

needs_nginx = pytest.mark.skipif(
    shutil.which("nginx") is None, reason="needs nginx: apt-get install nginx (.ci/run does)"
)
CONFIGURATION = """
daemon off;
worker_processes 1;
pid {directory}/nginx.pid;
error_log {directory}/nginx-error.log;
events {{}}
http {{
    access_log off;
    client_body_temp_path {directory}/body;
    proxy_temp_path {directory}/proxy;
    fastcgi_temp_path {directory}/fastcgi;
    scgi_temp_path {directory}/scgi;
    uwsgi_temp_path {directory}/uwsgi;
    server {{
        listen 127.0.0.1:{port}{listen};
        location / {{
            {location}
        }}
    }}
}}
"""


@contextmanager
def running_nginx(directory: Path, location: str, listen: str = "") -> Iterator[str]:
    """Its address. `location`: what it does with every request; `listen`: what stands behind its address and port."""
    port, configuration = free_port(), directory / "nginx.conf"
    configuration.write_text(CONFIGURATION.format(directory=directory, port=port, location=location, listen=listen))
    process: Process = start(["nginx", "-c", str(configuration), "-p", str(directory)], directory / "nginx.log")
    try:
        wait_for_port(process, port)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.stop()
