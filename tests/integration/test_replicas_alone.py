"""What starts the replicas of one machine: reachable by nobody else, alone with its run, and outlived by none of them."""

from __future__ import annotations

import ipaddress
import signal

import psutil
import pytest

from tests.forks import splitfl
from tests.integration.test_commands import finish
from tests.integration.test_replicas import processes
from tests.replicas import Replicas, serving
from tests.unit.channel_world import wait_until


def heard_by(process: psutil.Process) -> list[str]:
    return [found.laddr.ip for found in process.net_connections("tcp") if found.status == psutil.CONN_LISTEN]


def test_nobody_outside_the_machine_can_reach_what_the_processes_say_to_one_another(tmp_path, stories):
    replicas = Replicas(tmp_path, stories, 2, 1)
    with serving(replicas):
        agent = psutil.Process(replicas.process.pid)
        listening = [heard_by(process) for process in (agent, *agent.children(recursive=True))]
        assert sum(map(len, listening)) >= 5, "the store of the agent's, each replica's own endpoints"
        assert all(ipaddress.ip_address(host).is_loopback for hosts in listening for host in hosts), listening
        code, _, said = finish(splitfl("serve", stories, *flags_of(replicas)))
        assert code == 2
        assert "another server keeps its run in" in said
        assert len(said.strip().splitlines()) <= 2, said


def flags_of(replicas: Replicas) -> list[str]:
    """For a single server of the same run."""
    authorized = replicas.work / "authorized_clients"
    return ["--run=trial", f"--out={replicas.out}", f"--authorized-clients={authorized}", "--clients=1", "--device=cpu"]


@pytest.mark.slow
def test_replicas_end_when_what_started_them_is_killed_and_the_run_is_free_again(tmp_path, stories):
    replicas = Replicas(tmp_path, stories, 2, 1)
    replicas.start()
    left = [psutil.Process(number) for number in processes(replicas).values()]
    assert len(left) == 2
    replicas.process.send_signal(signal.SIGKILL)
    wait_until(lambda: not any(process.is_running() for process in left), 20)
    assert replicas.stop() == -signal.SIGKILL
    with serving(replicas):
        assert replicas.join
