// How K and V lie in the paged cache of one full-attention layer.
//
// A block (page) of `block_size` tokens has, per KV head, groups of 16 tokens (the last group may
// use fewer); a word is 32 bits, as in gemm.h:
//
//   K of a group   [ceil(hd / pair)][16 tokens]   word = neighbouring components of one token (bf16)
//   V of a group   [16 / pair][hd padded to 16]   word = one component of neighbouring tokens (bf16)
//
// with pair = 2 in bf16 and 1 in float32: both products read them as packed weights. A block is, per
// KV head, the K of its groups, then the V of its groups.
#pragma once

#include "pack.h"

namespace em {

constexpr int kGroup = 16;  // tokens of a group

struct Cache {
  uint32_t* words;
  int64_t block_size, groups;      // groups of a block
  int64_t steps, pairs, width;     // words of a key; key words of a group; padded components
  int64_t group_k, group_v, head;  // words of a group's K, of its V, of one head of a block
  int64_t block;                   // words of a block

  Cache(void* data, int dtype, int64_t size, int64_t kv_heads, int64_t hd)
      : words((uint32_t*)data), block_size(size), groups((size + kGroup - 1) / kGroup) {
    int64_t pair = dtype == kFloat32 ? 1 : 2;
    steps = (hd + pair - 1) / pair;
    pairs = kGroup / pair;
    width = round_up(hd, kGrain);
    group_k = steps * kGroup;
    group_v = pairs * width;
    head = groups * (group_k + group_v);
    block = kv_heads * head;
  }
  uint32_t* k(int64_t block_id, int64_t kv_head, int64_t group) const {
    return words + block_id * block + kv_head * head + group * group_k;
  }
  uint32_t* v(int64_t block_id, int64_t kv_head, int64_t group) const {
    return words + block_id * block + kv_head * head + groups * group_k + group * group_v;
  }
};

}  // namespace em
