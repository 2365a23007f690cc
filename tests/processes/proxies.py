"""Real proxies in front of a gateway, for tests: nginx, Caddy and HAProxy, of Debian's packages."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from stack import Process, start

from tests.ports import free_port
from tests.processes.gateways import wait_for_port


def needs(program: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(
        shutil.which(program) is None, reason=f"needs {program}: apt-get install {program} (.ci/run does)"
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
    """Address of nginx. `location`: its handling of every request; `listen`: options after its address and port."""
    port, configuration = free_port(), directory / "nginx.conf"
    configuration.write_text(CONFIGURATION.format(directory=directory, port=port, location=location, listen=listen))
    with _running(["nginx", "-c", str(configuration), "-p", str(directory)], directory, port):
        yield f"http://127.0.0.1:{port}"


@contextmanager
def running_caddy(directory: Path, site: str, certificate: str, key: str) -> Iterator[str]:
    """Address of Caddy on localhost. `site`: the site's block in its configuration file."""
    port, configuration = free_port(), directory / "Caddyfile"
    options = "{\nadmin off\nauto_https disable_redirects\nskip_install_trust\n}\n"
    configuration.write_text(f"{options}https://localhost:{port} {{\ntls {certificate} {key}\n{site}\n}}\n")
    command = ["caddy", "run", "--adapter", "caddyfile", "--config", str(configuration)]
    with _running(command, directory, port, {"XDG_DATA_HOME": str(directory), "XDG_CONFIG_HOME": str(directory)}):
        yield f"https://localhost:{port}"


@contextmanager
def running_haproxy(directory: Path, configuration: str, port: int) -> Iterator[str]:
    """Address of HAProxy on localhost; `configuration` is complete and includes the port."""
    file = directory / "haproxy.cfg"
    file.write_text(configuration)
    with _running(["haproxy", "-db", "-f", str(file)], directory, port):
        yield f"https://localhost:{port}"


@contextmanager
def _running(command: list[str], directory: Path, port: int, env: dict[str, str] | None = None) -> Iterator[Process]:
    process = start(command, directory / f"{command[0]}.log", env)
    try:
        wait_for_port(process, port)
        yield process
    finally:
        process.stop()
