// One router's calls to its expert groups over lanes, as `router/gating/native_calls.py` lays them out. Everything it points to
// belongs to Python and outlives the calls.

#pragma once

#include <cstdint>

namespace em {

enum DispatchFailure : int64_t {
  kNoFailure = 0,
  kBadExpert = 1,     // `failed_detail` is the pair (token * top_k + slot)
  kSendFailed = 2,    // `failed_detail` is an errno
  kReceiveFailed = 3, // `status` has an errno for each group
  kBadAnswer = 4,     // header and result of `failed_group` say what
};

struct Dispatch {
  int64_t num_groups, num_experts, top_k, hidden, wire_dtype, epoch, deadline_ms, timeout_ms;
  const int32_t* const* group_of_expert;  // [layers][num_experts]
  int64_t* const* load;                   // [layers][num_experts]
  uint8_t* const* frames;                 // [num_groups], large enough for a step's tokens, as are the results
  uint8_t* const* headers;
  uint8_t* const* results;
  const int64_t* result_bytes;
  const int32_t* fds;
  int32_t* status;
  int64_t* num_rows;
  int64_t* num_pairs;
  int32_t* pair_group;  // [tokens * top_k]
  int32_t* pair_index;
  // Called where a layer's call fails: sends it again another way and returns 1 with its sums [tokens, hidden] in `out`, and with
  // this struct ready for the next layer; 0 ends the step. Python: it takes the interpreter lock, and may wait for a group.
  int64_t (*rescue)(int64_t layer, const float* rows, int64_t tokens, const int32_t* ids, const float* weights, float* out);
  int64_t by_rescue;  // 1: no native calls, every layer goes that way
  // Changed by the calls.
  int64_t call_id, failure, failed_group, failed_detail, wait_ns;
};

// Packs and sends `tokens` float32 rows [tokens, hidden]; false on a failure.
bool dispatch(Dispatch& d, int64_t layer, const float* rows, int64_t tokens, const int32_t* ids, const float* weights);

// Waits for the answers of the dispatch before and sums them into out [tokens, hidden]; false on a failure.
bool collect(Dispatch& d, int64_t tokens, const float* weights, float* out);

}  // namespace em
