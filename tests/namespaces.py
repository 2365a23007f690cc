"""Two machines that are two network namespaces of this one, joined by a cable; they know each other by name."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
from stack import Process, start

ETC = Path("/etc/netns")
"""`ip netns exec` mounts the files under a namespace's name here as its /etc."""


@dataclass(frozen=True)
class Machine:
    """A network namespace, and the folder in which its user works."""

    name: str
    address: str
    folder: Path

    def command(self, words: list[str]) -> list[str]:
        return ["ip", "netns", "exec", self.name, *words]

    def run(self, words: list[str], env: dict[str, str] | None = None) -> "subprocess.CompletedProcess[str]":
        both = {**os.environ, **(env or {})}
        return subprocess.run(
            self.command(words), cwd=self.folder, env=both, capture_output=True, text=True, check=False
        )

    def start(self, words: list[str], log: str, env: dict[str, str] | None = None) -> Process:
        return start(self.command(words), self.folder / log, env, cwd=self.folder)


def _ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"ip {' '.join(words)}: {done.stderr.strip()}")


@contextmanager
def two_machines(directory: Path, server_name: str) -> Iterator[tuple[Machine, Machine]]:
    """A server, known to both as `server_name`, and a laptop. Skips the test if namespaces cannot be made."""
    if shutil.which("ip") is None:
        pytest.skip("needs ip: apt-get install iproute2 (.ci/run does)")
    machines = []
    for number, role in enumerate(("server", "laptop")):
        machine = Machine(f"specedge-{role}-{os.getpid()}", f"192.0.2.{7 + number}", directory / role)
        machine.folder.mkdir()
        machines.append(machine)
    server, laptop = machines
    try:
        try:
            for machine in machines:
                _ip("netns", "add", machine.name)
            ends = [f"se{os.getpid()}{end}" for end in "sl"]
            _ip("link", "add", ends[0], "netns", server.name, "type", "veth", "peer", ends[1], "netns", laptop.name)
            for machine, end in zip(machines, ends, strict=True):
                _ip("-n", machine.name, "address", "add", f"{machine.address}/24", "dev", end)
                _ip("-n", machine.name, "link", "set", end, "up")
                _ip("-n", machine.name, "link", "set", "lo", "up")
                # It leads nowhere, but vLLM looks up the address of its default route.
                _ip("-n", machine.name, "route", "add", "default", "dev", end)
                (ETC / machine.name).mkdir(parents=True)
                hosts = f"127.0.0.1 localhost\n{server.address} {server_name}\n"
                (ETC / machine.name / "hosts").write_text(hosts)
        except OSError as error:
            pytest.skip(f"no network namespaces can be made here: {error}")
        yield server, laptop
    finally:
        for machine in machines:
            shutil.rmtree(ETC / machine.name, ignore_errors=True)
            with suppress(OSError):
                _ip("netns", "delete", machine.name)
