// Dispatch and combine of one MoE layer on the router's side, and the lane's socket calls.
//
// Everything here runs without the interpreter lock. One call packs the frames of all groups, one sends them, one receives all
// answers, one sums them. The frame layout is documented in protos/v1/experts.proto; the slow twin is router/gating/dispatch.py.

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <cstring>
#include <ctime>
#include <vector>

#include <poll.h>
#include <sys/socket.h>

#include "dispatch.h"
#include "frame.h"
#include "pool.h"

namespace {

using em::kFrameFloat32;
using em::kFrameBFloat16;
using Header = em::FrameHeader;

constexpr int64_t kHeaderBytes = sizeof(Header);

inline uint16_t to_bf16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  const uint32_t rounded = bits + 0x7fff + ((bits >> 16) & 1);
  const bool nan = (bits & 0x7fffffff) > 0x7f800000;
  return static_cast<uint16_t>((nan ? (bits | 0x400000) : rounded) >> 16);
}

inline float from_bf16(uint16_t value) {
  const uint32_t bits = static_cast<uint32_t>(value) << 16;
  float result;
  std::memcpy(&result, &bits, 4);
  return result;
}

void copy_row(uint8_t* out, const uint8_t* row, int64_t hidden, int32_t from, int32_t to) {
  if (from == to) {
    std::memcpy(out, row, hidden * (to == kFrameFloat32 ? 4 : 2));
  } else if (to == kFrameBFloat16) {
    const float* source = reinterpret_cast<const float*>(row);
    uint16_t* target = reinterpret_cast<uint16_t*>(out);
    for (int64_t i = 0; i < hidden; i++) target[i] = to_bf16(source[i]);
  } else {
    const uint16_t* source = reinterpret_cast<const uint16_t*>(row);
    float* target = reinterpret_cast<float*>(out);
    for (int64_t i = 0; i < hidden; i++) target[i] = from_bf16(source[i]);
  }
}

inline float widen(float value) { return value; }
inline float widen(uint16_t value) { return from_bf16(value); }

template <class Element>
void sum_token(int64_t t, const int32_t* pair_group, const int32_t* pair_index, const float* topk_weights, int64_t top_k,
               int64_t hidden, uint8_t* const* results, float* out) {
  float* sum = out + t * hidden;
  for (int64_t k = 0; k < top_k; k++) {
    const int64_t p = t * top_k + k;
    const float weight = topk_weights[p];
    const auto* row = reinterpret_cast<const Element*>(results[pair_group[p]]) + int64_t(pair_index[p]) * hidden;
    if (k == 0) {
      for (int64_t i = 0; i < hidden; i++) sum[i] = weight * widen(row[i]);
    } else {
      for (int64_t i = 0; i < hidden; i++) sum[i] = __builtin_fmaf(weight, widen(row[i]), sum[i]);
    }
  }
}

int64_t now_ms() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec * 1000 + t.tv_nsec / 1000000;
}

}  // namespace

