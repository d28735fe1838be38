// Copies K and V between the paged cache (kv_cache.h) and rows as anyone would write them down:
//
//   K [tokens][kv_heads][hd], then V [tokens][kv_heads][hd], in the cache's dtype
//
// One pass over the memory, on the calling thread: a tier's threads copy beside the engine's step,
// so the thread pool stays out of it. Numbers are moved, never converted.
#include <algorithm>

#include "kv_cache.h"

namespace em {
namespace {

// Store 32 bytes, aligned; streamed past the caches or not.
template <bool kStream>
inline void store8(uint32_t* to, __m256i words) {
  kStream ? _mm256_stream_si256((__m256i*)to, words) : _mm256_storeu_si256((__m256i*)to, words);
}

// Transpose 8 x 8 words: row i of `to` is column i of `from`; strides in words.
template <bool kStream = false>
inline void transpose8(const uint32_t* from, int64_t from_stride, uint32_t* to, int64_t to_stride) {
  __m256i r[8], t[8];
  for (int i = 0; i < 8; i++) r[i] = _mm256_loadu_si256((const __m256i*)(from + i * from_stride));
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm256_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    for (int j = 0; j < 2; j++) {
      r[i + 2 * j] = _mm256_unpacklo_epi64(t[i + j], t[i + 2 + j]);
      r[i + 2 * j + 1] = _mm256_unpackhi_epi64(t[i + j], t[i + 2 + j]);
    }
  }
  for (int i = 0; i < 4; i++) {
    __m256i low = _mm256_permute2x128_si256(r[i], r[4 + i], 0x20);
    __m256i high = _mm256_permute2x128_si256(r[i], r[4 + i], 0x31);
    store8<kStream>(to + i * to_stride, low);
    store8<kStream>(to + (4 + i) * to_stride, high);
  }
}

// Transpose `rows` x `columns` words, 8 x 8 at a time; the edges word by word.
inline void transpose(const uint32_t* from, int64_t from_stride, uint32_t* to, int64_t to_stride,
                      int64_t rows, int64_t columns) {
  int64_t i = 0;
  for (; i + 8 <= rows; i += 8) {
    int64_t j = 0;
    for (; j + 8 <= columns; j += 8) {
      transpose8(from + i * from_stride + j, from_stride, to + j * to_stride + i, to_stride);
    }
    for (; j < columns; j++) {
      for (int64_t k = i; k < i + 8; k++) to[j * to_stride + k] = from[k * from_stride + j];
    }
  }
  for (; i < rows; i++) {
    for (int64_t j = 0; j < columns; j++) to[j * to_stride + i] = from[i * from_stride + j];
  }
}

// The same of exactly kGroup rows, past the caches: what is restored is not read again soon, and a
// streamed line is not fetched first. A line of `to` is kGroup words, written whole, in two halves.
template <bool kStream>
inline void transpose_group(const uint32_t* from, int64_t from_stride, uint32_t* to,
                            int64_t columns) {
  int64_t j = 0;
  for (; j + 8 <= columns; j += 8) {
    transpose8<kStream>(from + j, from_stride, to + j * kGroup, kGroup);
    transpose8<kStream>(from + 8 * from_stride + j, from_stride, to + j * kGroup + 8, kGroup);
  }
  for (; j < columns; j++) {
    for (int64_t i = 0; i < kGroup; i++) to[j * kGroup + i] = from[i * from_stride + j];
  }
}

// The tokens of one group, all KV heads. Rows are `row` elements apart. Streaming needs a cache that
// begins at a multiple of 32 bytes: then all of a group's rows do.
template <class Elem, bool kStream = false>
struct Copy {
  static constexpr int64_t kPair = 4 / sizeof(Elem);
  const Cache& kv;
  int64_t kv_heads, hd, row;

  void read(int64_t block, int64_t group, int64_t tokens, Elem* k, Elem* v) const {
    for (int64_t h = 0; h < kv_heads; h++, k += hd, v += hd) {
      transpose(kv.k(block, h, group), kGroup, (uint32_t*)k, row / kPair, kv.steps, tokens);
      const uint32_t* from = kv.v(block, h, group);
      for (int64_t t = 0; t < tokens; t += kPair, from += kv.width) {
        read_values(from, v + t * row, tokens - t);
      }
    }
  }

  void write(int64_t block, int64_t group, int64_t tokens, const Elem* k, const Elem* v) const {
    for (int64_t h = 0; h < kv_heads; h++, k += hd, v += hd) {
      uint32_t* keys = kv.k(block, h, group);
      if (tokens == kGroup) {
        transpose_group<kStream>((const uint32_t*)k, row / kPair, keys, kv.steps);
      } else {
        transpose((const uint32_t*)k, row / kPair, keys, kGroup, tokens, kv.steps);
      }
      uint32_t* to = kv.v(block, h, group);
      for (int64_t t = 0; t < tokens; t += kPair, to += kv.width) {
        write_values(to, v + t * row, tokens - t);
      }
    }
  }

