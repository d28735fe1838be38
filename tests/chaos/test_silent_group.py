"""An expert group that falls silent (stopped, not dead) does not hold up the end of the service."""

from __future__ import annotations

import signal
import threading
from pathlib import Path

import pytest

from protos.client import Client, ClientConfig
from protos.errors import UnreachableError
from protos.events import Delta
from router.gating.dispatch import DISPATCH_TIMEOUT_S
from tests.eventually import eventually
from tests.integration.served import STOP_TIMEOUT_S, Served
from tests.parity.checkpoints import make_checkpoint

pytestmark = pytest.mark.timeout(400)


def test_a_stop_does_not_wait_for_a_silent_group(tmp_path: Path) -> None:
    assert STOP_TIMEOUT_S < DISPATCH_TIMEOUT_S
    with Served(make_checkpoint(tmp_path, tokenizer=True), "--expert-groups", "2") as service:
        began = threading.Event()
        errors: list[Exception] = []

        def run() -> None:
            try:
                with Client(service.address, ClientConfig(max_attempts=1)) as client:
                    for event in client.generate([5, 6], max_tokens=3000, ignore_eos=True):
                        if isinstance(event, Delta):
                            began.set()
            except UnreachableError as error:
                errors.append(error)

        stream = threading.Thread(target=run)
        stream.start()
        assert began.wait(60)
        service.process_named("ExpertGroupActor").suspend()
        service.signal(signal.SIGTERM)
        eventually(lambda: any("draining" in line for line in service.errors), 30)
        service.signal(signal.SIGTERM)
        assert service.wait() == 0
        stream.join(STOP_TIMEOUT_S)
        assert errors
        assert any("router_left_waiting" in line for line in service.errors)
        assert service.survivors() == []
