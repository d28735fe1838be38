// The express: a group's answers to ordinary forwards, without the interpreter.
//
// One call of em_express_serve answers frame after frame of a lane until something is out of the ordinary: the peer closed, a
// header that does not describe a forward of this model, an expert that is not here, an output that is not finite,
// a frame larger than the buffers. It then returns with what it has read, and experts/lane.py answers that one frame the careful
// way, where every case has its typed error. em_express_answer does the same for one frame that came another way. So this file
// decides nothing but "ordinary or not".
//
// The mutex is the group's compute lock: it guards residency and counters against experts/runtime.py.

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <cstring>
#include <ctime>
#include <mutex>
#include <new>
#include <vector>

#include <sys/socket.h>
#include <sys/uio.h>

#include "frame.h"

extern "C" {
int em_experts(const void* bank, int bank_dtype, int64_t slots, int64_t hidden, int64_t intermediate,
               const void* x, int x_dtype, int64_t rows, int64_t x_row_bytes,
               const int32_t* pair_row, const int32_t* pair_slot, const float* pair_weight,
               int64_t num_pairs, int combine, void* out, int out_dtype);
void em_park();
}

namespace {

struct Layer {
  const void* bank = nullptr;
  int64_t slots = 0;
  const int32_t* slot_of = nullptr;  // [num_experts], -1 where an expert is not resident
  int64_t* load = nullptr;           // [num_experts]
};

struct Express {
  std::mutex mutex;
  int64_t num_experts, hidden, intermediate;
  int dtype;
  std::vector<Layer> layers;
  int64_t calls = 0, rows = 0, pairs = 0, busy_ns = 0;
};

// Returned by em_express_serve.
enum Event : int64_t { kClosed = 0, kHeaderRead = 1, kFrameRead = 2, kExpired = 3 };

int64_t now_ns() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec * 1000000000LL + t.tv_nsec;
}

// Bytes read: `size`, less when the peer closed, or -errno.
int64_t receive(int fd, uint8_t* to, int64_t size) {
  int64_t done = 0;
  while (done < size) {
    const ssize_t got = recv(fd, to + done, size - done, MSG_WAITALL);
    if (got > 0) done += got;
    else if (got == 0) return done;
    else if (errno != EINTR) return -errno;
  }
  return done;
}

int64_t send_frame(int fd, const em::FrameHeader& header, const uint8_t* payload) {
  iovec parts[2] = {{const_cast<em::FrameHeader*>(&header), sizeof header},
                    {const_cast<uint8_t*>(payload), static_cast<size_t>(header.payload_bytes)}};
  msghdr message = {};
  message.msg_iov = parts;
  message.msg_iovlen = 2;
  while (message.msg_iovlen > 0) {
    ssize_t sent = sendmsg(fd, &message, MSG_NOSIGNAL);
    if (sent < 0) {
      if (errno == EINTR) continue;
      return -errno;
    }
    while (message.msg_iovlen > 0 && static_cast<size_t>(sent) >= message.msg_iov->iov_len) {
      sent -= message.msg_iov->iov_len;
      message.msg_iov++;
      message.msg_iovlen--;
    }
    if (message.msg_iovlen > 0) {
      message.msg_iov->iov_base = static_cast<uint8_t*>(message.msg_iov->iov_base) + sent;
      message.msg_iov->iov_len -= sent;
    }
  }
  return 0;
}

bool all_finite(const uint8_t* values, int64_t count, int dtype) {
  uint32_t found = 0;
  if (dtype == em::kFrameFloat32) {
    const uint32_t* bits = reinterpret_cast<const uint32_t*>(values);
    for (int64_t i = 0; i < count; i++) found |= (bits[i] & 0x7f800000u) == 0x7f800000u;
  } else {
    const uint16_t* bits = reinterpret_cast<const uint16_t*>(values);
    uint16_t narrow = 0;
    for (int64_t i = 0; i < count; i++) narrow |= (bits[i] & 0x7f80u) == 0x7f80u;
    found = narrow;
  }
  return found == 0;
}