#pragma GCC visibility push(default)
extern "C" {

// Packs one forward frame per group into frames[g]. pair_group[t*K+k] and pair_index[t*K+k] receive where the pair's result row will
// stand; load[e] counts the tokens of each expert. A frame buffer must hold kHeaderBytes + T*K*12 + T*hidden*itemsize. Returns 0, or
// -(1+t*K+k) where an expert id is out of range or has no group (then nothing was counted).
int64_t em_dispatch_pack(const int32_t* topk_ids, const float* topk_weights, int64_t num_tokens, int64_t top_k,
                         const int32_t* group_of_expert, int64_t num_experts, int64_t num_groups, const uint8_t* rows,
                         int64_t row_stride_bytes, int64_t hidden, int32_t rows_dtype, int32_t wire_dtype,
                         int32_t combine, uint64_t call_id, uint64_t epoch, uint32_t layer_id, uint32_t deadline_ms,
                         uint8_t* const* frames, int32_t* pair_group, int32_t* pair_index, int64_t* num_rows,
                         int64_t* num_pairs, int64_t* load) {
  const int64_t num_all = num_tokens * top_k;
  for (int64_t g = 0; g < num_groups; g++) num_rows[g] = num_pairs[g] = 0;
  for (int64_t p = 0; p < num_all; p++) {
    const int32_t expert = topk_ids[p];
    if (expert < 0 || expert >= num_experts || group_of_expert[expert] < 0) return -(1 + p);
    const int32_t g = group_of_expert[expert];
    pair_group[p] = g;
    pair_index[p] = static_cast<int32_t>(num_pairs[g]++);
  }
  for (int64_t p = 0; p < num_all; p++) load[topk_ids[p]]++;
  const int64_t row_bytes = hidden * (wire_dtype == kFrameFloat32 ? 4 : 2);
  for (int64_t g = 0; g < num_groups; g++) {
    if (num_pairs[g] == 0) continue;
    const int64_t pairs = num_pairs[g];
    int32_t* pair_row = reinterpret_cast<int32_t*>(frames[g] + kHeaderBytes);
    int32_t* pair_expert = pair_row + pairs;
    float* pair_weight = reinterpret_cast<float*>(pair_expert + pairs);
    uint8_t* packed = reinterpret_cast<uint8_t*>(pair_weight + pairs);
    int64_t row = 0, pair = 0;
    for (int64_t t = 0; t < num_tokens; t++) {
      bool hit = false;
      for (int64_t k = 0; k < top_k; k++) {
        const int64_t p = t * top_k + k;
        if (pair_group[p] != g) continue;
        hit = true;
        pair_row[pair] = static_cast<int32_t>(row);
        pair_expert[pair] = topk_ids[p];
        pair_weight[pair++] = topk_weights[p];
      }
      if (hit) copy_row(packed + row++ * row_bytes, rows + t * row_stride_bytes, hidden, rows_dtype, wire_dtype);
    }
    num_rows[g] = row;
    Header header = {};
    header.magic = em::kFrameMagic;
    header.kind = em::kForward;
    header.combine = static_cast<uint16_t>(combine);
    header.call_id = call_id;
    header.placement_epoch = epoch;
    header.layer_id = layer_id;
    header.dtype = static_cast<uint16_t>(wire_dtype);
    header.version = 1;
    header.num_rows = static_cast<uint32_t>(row);
    header.hidden = static_cast<uint32_t>(hidden);
    header.num_pairs = static_cast<uint32_t>(pairs);
    header.deadline_ms = deadline_ms;
    header.payload_bytes = static_cast<uint64_t>(pairs * 12 + row * row_bytes);
    std::memcpy(frames[g], &header, sizeof header);
  }
  return 0;
}

// Sends whole buffers on blocking sockets. Returns 0, or -(1+g) with *error = errno for the first socket that failed.
int64_t em_lane_send(const int32_t* fds, uint8_t* const* buffers, const int64_t* lengths, int64_t num_groups, int32_t* error) {
  for (int64_t g = 0; g < num_groups; g++) {
    int64_t done = 0;
    while (done < lengths[g]) {
      const ssize_t sent = send(fds[g], buffers[g] + done, lengths[g] - done, MSG_NOSIGNAL);
      if (sent > 0) {
        done += sent;
      } else if (sent < 0 && errno == EINTR) {
        continue;
      } else {
        *error = sent == 0 ? EPIPE : errno;
        return -(1 + g);
      }
    }
  }
  return 0;
}

// Receives one frame from each socket, headers to headers[g], payloads to buffers[g] (capacity[g] bytes). received[g] ends as the
// whole frame's bytes; status[g] as 0, an errno (ECONNRESET when the peer closed), EMSGSIZE when the payload exceeds the capacity,
// or EPROTO for a bad magic. Waits for every group, at most timeout_ms in all; what is missing then has status ETIMEDOUT.
void em_lane_receive(const int32_t* fds, uint8_t* const* headers, uint8_t* const* buffers, const int64_t* capacity,
                     int64_t* received, int32_t* status, int64_t num_groups, int64_t timeout_ms) {
  constexpr int64_t kMaxGroups = 1024;
  pollfd waiting[kMaxGroups];
  int64_t which[kMaxGroups];
  const int64_t end = now_ms() + timeout_ms;
  for (int64_t g = 0; g < num_groups; g++) received[g] = 0, status[g] = EINPROGRESS;
  while (true) {
    int64_t open = 0;
    for (int64_t g = 0; g < num_groups && open < kMaxGroups; g++) {
      if (status[g] != EINPROGRESS) continue;
      waiting[open] = {fds[g], POLLIN, 0};
      which[open++] = g;
    }
    if (open == 0) return;
    const int64_t left = end - now_ms();
    const int ready = left > 0 ? poll(waiting, open, static_cast<int>(left)) : 0;
    if (ready < 0 && errno == EINTR) continue;
    if (ready <= 0) {
      for (int64_t i = 0; i < open; i++) status[which[i]] = ready < 0 ? errno : ETIMEDOUT;
      return;
    }
    for (int64_t i = 0; i < open; i++) {
      if (waiting[i].revents == 0) continue;
      const int64_t g = which[i];
      while (status[g] == EINPROGRESS) {
        const bool in_header = received[g] < kHeaderBytes;
        uint8_t* at = in_header ? headers[g] + received[g] : buffers[g] + (received[g] - kHeaderBytes);
        int64_t want;
        if (in_header) {
          want = kHeaderBytes - received[g];
        } else {
          Header header;
          std::memcpy(&header, headers[g], sizeof header);
          want = kHeaderBytes + static_cast<int64_t>(header.payload_bytes) - received[g];
        }
        const ssize_t got = recv(fds[g], at, want, MSG_DONTWAIT);
        if (got == 0) {
          status[g] = ECONNRESET;
        } else if (got < 0) {
          if (errno == EINTR) continue;
          if (errno != EAGAIN && errno != EWOULDBLOCK) status[g] = errno;
          break;
        } else {
          received[g] += got;
          if (received[g] < kHeaderBytes) continue;
          Header header;
          std::memcpy(&header, headers[g], sizeof header);
          if (header.magic != em::kFrameMagic) {
            status[g] = EPROTO;
          } else if (header.payload_bytes > static_cast<uint64_t>(capacity[g])) {
            status[g] = EMSGSIZE;
          } else if (received[g] == kHeaderBytes + static_cast<int64_t>(header.payload_bytes)) {
            status[g] = 0;
          }
        }
      }
    }
  }
}

// Sums slot results in top-k order: out[t] = sum over k of topk_weights[t,k] * results[pair_group][pair_index], float32. Tokens are
// independent, so how they are split over threads never changes a bit.
void em_combine_slots(const int32_t* pair_group, const int32_t* pair_index, const float* topk_weights, int64_t num_tokens,
                      int64_t top_k, int64_t hidden, int32_t dtype, uint8_t* const* results, float* out) {
  const auto sum = [&](int64_t t) {
    dtype == kFrameFloat32 ? sum_token<float>(t, pair_group, pair_index, topk_weights, top_k, hidden, results, out)
                           : sum_token<uint16_t>(t, pair_group, pair_index, topk_weights, top_k, hidden, results, out);
  };
  constexpr int64_t kTokensPerTask = 32;
  if (num_tokens <= 2 * kTokensPerTask) {
    for (int64_t t = 0; t < num_tokens; t++) sum(t);
    return;
  }
  em::Region region;
  region.run((num_tokens + kTokensPerTask - 1) / kTokensPerTask, [&](int64_t task) {
    const int64_t end = std::min(num_tokens, (task + 1) * kTokensPerTask);
    for (int64_t t = task * kTokensPerTask; t < end; t++) sum(t);
  });
}

}  // extern "C"
#pragma GCC visibility pop

