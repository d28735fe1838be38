"""What keeps `serve` running, with other programs in its place.

`start` is tested where it may end Ray for real: on the hosts of `tests/cluster`.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from cluster import supervisor
from cluster.supervisor import Supervisor
from tests.eventually import eventually

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(autouse=True)
def a_ray_node(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Whether this machine has a Ray node: it has, until a test says otherwise."""
    gone = threading.Event()
    monkeypatch.setattr(supervisor, "has_ray_node", lambda: not gone.is_set())
    monkeypatch.setattr(supervisor, "FIRST_BACKOFF_S", 0.01)
    monkeypatch.setattr(supervisor, "MAX_BACKOFF_S", 0.02)
    monkeypatch.setattr(supervisor, "RAY_LOOK_S", 0.05)
    handlers = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    yield gone
    for number, handler in handlers.items():
        signal.signal(number, handler)


def program(code: str, *arguments: str) -> list[str]:
    return [sys.executable, "-I", "-S", "-c", code, *arguments]


COUNT = "import sys; f = open(sys.argv[1], 'a'); f.write('x'); f.close();"


def test_what_fails_is_started_again_until_it_ends_well(tmp_path: Path) -> None:
    log = tmp_path / "log"
    code = COUNT + "sys.exit(0 if len(open(sys.argv[1]).read()) == 3 else 5)"
    assert Supervisor(program(code, str(log))).run() == 0
    assert log.read_text() == "xxx"


@pytest.mark.parametrize("code", [2, 3])
def test_a_wrong_command_line_or_configuration_is_not_tried_again(
    tmp_path: Path, code: int
) -> None:
    log = tmp_path / "log"
    assert Supervisor(program(f"{COUNT} sys.exit({code})", str(log))).run() == code
    assert log.read_text() == "x"


def test_what_was_up_is_started_again_whatever_stands_in_its_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A port that the one before still holds, a mount that is away: the same command was right."""
    monkeypatch.setattr(supervisor, "SOUND_S", 0.0)
    log = tmp_path / "log"
    code = COUNT + "sys.exit((5, 3, 3, 0)[len(open(sys.argv[1]).read()) - 1])"
    assert Supervisor(program(code, str(log))).run() == 0
    assert log.read_text() == "xxxx"


def test_it_ends_with_ray(a_ray_node: threading.Event, capfd: pytest.CaptureFixture[str]) -> None:
    threading.Timer(0.2, a_ray_node.set).start()
    assert Supervisor(program("import time; time.sleep(60)")).run() == -signal.SIGKILL
    assert "no Ray node runs here any more" in capfd.readouterr().err


def test_without_a_command_it_waits_until_ray_has_come_and_gone(
    a_ray_node: threading.Event,
) -> None:
    a_ray_node.set()  # not there yet
    threading.Timer(0.2, a_ray_node.clear).start()
    watching = threading.Event()
    threading.Timer(0.5, lambda: (watching.set(), a_ray_node.set())).start()
    assert Supervisor([]).run() == 0
    assert watching.is_set(), "it ended before Ray had come"


def test_without_a_command_it_does_not_wait_for_ever(
    a_ray_node: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "RAY_START_S", 0.1)
    a_ray_node.set()
    assert Supervisor([]).run() == 0


def test_stop_ends_a_supervisor_and_its_program(tmp_path: Path) -> None:
    """Nobody reaps it, as in a container without an init."""
    code = (
        "import sys; from cluster import supervisor as s;"
        "s.has_ray_node = lambda: True;"
        "sys.exit(s.Supervisor([sys.executable, '-c', 'import time; time.sleep(60)']).run())"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, "cluster.supervisor"], cwd=ROOT, start_new_session=True
    )
    (tmp_path / "service.pid").write_text(str(process.pid))
    child = eventually(lambda: psutil.Process(process.pid).children(), 30)[0]
    assert supervisor.stop(tmp_path)
    process.wait()
    eventually(lambda: not child.is_running(), 10)
    assert not (tmp_path / "service.pid").exists()


def test_a_foreign_process_with_the_old_id_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "service.pid").write_text("1")
    assert not supervisor.stop(tmp_path)