 private:
  void read_values(const uint32_t* from, float* v, int64_t) const {
    std::memcpy(v, from, size_t(hd) * 4);
  }
  void read_values(const uint32_t* from, bf16* v, int64_t tokens) const {
    for (int64_t i = 0; i < hd; i++) v[i] = bf16(from[i]);
    if (tokens == 1) return;
    for (int64_t i = 0; i < hd; i++) v[row + i] = bf16(from[i] >> 16);
  }
  void write_values(uint32_t* to, const float* v, int64_t) const {
    std::memcpy(to, v, size_t(hd) * 4);
  }
  // A token without a neighbour clears the neighbour's half, as in attention.cpp.
  void write_values(uint32_t* to, const bf16* v, int64_t tokens) const {
    if (tokens == 1) {
      for (int64_t i = 0; i < hd; i++) to[i] = v[i];
      return;
    }
    int64_t i = 0;
    for (; i + 16 <= hd; i += 16) {
      __m256i even = _mm256_loadu_si256((const __m256i*)(v + i));
      __m256i odd = _mm256_loadu_si256((const __m256i*)(v + row + i));
      __m256i low = _mm256_unpacklo_epi16(even, odd);  // words 0-3 and 8-11
      __m256i high = _mm256_unpackhi_epi16(even, odd);
      store8<kStream>(to + i, _mm256_permute2x128_si256(low, high, 0x20));
      store8<kStream>(to + i + 8, _mm256_permute2x128_si256(low, high, 0x31));
    }
    for (; i < hd; i++) to[i] = v[i] | uint32_t(v[row + i]) << 16;
  }
};

// f(block, group, first token, tokens) for every group of the first `tokens` tokens.
template <class F>
void for_groups(const Cache& kv, const int32_t* blocks, int64_t tokens, F&& f) {
  for (int64_t t = 0; t < tokens;) {
    int64_t inside = t % kv.block_size;
    int64_t end = std::min(kv.block_size, inside / kGroup * kGroup + kGroup);
    int64_t count = std::min(end - inside, tokens - t);
    f(int64_t(blocks[t / kv.block_size]), inside / kGroup, t, count);
    t += count;
  }
}

template <class Elem>
void read(const Cache& kv, int64_t kv_heads, int64_t hd, const int32_t* blocks, int64_t tokens,
          Elem* out) {
  Copy<Elem> copy{kv, kv_heads, hd, kv_heads * hd};
  Elem* v = out + tokens * copy.row;
  for_groups(kv, blocks, tokens, [&](int64_t block, int64_t group, int64_t t, int64_t count) {
    copy.read(block, group, count, out + t * copy.row, v + t * copy.row);
  });
}

template <class Elem, bool kStream>
void write(const Cache& kv, int64_t kv_heads, int64_t hd, const int32_t* blocks, int64_t tokens,
           const Elem* in) {
  Copy<Elem, kStream> copy{kv, kv_heads, hd, kv_heads * hd};
  const Elem* v = in + tokens * copy.row;
  for_groups(kv, blocks, tokens, [&](int64_t block, int64_t group, int64_t t, int64_t count) {
    copy.write(block, group, count, in + t * copy.row, v + t * copy.row);
  });
  if (kStream) _mm_sfence();  // whoever is told next sees them
}

template <class Elem>
void write(const Cache& kv, int64_t kv_heads, int64_t hd, const int32_t* blocks, int64_t tokens,
           const Elem* in) {
  bool is_aligned = uintptr_t(kv.words) % 32 == 0;
  is_aligned ? write<Elem, true>(kv, kv_heads, hd, blocks, tokens, in)
             : write<Elem, false>(kv, kv_heads, hd, blocks, tokens, in);
}

}  // namespace
}  // namespace em

extern "C" {

// hd must be even in bfloat16: a word is two neighbouring components. `caches` are those of several
// layers, whose rows follow one another in `out` or `in`.
void em_kv_read(void* const* caches, int64_t layers, int dtype, int64_t block_size,
                int64_t kv_heads, int64_t hd, const int32_t* blocks, int64_t tokens, void* out) {
  using namespace em;
  int64_t elements = 2 * tokens * kv_heads * hd;
  for (int64_t layer = 0; layer < layers; layer++) {
    Cache kv(caches[layer], dtype, block_size, kv_heads, hd);
    dtype == kFloat32 ? read(kv, kv_heads, hd, blocks, tokens, (float*)out + layer * elements)
                      : read(kv, kv_heads, hd, blocks, tokens, (bf16*)out + layer * elements);
  }
}

void em_kv_write(void* const* caches, int64_t layers, int dtype, int64_t block_size,
                 int64_t kv_heads, int64_t hd, const int32_t* blocks, int64_t tokens,
                 const void* in) {
  using namespace em;
  int64_t elements = 2 * tokens * kv_heads * hd;
  for (int64_t layer = 0; layer < layers; layer++) {
    Cache kv(caches[layer], dtype, block_size, kv_heads, hd);
    dtype == kFloat32
        ? write<float>(kv, kv_heads, hd, blocks, tokens, (const float*)in + layer * elements)
        : write<bf16>(kv, kv_heads, hd, blocks, tokens, (const bf16*)in + layer * elements);
  }
}
}
