// The matrix product that everything runs on: rows of x times one packed panel of weights.
//
// Packed layout of a weight [N, K]. A word is 32 bits: two neighbouring inputs in bf16, or one in
// float32. K is padded with zeros to whole words (`steps`), N to a multiple of 16:
//
//   panel p = columns [64 p, 64 p + width), width 64, or 16/32/48 for the last panel
//   word (p, s, c) at  64 p * steps + s * width + c        s in [0, steps), c in [0, width)
//
// One layout serves one row and a thousand: a panel is read from end to end, a step is four full
// cache lines, and a row of x needs only a pointer, so rows of an expert are not gathered.
//
// Invariance. Each output is one chain of sums over s = 0, 1, 2, ... whatever the number of rows,
// tiles or threads; between blocks of steps the sum rests in memory as float32, which is exact. So
// a row's bits depend on that row and the weights alone.
#pragma once

#include <algorithm>

#include "simd.h"

namespace em {

constexpr int kPanel = 64;
constexpr int kGrain = 16;
// Steps after which the next tile of rows takes its turn: 128 KiB of weights stay in the
// second-level cache. Blocks that fit the first level (32, 96, 160 steps) were 3 to 25 % slower.
constexpr int64_t kBlockSteps = 512;
constexpr int64_t kAheadWords = 2048;  // prefetch distance; 256 to 4096 differ by a few per cent
constexpr int kRowBlock = 96;          // rows whose sums a task keeps on its stack

#if defined(__AVX512BF16__)
constexpr int kTileRows = 6;  // 6 x 4 sums + 4 weights + 1 input of 32 registers
constexpr int kTileVectors = 4;
#else
constexpr int kTileRows = 2;  // 2 x 4 sums + 2 + 2 halves of weights and input of 16 registers
constexpr int kTileVectors = 4;
#endif

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
inline int64_t num_panels(int64_t n) { return (n + kPanel - 1) / kPanel; }
inline int panel_width(int64_t n, int64_t p) {
  return int(std::min<int64_t>(kPanel, round_up(n, kGrain) - p * kPanel));
}
template <class D>
inline int64_t num_steps(int64_t k) {
  return (k + D::K - 1) / D::K;
}
inline int64_t packed_words(int64_t n, int64_t steps) { return round_up(n, kGrain) * steps; }

// sums[m][0 .. V*W) += x[m][s0 .. s0+steps) * w; starts from zero where `first`.
template <class D, int V, int R, bool Prefetch>
inline void tile(const uint32_t* w, int width, const uint32_t* const* x, int64_t s0, int64_t steps,
                 float* sums, bool first) {
  Vf acc[R][V];
  const uint32_t* in[R];
  for (int m = 0; m < R; m++) {
    in[m] = x[m] + s0;
    for (int v = 0; v < V; v++) acc[m][v] = first ? zero() : load(sums + m * kPanel + v * Vf::W);
  }
  for (int64_t s = 0; s < steps; s++, w += width) {
    if (Prefetch) {
#pragma GCC unroll 4
      for (int c = 0; c < V * Vf::W; c += 16) {
        _mm_prefetch((const char*)(w + kAheadWords + c), _MM_HINT_T0);
      }
    }
    typename D::Word b[V];
    for (int v = 0; v < V; v++) b[v] = D::weights(w + v * Vf::W);
#pragma GCC unroll 8
    for (int m = 0; m < R; m++) {
      typename D::Word a = D::input(in[m] + s);
#pragma GCC unroll 8
      for (int v = 0; v < V; v++) D::multiply(acc[m][v], b[v], a);
    }
  }
  for (int m = 0; m < R; m++) {
    for (int v = 0; v < V; v++) store(sums + m * kPanel + v * Vf::W, acc[m][v]);
  }
}

template <class D, int V, bool Prefetch, int R = kTileRows>
inline void tile_of(int rows, const uint32_t* w, int width, const uint32_t* const* x, int64_t s0,
                    int64_t steps, float* sums, bool first) {
  if (rows == R) return tile<D, V, R, Prefetch>(w, width, x, s0, steps, sums, first);
  if constexpr (R > 1) tile_of<D, V, Prefetch, R - 1>(rows, w, width, x, s0, steps, sums, first);
}

template <class D, int V>
inline void panel_columns(const uint32_t* w, int width, int64_t s0, int64_t steps,
                          const uint32_t* const* x, int rows, float* sums) {
  for (int m = 0; m < rows; m += kTileRows) {
    int r = std::min(kTileRows, rows - m);
    float* to = sums + m * kPanel;
    if (m == 0) {
      tile_of<D, V, true>(r, w, width, x + m, s0, steps, to, s0 == 0);
    } else {
      tile_of<D, V, false>(r, w, width, x + m, s0, steps, to, s0 == 0);
    }
  }
}

// sums[rows][64] = x rows times one panel. x[m] points to `steps` words.
template <class D>
inline void multiply_panel(const uint32_t* panel, int width, int64_t steps,
                           const uint32_t* const* x, int rows, float* sums) {
  constexpr int kColumns = kTileVectors * Vf::W;
  for (int64_t s0 = 0; s0 < steps; s0 += kBlockSteps) {
    int64_t n = std::min(kBlockSteps, steps - s0);
    const uint32_t* w = panel + s0 * width;
    int c = 0;
    for (; c + kColumns <= width; c += kColumns) {
      panel_columns<D, kTileVectors>(w + c, width, s0, n, x, rows, sums + c);
    }
    for (; c < width; c += kGrain) {
      panel_columns<D, kGrain / Vf::W>(w + c, width, s0, n, x, rows, sums + c);
    }
  }
}

}  // namespace em