bool is_ordinary(const Express& e, const em::FrameHeader& h) {
  if (h.magic != em::kFrameMagic || h.version != 1 || h.kind != em::kForward) return false;
  if (h.combine != em::kSlots && h.combine != em::kPartial) return false;
  if (h.dtype != e.dtype || h.hidden != e.hidden || h.layer_id >= e.layers.size()) return false;
  if (h.num_rows == 0 || h.num_pairs == 0) return false;
  const uint64_t item = h.dtype == em::kFrameFloat32 ? 4 : 2;
  return h.payload_bytes == 12ull * h.num_pairs + item * h.num_rows * h.hidden;
}

// Computes one forward that lies in `payload`; false where the careful way must answer.
bool answer(Express& e, const em::FrameHeader& h, const uint8_t* payload, uint8_t* result, int64_t waited_ns,
            std::vector<int32_t>& slots, em::FrameHeader& out) {
  const Layer& layer = e.layers[h.layer_id];
  if (layer.bank == nullptr) return false;
  const auto* pair_row = reinterpret_cast<const int32_t*>(payload);
  const int32_t* pair_expert = pair_row + h.num_pairs;
  const auto* pair_weight = reinterpret_cast<const float*>(pair_expert + h.num_pairs);
  slots.resize(h.num_pairs);
  for (uint32_t p = 0; p < h.num_pairs; p++) {
    const auto expert = static_cast<uint32_t>(pair_expert[p]);
    if (expert >= e.num_experts || layer.slot_of[expert] < 0) return false;
    slots[p] = layer.slot_of[expert];
  }
  const int64_t started = now_ns();
  const int64_t item = h.dtype == em::kFrameFloat32 ? 4 : 2;
  const bool partial = h.combine == em::kPartial;
  const int out_dtype = partial ? int(em::kFrameFloat32) : e.dtype;
  if (em_experts(layer.bank, e.dtype, layer.slots, e.hidden, e.intermediate, pair_weight + h.num_pairs, e.dtype,
                 h.num_rows, e.hidden * item, pair_row, slots.data(), pair_weight, h.num_pairs, h.combine, result,
                 out_dtype) != 0) {
    return false;
  }
  em_park();
  const int64_t count = int64_t(partial ? h.num_rows : h.num_pairs) * e.hidden;
  if (!all_finite(result, count, out_dtype)) return false;
  const int64_t took = now_ns() - started;
  for (uint32_t p = 0; p < h.num_pairs; p++) layer.load[pair_expert[p]]++;
  e.calls++;
  e.rows += h.num_rows;
  e.pairs += h.num_pairs;
  e.busy_ns += took;
  out = h;
  out.kind = em::kResult;
  out.deadline_ms = 0;
  out.compute_us = static_cast<uint32_t>(took / 1000);
  out.queue_us = static_cast<uint32_t>(waited_ns / 1000);
  out.payload_bytes = static_cast<uint64_t>(count * (partial ? 4 : item));
  return true;
}

enum Outcome { kAnswered, kOutOfTheOrdinary, kLate };

// Waits for its turn and computes one forward into `result` of `capacity` bytes; `out` becomes the answer's header.
Outcome compute(Express& e, const em::FrameHeader& h, const uint8_t* payload, uint8_t* result, int64_t capacity,
                std::vector<int32_t>& slots, em::FrameHeader& out) {
  const int64_t item = h.dtype == em::kFrameFloat32 ? 4 : 2;
  // Partial sums: the kernel holds every pair's output in float32 as well.
  const int64_t widest = h.combine == em::kPartial ? int64_t(std::max(h.num_rows, h.num_pairs)) * 4
                                                   : int64_t(h.num_pairs) * item;
  if (widest * h.hidden > capacity) return kOutOfTheOrdinary;
  int64_t waited_ns = 0;
  std::unique_lock<std::mutex> lock(e.mutex, std::try_to_lock);
  if (!lock.owns_lock()) {
    const int64_t from = now_ns();
    lock.lock();
    waited_ns = now_ns() - from;
    if (h.deadline_ms != 0 && waited_ns / 1000000 > h.deadline_ms) return kLate;
  }
  return answer(e, h, payload, result, waited_ns, slots, out) ? kAnswered : kOutOfTheOrdinary;
}

}  // namespace

