// Packing of weights and of input rows into words (layout: gemm.h).
#pragma once

#include "gemm.h"

namespace em {

enum DType : int { kFloat32 = 1, kBFloat16 = 2 };  // as in gating.proto

inline int size_of(int dtype) { return dtype == kFloat32 ? 4 : 2; }

inline void convert(float* to, const float* from, int64_t n) { std::memcpy(to, from, size_t(n) * 4); }
inline void convert(bf16* to, const bf16* from, int64_t n) { std::memcpy(to, from, size_t(n) * 2); }
template <class To, class From>
inline void convert(To* to, const From* from, int64_t n) {
  for_vectors(n, [&](int64_t i, int lanes) { store_up_to(to + i, load_up_to(from + i, lanes), lanes); });
}
template <class Elem>
inline void convert(Elem* to, const void* from, int dtype, int64_t n) {
  dtype == kFloat32 ? convert(to, (const float*)from, n) : convert(to, (const bf16*)from, n);
}

// One input row as `steps` words, zeros behind its k elements.
template <class D>
inline void pack_row(uint32_t* to, const void* from, int dtype, int64_t k) {
  auto* elements = (typename D::Elem*)to;
  if (k % D::K) elements[k] = 0;
  convert(elements, from, dtype, k);
}

// Pack one panel. `row(c)` gives the weight row of column c, or nullptr for a column of zeros.
template <class D, class Row>
inline void pack_panel(uint32_t* panel, int width, int64_t k, int dtype, Row&& row) {
  constexpr int64_t kBlock = 128;  // steps
  alignas(64) uint32_t words[kBlock];
  int64_t steps = num_steps<D>(k);
  for (int64_t s0 = 0; s0 < steps; s0 += kBlock) {
    int64_t n = std::min(kBlock, steps - s0);
    int64_t elements = std::min(n * D::K, k - s0 * D::K);
    for (int c = 0; c < width; c++) {
      const char* from = (const char*)row(c);
      uint32_t* to = panel + s0 * width + c;
      if (from == nullptr) {
        for (int64_t s = 0; s < n; s++) to[s * width] = 0;
        continue;
      }
      pack_row<D>(words, from + s0 * D::K * size_of(dtype), dtype, elements);
      for (int64_t s = 0; s < n; s++) to[s * width] = words[s];
    }
  }
}

}  // namespace em