namespace em {
namespace {

bool fail(Dispatch& d, DispatchFailure failure, int64_t group, int64_t detail) {
  d.failure = failure;
  d.failed_group = group;
  d.failed_detail = detail;
  return false;
}

// The groups that the call in flight goes to, and their columns of the tables.
struct Called {
  explicit Called(const Dispatch& d) {
    for (int64_t g = 0; g < d.num_groups; g++) {
      if (d.num_pairs[g] == 0) continue;
      groups.push_back(g);
      fds.push_back(d.fds[g]);
    }
  }
  template <class T>
  std::vector<T> of(const T* column) const {
    std::vector<T> some;
    for (int64_t g : groups) some.push_back(column[g]);
    return some;
  }
  int64_t count() const { return int64_t(groups.size()); }
  std::vector<int64_t> groups;
  std::vector<int32_t> fds;
};

}  // namespace

bool dispatch(Dispatch& d, int64_t layer, const float* rows, int64_t tokens, const int32_t* ids, const float* weights) {
  if (d.by_rescue) return false;
  d.call_id++;
  const int64_t packed = em_dispatch_pack(
      ids, weights, tokens, d.top_k, d.group_of_expert[layer], d.num_experts, d.num_groups,
      reinterpret_cast<const uint8_t*>(rows), d.hidden * 4, d.hidden, kFrameFloat32, int32_t(d.wire_dtype), kSlots,
      uint64_t(d.call_id), uint64_t(d.epoch), uint32_t(layer), uint32_t(d.deadline_ms), d.frames, d.pair_group,
      d.pair_index, d.num_rows, d.num_pairs, d.load[layer]);
  if (packed < 0) return fail(d, kBadExpert, -1, -packed - 1);
  const Called called(d);
  const int64_t item = d.wire_dtype == kFrameFloat32 ? 4 : 2;
  std::vector<int64_t> lengths;
  for (int64_t g : called.groups) lengths.push_back(kHeaderBytes + d.num_pairs[g] * 12 + d.num_rows[g] * d.hidden * item);
  int32_t error = 0;
  const int64_t sent = em_lane_send(called.fds.data(), called.of(d.frames).data(), lengths.data(), called.count(), &error);
  return sent < 0 ? fail(d, kSendFailed, called.groups[-sent - 1], error) : true;
}

bool collect(Dispatch& d, int64_t tokens, const float* weights, float* out) {
  const Called called(d);
  std::vector<int64_t> received(called.count());
  std::vector<int32_t> status(called.count());
  timespec from, to;
  clock_gettime(CLOCK_MONOTONIC, &from);
  em_lane_receive(called.fds.data(), called.of(d.headers).data(), called.of(d.results).data(),
                  called.of(d.result_bytes).data(), received.data(), status.data(), called.count(), d.timeout_ms);
  clock_gettime(CLOCK_MONOTONIC, &to);
  d.wait_ns += (to.tv_sec - from.tv_sec) * 1000000000LL + (to.tv_nsec - from.tv_nsec);
  std::fill(d.status, d.status + d.num_groups, 0);
  bool all_came = true;
  for (int64_t i = 0; i < called.count(); i++) {
    d.status[called.groups[i]] = status[i];
    all_came &= status[i] == 0;
  }
  if (!all_came) return fail(d, kReceiveFailed, -1, 0);
  const int64_t item = d.wire_dtype == kFrameFloat32 ? 4 : 2;
  for (int64_t g : called.groups) {
    FrameHeader header;
    std::memcpy(&header, d.headers[g], sizeof header);
    const bool is_ours = header.version == 1 && header.kind == kResult && header.call_id == uint64_t(d.call_id) &&
                         header.placement_epoch == uint64_t(d.epoch) &&
                         header.payload_bytes == uint64_t(d.num_pairs[g] * d.hidden * item);
    if (!is_ours) return fail(d, kBadAnswer, g, 0);
  }
  em_combine_slots(d.pair_group, d.pair_index, weights, tokens, d.top_k, d.hidden, int32_t(d.wire_dtype), d.results, out);
  return true;
}

}  // namespace em