#pragma GCC visibility push(default)
extern "C" {

void* em_express_new(int64_t num_layers, int64_t num_experts, int64_t hidden, int64_t intermediate, int dtype) {
  Express* e = new (std::nothrow) Express;
  if (e == nullptr) return nullptr;
  e->num_experts = num_experts;
  e->hidden = hidden;
  e->intermediate = intermediate;
  e->dtype = dtype;
  e->layers.resize(num_layers);
  return e;
}

void em_express_free(void* express) { delete static_cast<Express*>(express); }

void em_express_lock(void* express) { static_cast<Express*>(express)->mutex.lock(); }

void em_express_unlock(void* express) { static_cast<Express*>(express)->mutex.unlock(); }

// The next three: under the lock.
void em_express_set_layer(void* express, int64_t layer_id, const void* bank, int64_t slots, const int32_t* slot_of,
                          int64_t* load) {
  static_cast<Express*>(express)->layers[layer_id] = {bank, slots, slot_of, load};
}


void em_express_totals(void* express, int64_t* totals) {
  const Express& e = *static_cast<Express*>(express);
  totals[0] = e.calls;
  totals[1] = e.rows;
  totals[2] = e.pairs;
  totals[3] = e.busy_ns;
}

// Answers forwards on a blocking socket until something is out of the ordinary. `head` receives 64 bytes, `payload` and `result`
// hold `capacity` bytes each. Returns an Event, or -errno. kClosed: the peer closed, *got bytes of a frame were cut off. kHeaderRead:
// only `head` was read. kFrameRead: `head` and `payload` were read. kExpired: as kFrameRead, but the caller has stopped waiting.
int64_t em_express_serve(void* express, int fd, uint8_t* head, uint8_t* payload, uint8_t* result, int64_t capacity,
                         int64_t* got) {
  Express& e = *static_cast<Express*>(express);
  std::vector<int32_t> slots;
  while (true) {
    *got = receive(fd, head, sizeof(em::FrameHeader));
    if (*got < 0) return *got;
    if (*got < static_cast<int64_t>(sizeof(em::FrameHeader))) return kClosed;
    em::FrameHeader header, out;
    std::memcpy(&header, head, sizeof header);
    if (!is_ordinary(e, header) || header.payload_bytes > static_cast<uint64_t>(capacity)) return kHeaderRead;
    const int64_t size = static_cast<int64_t>(header.payload_bytes);
    *got = receive(fd, payload, size);
    if (*got < 0) return *got;
    if (*got < size) return kClosed;
    const Outcome outcome = compute(e, header, payload, result, capacity, slots, out);
    if (outcome != kAnswered) return outcome == kLate ? kExpired : kFrameRead;
    const int64_t status = send_frame(fd, out, result);
    if (status < 0) return status;
  }
}

// Answers one whole frame: writes header and result to `out`, which holds 64 + `capacity` bytes. Returns the answer's bytes, 0 where
// the careful way must answer, -1 where the caller has stopped waiting.
int64_t em_express_answer(void* express, const uint8_t* frame, int64_t size, uint8_t* out, int64_t capacity) {
  Express& e = *static_cast<Express*>(express);
  em::FrameHeader header, answer_header;
  if (size < static_cast<int64_t>(sizeof header)) return 0;
  std::memcpy(&header, frame, sizeof header);
  if (!is_ordinary(e, header) || header.payload_bytes != size - sizeof header) return 0;
  thread_local std::vector<int32_t> slots;
  const Outcome outcome =
      compute(e, header, frame + sizeof header, out + sizeof header, capacity, slots, answer_header);
  if (outcome != kAnswered) return outcome == kLate ? -1 : 0;
  std::memcpy(out, &answer_header, sizeof answer_header);
  return static_cast<int64_t>(sizeof answer_header + answer_header.payload_bytes);
}

}  // extern "C"
#pragma GCC visibility pop
