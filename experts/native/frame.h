// The 64-byte header of a frame, as protos/v1/experts.proto lays it out. Little endian, as this machine is.

#pragma once

#include <cstdint>

namespace em {

constexpr uint32_t kFrameMagic = 0x31464d45;  // "EMF1"

enum FrameKind : uint16_t { kForward = 1, kResult = 2 };
enum FrameCombine : uint16_t { kSlots = 1, kPartial = 2 };
enum FrameDType : int32_t { kFrameFloat32 = 1, kFrameBFloat16 = 2 };

struct __attribute__((packed)) FrameHeader {
  uint32_t magic;
  uint16_t kind, combine;
  uint64_t call_id, placement_epoch;
  uint32_t layer_id;
  uint16_t dtype, version;
  uint32_t num_rows, hidden, num_pairs, deadline_ms, compute_us, queue_us;
  uint64_t payload_bytes;
};
static_assert(sizeof(FrameHeader) == 64, "a frame header has 64 bytes");

}  // namespace em
