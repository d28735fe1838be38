"""A forward's payload as tensors: checked against the model before a kernel sees it.

Nothing is copied: rows, pairs and weights are views of the frame's buffer. About 15 us a call in
Python.
"""

from __future__ import annotations

import numpy as np
import torch

from experts.compute import ExpertShape
from experts.finite import all_finite
from protos.codec import (
    HEADER_BYTES,
    Combine,
    DType,
    FrameHeader,
    FrameKind,
    dtype_of_torch,
    result_payload_bytes,
)
from protos.errors import MessageTooLargeError, NonFiniteError, WireFormatError

MAX_FRAME_BYTES = HEADER_BYTES + 512 * 1024 * 1024
"""Bound of a frame, header included: a prefill of 8192 tokens, top-8 of width 4096, bfloat16."""
MAX_MESSAGE_BYTES = MAX_FRAME_BYTES + 1024
"""Bound of a gRPC message between a router and a group: a frame and its field's tag."""


class CallReader:
    """Reads the calls of one model."""

    def __init__(self, shape: ExpertShape) -> None:
        self._num_layers = shape.num_layers
        self._num_experts = shape.num_experts
        self._hidden = shape.hidden_size
        self._dtype = shape.dtype
        self._wire_dtype = dtype_of_torch(shape.dtype)

    def views(
        self, header: FrameHeader, payload: bytearray | memoryview
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the parts of a payload that holds what the header says.

        Args:
            header: A header that `unpack_header` checked.
            payload: Writable memory of `header.payload_bytes`.

        Returns:
            Rows `[R, H]`, pair rows `[P]` int32, pair experts `[P]` int32, pair weights `[P]`
            float32; every id in range.

        Raises:
            WireFormatError: A layer, row, expert, width or dtype that this model does not have.
            MessageTooLargeError: The result would not fit a frame.
        """
        num_rows, hidden, num_pairs = header.num_rows, header.hidden, header.num_pairs
        self._check(header)
        if num_pairs == 0 or num_rows == 0:
            if num_pairs:
                raise WireFormatError(f"{num_pairs} pairs on no rows")
            none = torch.empty(0, dtype=torch.int32)
            return torch.zeros(num_rows, hidden, dtype=self._dtype), none, none, torch.empty(0)
        pairs = np.frombuffer(payload, np.uint32, 2 * num_pairs)
        row_ids, expert_ids = pairs[:num_pairs], pairs[num_pairs:]
        # As unsigned numbers, negative ids are too large: one maximum checks both ends.
        if (largest := int(row_ids.max())) >= num_rows:
            raise WireFormatError(f"pair_row {largest}: the frame has {num_rows} rows")
        if (largest := int(expert_ids.max())) >= self._num_experts:
            raise WireFormatError(f"pair_expert {largest}: the model has {self._num_experts}")
        weights = np.frombuffer(payload, np.float32, num_pairs, 8 * num_pairs)
        rows = torch.frombuffer(
            payload, dtype=self._dtype, count=num_rows * hidden, offset=12 * num_pairs
        )
        return (
            rows.view(num_rows, hidden),
            torch.from_numpy(row_ids.view(np.int32)),
            torch.from_numpy(expert_ids.view(np.int32)),
            torch.from_numpy(weights),
        )

    def _check(self, header: FrameHeader) -> None:
        if header.kind is not FrameKind.FORWARD:
            raise WireFormatError(f"kind {int(header.kind)}, expected a forward (1)")
        if header.layer_id >= self._num_layers:
            raise WireFormatError(f"layer_id {header.layer_id}: the model has {self._num_layers}")
        if header.hidden != self._hidden:
            raise WireFormatError(
                f"rows of {header.hidden}: the model's hidden size is {self._hidden}"
            )
        if header.dtype != self._wire_dtype:
            raise WireFormatError(
                f"rows of {DType(header.dtype).name}: the group computes in {self._wire_dtype.name}"
            )
        result_bytes = result_payload_bytes(
            header.num_rows, header.hidden, header.num_pairs, header.dtype, header.combine
        )
        if header.combine is Combine.PARTIAL:  # the kernel holds every pair's output in float32
            result_bytes = max(result_bytes, 4 * header.num_pairs * header.hidden)
        if result_bytes > MAX_FRAME_BYTES - HEADER_BYTES:
            raise MessageTooLargeError(result_bytes + HEADER_BYTES, MAX_FRAME_BYTES)


def culprit(
    layer_id: int,
    rows: torch.Tensor,
    pair_row: torch.Tensor,
    pair_expert: torch.Tensor,
    out: torch.Tensor,
    combine: Combine,
) -> NonFiniteError:
    """Return the error for an output that is not finite: the caller's row, or an expert."""
    bad = int((~torch.isfinite(out).all(dim=1)).nonzero()[0])
    row = int(pair_row[bad]) if combine is Combine.SLOTS else bad
    if not all_finite(rows[row].contiguous()):
        return NonFiniteError(f"row {row} of the call", layer_id)
    if combine is Combine.SLOTS:
        return NonFiniteError(f"the output of expert {int(pair_expert[bad])}", layer_id)
    return NonFiniteError(f"the sum for row {row}", layer_id)
