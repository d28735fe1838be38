"""One expert group without its process: weights in, forwards answered, counters out.

Decides what a call must satisfy before it reaches a kernel, and when a group is what. Must not know
Ray, gRPC or sockets: `service.py` and `lane.py` bring frames, `cluster/actors.py` brings the
placement.

Life cycle: STARTING -> LOADING -> READY -> DRAINING; FAILED from any of them, for good. Two phases:
the constructor is cheap and touches no weights; `load` does the rest once a placement is known.

An epoch says which placement the group was last told of. It decides nothing about a forward:
experts are pure functions, so a call of any epoch is answered as long as its experts are resident.

    lock      guards                               held for
    ----      ------                               --------
    _compute  kernels, residency, counters         one forward; the publication of a change
    _control  load, load_experts, drop_experts     a whole change, which fills slots while forwards
    go on
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from experts import device
from experts.calls import CallReader, culprit
from experts.compute import ExpertCompute, ExpertShape, NativeCompute, NotResidentError
from experts.compute_choice import choose_compute
from experts.express import ComputeLock, Express, Totals
from experts.finite import all_finite
from experts.group_state import GroupState, GroupStatus
from experts.load import LoadCounters
from experts.placement import Placement
from experts.weights import SafetensorsCheckpoint
from protos.codec import (
    FrameHeader,
    FrameKind,
)
from protos.errors import (
    ConfigurationError,
    DeadlineExceededError,
    GroupComputeError,
    InvalidFieldError,
    NotReadyError,
    ResourceError,
    StalePlacementError,
)

log = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

ExpertKeys = Iterable[tuple[int, int]]
"""`(layer_id, expert_id)`."""


class ExpertRuntime:
    """The plain class behind an expert group's actor."""

    def __init__(
        self,
        *,
        group_id: str,
        checkpoint: str | Path,
        dtype: str = "bfloat16",
        compute: str = "auto",
        num_threads: int = 1,
        capacity_bytes: int | None = None,
    ) -> None:
        """Check the configuration and that deepspeed is here; read nothing.

        Args:
            group_id: Name of the group in placements.
            checkpoint: Directory of the checkpoint.
            dtype: `float32` or `bfloat16`: of weights, rows and outputs.
            compute: `auto`, `native`, `deepspeed` or `torch`.
            num_threads: Threads that work on one forward.
            capacity_bytes: Bound of the resident experts; None takes what is free whenever experts
                are loaded.

        Raises:
            ConfigurationError: A value out of range, or deepspeed cannot be imported.
        """
        if dtype not in DTYPES:
            raise ConfigurationError("dtype", f"must be one of {', '.join(DTYPES)}", dtype)
        if num_threads < 1:
            raise ConfigurationError("experts.num_threads", "must be 1 or more", num_threads)
        device.require_deepspeed()
        self.group_id = group_id
        self.num_threads = num_threads
        self._checkpoint_path = Path(checkpoint)
        self._compute_choice = compute
        self._dtype = DTYPES[dtype]
        self._capacity_bytes = capacity_bytes
        self._is_bounded = capacity_bytes is not None
        self._compute_lock = ComputeLock()
        self._control_lock = threading.Lock()
        self._state = GroupState.STARTING
        self._failure = ""
        self._listeners: list[Callable[[GroupState], None]] = []
        self._epoch = 0
        self._shape: ExpertShape | None = None
        self._compute: ExpertCompute | None = None
        self._counters: LoadCounters | None = None
        self._reader: CallReader | None = None
        self._express: Express | None = None
        self._num_calls = self._num_rows = self._num_pairs = 0
        self._busy_s = 0.0

    @property
    def state(self) -> GroupState:
        """What the group is doing now."""
        return self._state

    @property
    def epoch(self) -> int:
        """Epoch of the placement in force; 0 before the first."""
        return self._epoch

    @property
    def express(self) -> Express | None:
        """Native answers for lanes; None before `load`, and where the experts compute otherwise."""
        return self._express

    def on_state(self, listener: Callable[[GroupState], None]) -> None:
        """Call `listener` now and after every change, from the thread that changes the state."""
        self._listeners.append(listener)
        listener(self._state)

    def load(self, placement: Placement) -> None:
        """Read this group's experts of the placement and become READY.

        Raises:
            CheckpointError: The checkpoint is broken.
            ConfigurationError: The placement does not fit the checkpoint or does not know this
                group.
            ResourceError: The experts do not fit the capacity.
            NotReadyError: The group is past STARTING.
        """
        with self._control_lock:
            if self._state is not GroupState.STARTING:
                raise NotReadyError(f"group {self.group_id} is {self._state}, load() comes once")
            self._enter(GroupState.LOADING)
            try:
                self._load(placement)
            except BaseException as error:
                self._failure = str(error)
                self._enter(GroupState.FAILED)
                raise
            self._enter(GroupState.READY)

    def adopt(self, shape: ExpertShape, compute: ExpertCompute, epoch: int) -> None:
        """Answer forwards from `compute`, which holds its experts; `load` does this last."""
        with self._compute_lock:
            self._shape, self._compute = shape, compute
            self._counters = LoadCounters(shape.num_layers, shape.num_experts)
            self._reader = CallReader(shape)
            self._epoch = epoch
            self._express = None
            if isinstance(compute, NativeCompute):
                self._express = Express(shape, compute, self._counters)
            self._compute_lock.share_with(self._express)

    def drain(self) -> None:
        """Take no new lanes or streams; calls on open ones are still answered."""
        if self._state is GroupState.READY:
            self._enter(GroupState.DRAINING)

    def forward(
        self, header: FrameHeader, payload: bytearray | memoryview
    ) -> tuple[FrameHeader, memoryview]:
        """Answer one forward.

        A pure function of the weights and the call: sending it again, here or elsewhere, is always
        allowed.

        Args:
            header: A checked header of kind FORWARD.
            payload: Its payload, writable memory; only read, and not used after the return.

        Returns:
            Header and payload of the RESULT.

        Raises:
            WireFormatError: A layer, row, expert, width or dtype that this model does not have.
            StalePlacementError: An expert that is not resident.
            DeadlineExceededError: The caller stopped waiting while the call was queued.
            MessageTooLargeError: The result would not fit a frame.
            NonFiniteError: NaN or infinity in the rows or in an output.
            GroupComputeError: The kernel failed.
            NotReadyError: No weights yet.
        """
        arrived_s = time.perf_counter()
        compute, counters, reader = self._compute, self._counters, self._reader
        if compute is None or counters is None or reader is None:
            raise NotReadyError(f"group {self.group_id} is {self._state}")
        rows, pair_row, pair_expert, pair_weight = reader.views(header, payload)
        layer_id, combine = header.layer_id, header.combine
        with self._compute_lock:
            started_s = time.perf_counter()
            waited_s = started_s - arrived_s
            if header.deadline_ms and waited_s * 1e3 > header.deadline_ms:
                raise DeadlineExceededError(
                    f"a forward queued in group {self.group_id}", header.deadline_ms / 1e3
                )
            try:
                out = compute.forward(layer_id, rows, pair_row, pair_expert, pair_weight, combine)
            except NotResidentError as error:
                raise StalePlacementError(
                    layer_id, error.expert_id, self._epoch, header.placement_epoch
                ) from None
            except (RuntimeError, ValueError, IndexError, MemoryError) as error:
                log.exception("event=forward_failed group=%s layer=%d", self.group_id, layer_id)
                raise GroupComputeError(self.group_id, str(error)) from error
            compute_s = time.perf_counter() - started_s
            counters.add(layer_id, pair_expert.numpy())
            self._num_calls += 1
            self._num_rows += header.num_rows
            self._num_pairs += header.num_pairs
            self._busy_s += compute_s
        if not all_finite(out):
            raise culprit(layer_id, rows, pair_row, pair_expert, out, combine)
        result = memoryview(out.view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
        answer = FrameHeader(
            kind=FrameKind.RESULT,
            combine=combine,
            call_id=header.call_id,
            placement_epoch=header.placement_epoch,
            layer_id=layer_id,
            dtype=header.dtype,
            num_rows=header.num_rows,
            hidden=header.hidden,
            num_pairs=header.num_pairs,
            compute_us=int(compute_s * 1e6),
            queue_us=int(waited_s * 1e6),
            payload_bytes=len(result),
        )
        return answer, result

    def load_experts(
        self, keys: ExpertKeys, epoch: int, *, dry_run: bool = False
    ) -> tuple[int, int, int]:
        """Make experts resident beside the others, while forwards go on; then adopt the epoch.

        An expert answers as soon as it is here, whatever the epoch.

        Args:
            keys: Experts; those already resident cost nothing.
            epoch: Becomes the group's epoch when all of them are resident.
            dry_run: Compute the figures and change nothing.

        Returns:
            Number loaded, bytes needed, bytes free before.

        Raises:
            InvalidFieldError: An unknown expert or an epoch of the past.
            ResourceError: They do not fit; nothing was changed.
            CheckpointError: A weight could not be read; experts loaded so far stay, the epoch does
                not change.
        """
        with self._control_lock:
            compute, shape = self._loaded()
            self._check_epoch(epoch)
            wanted: dict[int, set[int]] = {}
            for layer_id, expert_id in self._checked(keys, shape):
                wanted.setdefault(layer_id, set()).add(expert_id)
            for layer_id, expert_ids in wanted.items():
                expert_ids -= set(compute.residents(layer_id))
            num_experts = sum(map(len, wanted.values()))
            needed = num_experts * shape.expert_bytes
            free = self._free_bytes(compute)
            if dry_run:
                return 0, needed, free
            self._require_room(needed, free)
            with SafetensorsCheckpoint(self._checkpoint_path) as checkpoint:
                self._fill(checkpoint, compute, {k: sorted(v) for k, v in wanted.items() if v})
            with self._compute_lock:
                self._adopt_epoch(epoch)
            log.info(
                "event=experts_loaded group=%s experts=%d epoch=%d",
                self.group_id,
                num_experts,
                epoch,
            )
            return num_experts, needed, free

    def drop_experts(self, keys: ExpertKeys, epoch: int) -> int:
        """Forget experts and adopt the epoch, between two forwards.

        Returns:
            How many were dropped.

        Raises:
            InvalidFieldError: An expert that is not resident, or an epoch of the past; nothing was
                changed.
        """
        with self._control_lock:
            compute, shape = self._loaded()
            self._check_epoch(epoch)
            unique = sorted(set(self._checked(keys, shape)))
            resident = {layer_id: set(compute.residents(layer_id)) for layer_id, _ in unique}
            for layer_id, expert_id in unique:
                if expert_id not in resident[layer_id]:
                    raise InvalidFieldError(
                        "experts", "must be resident", f"layer {layer_id} expert {expert_id}"
                    )
            with self._compute_lock:
                for layer_id, expert_id in unique:
                    compute.drop(layer_id, expert_id)
                self._adopt_epoch(epoch)
            log.info(
                "event=experts_dropped group=%s experts=%d epoch=%d",
                self.group_id,
                len(unique),
                epoch,
            )
            return len(unique)

    def load_counts(self) -> npt.NDArray[np.int64]:
        """Return `[num_layers, num_experts]` pairs computed so far; empty before `load`."""
        with self._compute_lock:
            return (
                np.zeros((0, 0), np.int64) if self._counters is None else self._counters.snapshot()
            )

    def status(self) -> GroupStatus:
        """Return what the group says of itself."""
        compute, shape = self._compute, self._shape
        with self._compute_lock:
            layers = (
                {}
                if compute is None or shape is None
                else {
                    layer_id: residents
                    for layer_id in range(shape.num_layers)
                    if (residents := compute.residents(layer_id))
                }
            )
            express = Totals(0, 0, 0, 0.0) if self._express is None else self._express.totals()
            return GroupStatus(
                group_id=self.group_id,
                state=self._state,
                failure=self._failure,
                placement_epoch=self._epoch,
                layers=layers,
                compute="" if compute is None else compute.name,
                num_threads=self.num_threads,
                resident_bytes=0 if compute is None else compute.resident_bytes,
                capacity_bytes=self._capacity_bytes or 0,
                num_calls=self._num_calls + express.calls,
                num_rows=self._num_rows + express.rows,
                num_pairs=self._num_pairs + express.pairs,
                busy_s=self._busy_s + express.busy_s,
                dtype=str(self._dtype).removeprefix("torch."),
            )

    def _load(self, placement: Placement) -> None:
        started_s = time.perf_counter()
        mine = placement.experts_of(self.group_id)
        with SafetensorsCheckpoint(self._checkpoint_path) as checkpoint:
            shape = ExpertShape(
                num_layers=checkpoint.num_layers,
                num_experts=checkpoint.num_experts,
                hidden_size=checkpoint.hidden_size,
                intermediate_size=checkpoint.intermediate_size,
                dtype=self._dtype,
            )
            got = (placement.num_layers, placement.num_experts)
            if got != (shape.num_layers, shape.num_experts):
                rule = f"must have {shape.num_layers} layers of {shape.num_experts} experts"
                raise ConfigurationError("placement", rule, str(list(got)))
            if self._capacity_bytes is None:
                self._capacity_bytes = device.available_bytes()
            needed = sum(map(len, mine.values())) * shape.expert_bytes
            self._require_room(needed, self._capacity_bytes)
            compute = choose_compute(shape, self._compute_choice, self.num_threads)
            self._fill(checkpoint, compute, mine)
        self.adopt(shape, compute, placement.epoch)
        log.info(
            "event=group_loaded group=%s experts=%d bytes=%d compute=%s epoch=%d seconds=%.2f",
            self.group_id,
            sum(map(len, mine.values())),
            needed,
            compute.name,
            placement.epoch,
            time.perf_counter() - started_s,
        )

    def _fill(
        self,
        checkpoint: SafetensorsCheckpoint,
        compute: ExpertCompute,
        experts: dict[int, list[int]],
    ) -> None:
        for layer_id, expert_ids in sorted(experts.items()):
            with self._compute_lock:  # may move the layer's array
                compute.reserve(layer_id, len(compute.residents(layer_id)) + len(expert_ids))
            for expert_id, gate_up, down in checkpoint.expert_slices(
                layer_id, expert_ids, self._dtype
            ):
                compute.load(layer_id, expert_id, gate_up, down)

    def _adopt_epoch(self, epoch: int) -> None:
        self._epoch = epoch
        if self._express is not None:
            self._express.refresh()

    def _enter(self, state: GroupState) -> None:
        self._state = state
        log.info(
            "event=group_state group=%s state=%s%s",
            self.group_id,
            state,
            f" reason={self._failure!r}" if state is GroupState.FAILED else "",
        )
        for listener in self._listeners:
            listener(state)

    def _loaded(self) -> tuple[ExpertCompute, ExpertShape]:
        if self._compute is None or self._shape is None:
            raise NotReadyError(f"group {self.group_id} is {self._state}")
        return self._compute, self._shape

    def _check_epoch(self, epoch: int) -> None:
        if epoch < self._epoch:
            raise InvalidFieldError("placement_epoch", f"must be {self._epoch} or more", epoch)

    def _checked(self, keys: ExpertKeys, shape: ExpertShape) -> list[tuple[int, int]]:
        checked = list(keys)
        for index, (layer_id, expert_id) in enumerate(checked):
            if not 0 <= layer_id < shape.num_layers:
                field = f"experts[{index}].layer_id"
                raise InvalidFieldError(field, f"must be below {shape.num_layers}", layer_id)
            if not 0 <= expert_id < shape.num_experts:
                field = f"experts[{index}].expert_id"
                raise InvalidFieldError(field, f"must be below {shape.num_experts}", expert_id)
        return checked

    def _free_bytes(self, compute: ExpertCompute) -> int:
        if not self._is_bounded:
            return device.available_bytes()
        return max(0, (self._capacity_bytes or 0) - compute.resident_bytes)

    def _require_room(self, needed: int, free: int) -> None:
        if needed > free:
            raise ResourceError(
                f"memory for experts in group {self.group_id}",
                need=f"{needed} bytes",
                have=f"{free} bytes",
                hint="add a group, or give this one a smaller capacity in the placement",
            )
